"""From series to studies: the series that becomes each channel, the mask that belongs to it, and why other series
are not used."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from radiology.headers import OTHER_MODALITY
from radiology.rules import CHANNELS, FLAIR, MASK, POST, PRE, Rules, role_of
from radiology.series import Series

LEAST_SLICES = 4  # fewer slices do not count as a volume


@dataclass(frozen=True)
class Line:
    """The use of a series: the channel's name, "mask" or "", and the reason."""

    series: Series
    used_as: str
    why: str


@dataclass(frozen=True)
class Study:
    """A patient's study. channels: by name; empty if there is no FLAIR. mask_of: the channel that the mask was drawn
    on (None for a NIfTI file, whose grid decides). lines: one for each series of the study."""

    patient_id: str
    uid: str
    when: str
    channels: dict[str, Series]
    mask: Series | None
    mask_of: str | None
    lines: tuple[Line, ...]


def plan_studies(found: list[Series], rules: Rules) -> list[Study]:
    """The studies that these series form, sorted by patient and date, with the chosen series. No pixels are read."""
    groups = defaultdict(list)
    for series in found:
        groups[series.patient_id, series.study_uid].append(series)
    return sorted(
        (_plan(*key, group, rules) for key, group in groups.items()),
        key=lambda s: (s.patient_id, s.when, s.uid),
    )


def _plan(patient_id: str, uid: str, group: list[Series], rules: Rules) -> Study:
    """The choice for one study."""
    lines, candidates = {}, defaultdict(list)
    for series in group:
        role, why = role_of(series, rules)
        problems = [p for p in series.problems if role != MASK or not p.startswith(OTHER_MODALITY)]
        if problems:
            lines[series.uid] = Line(series, "", "; ".join(problems))
        elif role is None:
            lines[series.uid] = Line(series, "", why)
        elif role != MASK and series.slices < LEAST_SLICES:
            few = "1 slice is" if series.slices == 1 else f"{series.slices} slices are"
            lines[series.uid] = Line(series, "", f"{few} not a volume")
        else:
            candidates[role].append((series, why))
    outlined = {reference for series, _ in candidates[MASK] for reference in series.references}
    channels = {}
    for channel in CHANNELS:
        if candidates[channel]:
            channels[channel] = _choose(channel, candidates[channel], outlined, lines)
    if FLAIR not in channels:
        channels = {}
        for uid_of, line in lines.items():
            if line.used_as:
                lines[uid_of] = Line(line.series, "", "the study has no FLAIR")
    mask, mask_of = _choose_mask(candidates[MASK], channels, lines)
    when = min((s.when for s in group if s.when), default="")
    return Study(patient_id, uid, when, channels, mask, mask_of, tuple(lines[s.uid] for s in group))


def shared_numbers(found: list[Series]) -> dict[str, str]:
    """Patient numbers that stand for several people (such as "ANONYMOUS"), with a sentence about what differs. A
    missing number that stands for several studies is included as ""."""
    people = defaultdict(set)
    for series in found:
        if series.person and series.patient_id:
            people[series.patient_id].add(series.person)
    told = {}
    for number, persons in people.items():
        known = [{value for value in values if value} for values in zip(*persons)]
        what = [name for name, values in zip(("names", "birth dates", "sexes"), known) if len(values) > 1]
        if what:
            told[number] = (
                f"one patient number stands for series with different {' and '.join(what)}: only one of "
                "their studies is used for training; give each patient a separate number in the export"
            )
    nameless = {series.study_uid for series in found if not series.patient_id}
    if len(nameless) > 1:
        told[""] = (
            f"{len(nameless)} studies have no patient number, so each is treated as a separate patient: two "
            "of one person could get into training and test; give each patient a number in the export"
        )
    return told


def _label(series: Series) -> str:
    """The name of a series in a sentence."""
    return series.description if series.number is None else f"{series.number} ({series.description})"


def _preferences(outlined: set[str]) -> list[tuple[str, Callable[[Series], float]]]:
    """Criteria for the choice among several series that claim a channel, the most important first."""
    return [
        ("a segmentation is of it", lambda s: s.uid in outlined),
        ("it is axial", lambda s: bool(s.orientation) and int(np.abs(s.normal).argmax()) == 2),
        ("it is original, not derived", lambda s: "DERIVED" not in s.image_type),
        ("it has more slices", lambda s: s.slices),
        ("it came last", lambda s: s.number or 0),
    ]


def _choose(
    channel: str, candidates: list[tuple[Series, str]], outlined: set[str], lines: dict[str, Line]
) -> Series:
    """The series that becomes a channel. The reasons for it and against the others go into `lines`."""
    preferences = _preferences(outlined)
    ranked = sorted(candidates, key=lambda c: [value(c[0]) for _, value in preferences], reverse=True)
    (best, why), others = ranked[0], ranked[1:]
    reasons = []
    for other, _ in others:
        reason = next(
            (text for text, value in preferences if value(best) != value(other)), "nothing tells them apart"
        )
        lines[other.uid] = Line(
            other, "", f"also claims to be {channel}; {_label(best)} was taken, because {reason}"
        )
        reasons.append(reason)
    told = f"; {len(ranked)} series claim to be {channel}, taken because {reasons[0]}" if reasons else ""
    lines[best.uid] = Line(best, channel, why + told)
    return best


def _choose_mask(
    candidates: list[tuple[Series, str]], channels: dict[str, Series], lines: dict[str, Line]
) -> tuple[Series | None, str | None]:
    """The study's mask and the channel that it belongs to. The reasons go into `lines`."""
    chosen = {series.uid: name for name, series in channels.items()}
    fitting = defaultdict(list)
    for series, _ in candidates:
        named = [chosen[uid] for uid in series.references if uid in chosen]
        if not channels:
            lines[series.uid] = Line(series, "", "the study has no FLAIR")
        elif series.references and not named:
            lines[series.uid] = Line(series, "", "it is a segmentation of a series that is not used")
        else:
            fitting[named[0] if named else FLAIR].append(series)
    for channel in (FLAIR, POST, PRE):
        if len(fitting[channel]) == 1:
            (mask,) = fitting.pop(channel)
            lines[mask.uid] = Line(mask, MASK, "a segmentation")
            for other in (s for group in fitting.values() for s in group):
                lines[other.uid] = Line(
                    other, "", f"a segmentation of another channel; that of {channel} was taken"
                )
            return mask, None if mask.modality == "NIfTI" else channel
        for series in fitting.pop(channel):
            lines[series.uid] = Line(
                series,
                "",
                f"{len(candidates)} segmentations claim to be the mask; keep only one in the export",
            )
    return None, None
