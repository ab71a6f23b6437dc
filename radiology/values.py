"""Values of DICOM tags: as numbers, with None where a tag is missing, empty or damaged, and the form of a UID."""

import math
import re
from typing import Any

import pydicom

UID = re.compile(r"[0-9]+(\.[0-9]+)*")


def is_uid(text: str) -> bool:
    """Whether a text has the form of a UID. Some scanners write numbers that begin with 0, which DICOM forbids."""
    return len(text) <= 64 and UID.fullmatch(text) is not None


def number_in(value: Any) -> float | None:
    """The first number in a tag's value, or None."""
    try:
        number = float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
    except (TypeError, ValueError, IndexError):
        return None
    return number if math.isfinite(number) else None


def whole_number_in(value: Any) -> int | None:
    """The first number in a tag's value without its fraction, or None."""
    number = number_in(value)
    return None if number is None else int(number)


def numbers_in(value: Any, count: int) -> tuple[float, ...] | None:
    """A tag's `count` finite numbers, or None."""
    try:
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def several_in(value: Any) -> tuple:
    """A tag's values, one or more."""
    if value is None or value == "":
        return ()
    return tuple(value) if isinstance(value, pydicom.multival.MultiValue) else (value,)


def look_up(header: pydicom.Dataset, frame: int, macro: str, name: str) -> Any:
    """A value for a frame from the functional groups of a multi-frame object: the frame's own group comes before
    the shared group."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = header.get(groups) or ()
        if index < len(sequence) and sequence[index].get(macro):
            return sequence[index][macro].value[0].get(name)
    return None


def time_in(header: pydicom.Dataset, name: str, macro: str, within: str) -> float | None:
    """A time in ms, from its own tag or from the functional groups."""
    classic = number_in(header.get(name))
    return number_in(look_up(header, 0, macro, within)) if classic is None else classic
