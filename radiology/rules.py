"""Which series is which channel: rules in a text file (series_rules.toml), applied to what a series says of
itself."""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from common import MedFLError
from radiology.headers import OUTLINES
from radiology.series import Series

DEFAULT = Path(__file__).with_name("series_rules.toml")
PRE, FLAIR, POST, MASK = "pre-contrast", "FLAIR", "post-contrast", "mask"
CHANNELS = (PRE, FLAIR, POST)  # in the order of the dataset's slices
TIMES = ("repetition_time", "echo_time", "inversion_time")
SECTIONS = ("leave_out", "flair", "t1", "contrast", "mask")
NO_AGENT = {"", "no", "none", "n", "0", "without"}  # what scanners write where no contrast agent was given


@dataclass(frozen=True)
class Rule:
    """Patterns of which one must be found and none may be, and ranges of times in ms."""

    any: tuple[re.Pattern, ...]
    none: tuple[re.Pattern, ...] = ()
    times: dict[str, tuple[float, float]] = field(default_factory=dict)

    def found_in(self, text: str) -> bool:
        """Whether a text fits."""
        return any(p.search(text) for p in self.any) and not any(p.search(text) for p in self.none)

    def fits_times(self, series: Series) -> bool:
        """Whether every time that the rule names is known and lies in its range."""
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
    """The rules in a file. Raises MedFLError for a file that is missing, no TOML, or says something else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = tomllib.loads(text)
        labels = content["mask"].pop("labels")
        sections = {name: _rule(content.pop(name)) for name in SECTIONS}
    except OSError as error:
        raise MedFLError(
            f"the rules {path} can't be read ({error.strerror or error}); check the name"
        ) from error
    except KeyError as error:
        raise MedFLError(
            f"the rules {path} lack {error.args[0]}; begin with a copy of {DEFAULT.name}"
        ) from error
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise MedFLError(
            f"the rules {path} can't be understood ({error}); begin with a copy of {DEFAULT.name}"
        ) from error
    if content:
        raise MedFLError(
            f"the rules {path} have a section {next(iter(content))} that nobody reads; take it away"
        )
    if not (isinstance(labels, list) and labels and all(isinstance(v, int) and v > 0 for v in labels)):
        raise MedFLError(
            f"the rules {path} need labels as a list of whole numbers above 0, such as [1]; correct them"
        )
    return Rules(sections, tuple(labels), text)


def _rule(section: dict) -> Rule:
    """One section. Raises ValueError or TypeError for what does not belong there."""
    unknown = section.keys() - {"any", "none", *TIMES}
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]} is no rule")
    patterns = {
        key: tuple(re.compile(p, re.IGNORECASE) for p in section.get(key, ())) for key in ("any", "none")
    }
    times = {name: (float(section[name][0]), float(section[name][1])) for name in TIMES if name in section}
    return Rule(**patterns, times=times)


def role_of(series: Series, rules: Rules) -> tuple[str | None, str]:
    """What a series is, a channel's name or "mask" or None, and why.

    The modality, problems and geometry play no part: `radiology.studies` weighs those.
    """
    text = re.sub(r"[_\-./\\()\[\]\s]+", " ", f"{series.description} {series.protocol} {series.sequence}")
    rule = rules.sections
    if series.modality in OUTLINES or (series.modality == "NIfTI" and rule["mask"].found_in(text)):
        return MASK, "a segmentation"
    if rule["leave_out"].found_in(text):
        return None, "its description is one of those that the rules leave out"
    by_text = rule["flair"].found_in(text), rule["t1"].found_in(text)
    flair, t1 = by_text if any(by_text) else (rule["flair"].fits_times(series), rule["t1"].fits_times(series))
    how = "by its description" if any(by_text) else "by its times"
    if flair:
        return FLAIR, how
    if not t1:
        return None, "neither its description nor its times are those of a FLAIR or a T1"
    without = any(p.search(text) for p in rule["contrast"].none)
    named = series.contrast_agent.strip().lower() not in NO_AGENT
    post = rule["contrast"].found_in(text) or (named and not without)
    return (POST if post else PRE), how
