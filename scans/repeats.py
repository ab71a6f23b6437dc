"""Repeats in a folder: further visits of a person, and copies of a patient."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from common import MedFLError, counted

Slices = tuple[list[Path], list[Path]]  # images in numeric order, and the mask of each
VISIT = re.compile(
    r"(?:^|(?<=[-_ ]))(?:ses|session|visit|timepoint|week)(?:[-_ ][a-z0-9]+|\d+)(?:-\d+)?(?=$|[-_ ])",
    re.IGNORECASE,
)
SUBJECT = re.compile(r"^sub-[a-z0-9]+", re.IGNORECASE)  # BIDS: everything below belongs to one person


def first_visits(top: Path, places: dict[Path, Slices], left_out: list[str]) -> dict[Path, Slices]:
    """The patients without further visits of a person (`sub-01/ses-2`, `anna/week_12`): one person must
    neither be on both sides of a split nor count twice."""
    visits: defaultdict[Path, list[Path]] = defaultdict(list)
    for place in sorted(places):
        visits[_person(place.relative_to(top))].append(place)
    further = {place for of_one in visits.values() for place in of_one[1:]}
    if further:
        people = sum(len(of_one) > 1 for of_one in visits.values())
        left_out.append(
            f"{counted(len(further), 'further visit')} of {counted(people, 'patient')} (such as "
            f"{min(further).relative_to(top)}): not read, only the first visit of each; a person must not "
            "be on both sides of a split"
        )
    return {place: slices for place, slices in places.items() if place not in further}


def _person(place: Path) -> Path:
    """The person of a patient's folder, by its path below the top; the path itself if it names no visit."""
    parts: list[str] = []
    for part in place.parts:
        left = re.sub(r"[-_ ]{2,}", "_", VISIT.sub("", part)).strip("-_ ")
        parts += [left] if left else []
        if subject := SUBJECT.match(part):
            return Path(*parts[:-1], subject[0])
    return Path(*parts) if parts else place


def without_copies(
    top: Path, places: dict[Path, Slices], file_hash: Callable[[Path], str], left_out: list[str]
) -> dict[Path, Slices]:
    """The patients without copies: of patients with equal slices and masks, the one nearest to `top` stays.
    Files are read only for patients with the same number and sizes of slices, because only these can be
    copies."""
    alike: defaultdict[tuple, list[Path]] = defaultdict(list)
    for place, (images, _) in places.items():
        alike[tuple(_size(image) for image in images)].append(place)
    content = {
        place: str(place) for place in places
    }  # hash of the slices, in hexadecimal, if they may be copies
    for same in alike.values():
        for place in same if len(same) > 1 else ():
            content[place] = _digest(places[place][0], file_hash)
    first: dict[str, Path] = {}
    copies: dict[Path, Path] = {}
    for place in sorted(places, key=lambda place: (len(place.parts), place)):
        original = first.setdefault(content[place], place)
        if original != place:
            if _digest(places[place][1], file_hash) != _digest(places[original][1], file_hash):
                raise MedFLError(
                    f"{original} and {place} hold the same slices with different masks; remove one of them"
                )
            copies[place] = original
    _refuse_partial_copies(copies, content)
    folders: defaultdict[tuple[Path, Path], int] = defaultdict(int)
    for copy, original in copies.items():
        folders[copy.parent, original.parent] += 1
    for (there, here), number in folders.items():
        are = "is a copy of one" if number == 1 else "are copies of those"
        left_out.append(f"{counted(number, 'patient')} in {there} {are} in {here}: not read")
    return {place: slices for place, slices in places.items() if place not in copies}


def _refuse_partial_copies(copies: dict[Path, Path], content: dict[Path, str]) -> None:
    """Raises MedFLError if two folders beside each other share some patients and differ in others: they are
    two versions of one dataset, and only the user knows which one is meant."""
    inside: defaultdict[Path, set[str]] = defaultdict(set)
    for place, value in content.items():
        inside[place.parent].add(value)
    for copy, original in copies.items():
        one, other = original.parent, copy.parent
        beside = not (one.is_relative_to(other) or other.is_relative_to(one))
        if beside and inside[one] != inside[other]:
            raise MedFLError(
                f"{one} and {other} hold different patients, but some are in both; name one of the folders "
                "with --data-dir"
            )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise MedFLError(f"{path} can't be read ({error.strerror}); check its permissions") from error


def _digest(files: list[Path], file_hash: Callable[[Path], str]) -> str:
    return hashlib.sha256("".join(file_hash(file) for file in files).encode()).hexdigest()
