"""Which series is which channel: rules in a text file (series_rules.toml), applied to the descriptions and times of
a series."""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from common import MedFLError
from radiology.headers import OUTLINES
from radiology.series import Series
from storage.files import text_of

DEFAULT = Path(__file__).with_name("series_rules.toml")
PRE, FLAIR, POST, MASK = "pre-contrast", "FLAIR", "post-contrast", "mask"
T1 = "T1"  # before it is known whether a contrast agent was given
SPEAKS = re.compile(r"\b(t1|t2|pd|stir)", re.IGNORECASE)  # in a description that names the kind of scan
LEFT_OUT = "its description is one of those that the rules leave out"
CHANNELS = (PRE, FLAIR, POST)  # in the order of the dataset's slices
TIMES = ("repetition_time", "echo_time", "inversion_time")
SECTIONS = ("leave_out", "flair", "t1", "contrast", "mask")
NO_AGENT = {"", "no", "none", "n", "0", "without"}  # what scanners write if no contrast agent was given


@dataclass(frozen=True)
class Rule:
    """any: patterns, of which one must match. none: patterns, of which none may match. times: ranges in ms."""

    any: tuple[re.Pattern, ...]
    none: tuple[re.Pattern, ...] = ()
    times: dict[str, tuple[float, float]] = field(default_factory=dict)

    def found_in(self, text: str) -> bool:
        """Whether a text fits."""
        return any(p.search(text) for p in self.any) and not any(p.search(text) for p in self.none)

    def fits_times(self, series: Series) -> bool:
        """Whether the rule names times, and each of them is known and in its range."""
        values = {name: getattr(series, name) for name in self.times}
        return bool(values) and all(
            v is not None and self.times[n][0] <= v <= self.times[n][1] for n, v in values.items()
        )


@dataclass(frozen=True)
class Rules:
    """The rules of a file, the labels that mean tumour, and the file's text."""

    sections: dict[str, Rule]
    labels: tuple[int, ...]
    text: str


def load_rules(path: Path = DEFAULT) -> Rules:
    """The rules in a file. Raises MedFLError for a file that is missing, is not TOML, or has other content."""
    try:
        text = text_of(path)
        content = tomllib.loads(text)
        labels = content["mask"].pop("labels")
        sections = {name: _rule(content.pop(name)) for name in SECTIONS}
    except OSError as error:
        raise MedFLError(
            f"the rules {path} can't be read ({error.strerror or error}); check the name"
        ) from error
    except KeyError as error:
        raise MedFLError(
            f"the rules {path} lack {error.args[0]}; start from a copy of {DEFAULT.name}"
        ) from error
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise MedFLError(
            f"the rules {path} can't be understood ({error}); start from a copy of {DEFAULT.name}"
        ) from error
    if content:
        raise MedFLError(f"the rules {path} have an unknown section {next(iter(content))}; remove it")
    if not (isinstance(labels, list) and labels and all(isinstance(v, int) and v > 0 for v in labels)):
        raise MedFLError(
            f"the rules {path} need labels as a list of whole numbers above 0, such as [1]; correct them"
        )
    return Rules(sections, tuple(labels), text)


def _rule(section: dict) -> Rule:
    """One section. Raises ValueError or TypeError for content that does not belong there."""
    unknown = section.keys() - {"any", "none", *TIMES}
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]} is not a rule")
    patterns = {
        key: tuple(re.compile(p, re.IGNORECASE) for p in section.get(key, ())) for key in ("any", "none")
    }
    times = {name: (float(section[name][0]), float(section[name][1])) for name in TIMES if name in section}
    return Rule(**patterns, times=times)


def role_of(series: Series, rules: Rules) -> tuple[str | None, str]:
    """The role of a series (a channel's name, "mask" or None), and the reason, with anything that contradicts it.

    Modality, problems and geometry are not considered here, but in `radiology.studies`.
    """
    own, rule = _words(f"{series.description} {series.sequence}"), rules.sections
    if series.modality in OUTLINES:
        return MASK, "a segmentation"
    if series.modality == "NIfTI" and any(p.search(own) for p in rule["mask"].any):
        fits = rule["mask"].found_in(own)
        return (MASK, "a segmentation") if fits else (None, "a mask, but by its name not of a tumour")
    if rule["leave_out"].found_in(own):
        return None, LEFT_OUT
    named, timed = _kind_by_name(own, rule), _kind_by_times(series, rule)
    kind: str | None = None
    if named:
        kind, text, how = named, own, "by its description"
    elif timed:
        kind, text, how = timed, own, "by its times"
    elif not SPEAKS.search(own):  # the protocol's name is often that of the whole exam, so it comes last
        text, how = _words(series.protocol), "by its protocol's name"
        if rule["leave_out"].found_in(text):
            return None, LEFT_OUT
        kind = _kind_by_name(text, rule)
    if kind is None:
        return None, "neither its description nor its times are those of a FLAIR or a T1"
    if named and timed and timed != named:
        how += f", though its times are those of a {timed}"
    if kind == FLAIR:
        return FLAIR, how
    given = series.contrast_agent.strip().lower() not in NO_AGENT
    without = any(p.search(text) for p in rule["contrast"].none)
    if without and given:
        how += ", though a contrast agent is named"
    elif rule["contrast"].found_in(text) and series.contrast_agent.strip() and not given:
        how += ", though it says that no contrast agent was given"
    return (POST if rule["contrast"].found_in(text) or (given and not without) else PRE), how


def _words(text: str) -> str:
    return re.sub(r"[_\-./\\()\[\]\s]+", " ", text).strip()


def _kind_by_name(text: str, rule: dict[str, Rule]) -> str | None:
    return FLAIR if rule["flair"].found_in(text) else T1 if rule["t1"].found_in(text) else None


def _kind_by_times(series: Series, rule: dict[str, Rule]) -> str | None:
    return FLAIR if rule["flair"].fits_times(series) else T1 if rule["t1"].fits_times(series) else None
