"""Reads file names: slices and masks, a slice's number, and the slices of one volume."""

import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import PurePath
from typing import TypeVar

from common import MedFLError

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MASK_SUFFIX = "_mask"  # default end of a mask's name, after the slice's name
NUMBER = re.compile(r"[_\-. (]*(?<!\d)(\d{1,18})\)?$")  # a slice's number at the end of its name
COPY = re.compile(  # what file managers and shares append to a copy's name; ` (1)` is ambiguous
    r" (?:(?:- )?(?:copy|copie|copia|kopie)(?: ?\(?\d+\)?)?|\(.*(?:conflict|konflikt).*\))$", re.IGNORECASE
)
KIND_OF_SCAN = re.compile(r"(?:^|[^a-z])t[12]$", re.IGNORECASE)
AnyPath = TypeVar("AnyPath", bound=PurePath)  # a file on disk, or the name of a file in memory


def is_image(path: PurePath, mask_suffix: str = MASK_SUFFIX) -> bool:
    """Whether a file's name is that of a slice: it has an image suffix, and is not a mask, a contact sheet of
    prepared data, or hidden."""
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and not is_mask(path, mask_suffix)
        and not path.name.startswith(".")
        and not path.stem.endswith("_contact_sheet")
    )


def is_mask(path: PurePath, mask_suffix: str = MASK_SUFFIX) -> bool:
    """Whether a file's name is that of a mask: `<name>_mask.<suffix>`, or of its copy."""
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and masked_stem(path, mask_suffix) is not None
        and not path.name.startswith(".")
    )


def masked_stem(path: PurePath, mask_suffix: str = MASK_SUFFIX) -> str | None:
    """The slice's name in a mask's name (`p_1` in `p_1_mask.png`), or None if it is not a mask's name. Text
    that browsers and file managers append to a copy (` (1)`, ` - Copy`, in any language) is ignored."""
    found = re.match(rf"(.*){re.escape(mask_suffix)}(?:[ (].*)?$", path.stem, re.IGNORECASE | re.DOTALL)
    return found[1] if found else None


def slice_number(path: PurePath) -> int | None:
    """The number at the end of a slice's name (12 in `TCGA_CS_4941_19960909_12.tif`, 7 in `slice007.png` and
    `scan (7).png`), or None if there is none. `t1` and `t2` are kinds of scans, not numbers."""
    found = NUMBER.search(path.stem)
    return int(found[1]) if found and not KIND_OF_SCAN.search(path.stem) else None


def volume_name(path: PurePath) -> str:
    """The name that the slices of one volume share: the file's name without the slice number."""
    if slice_number(path) is None:
        return path.stem
    return NUMBER.sub("", path.stem) or path.parent.name


def numeric_order(paths: list[AnyPath]) -> list[AnyPath]:
    """Slices of one volume sorted by number (2 before 10); those without a number come last, sorted by
    name."""
    return sorted(paths, key=lambda p: (slice_number(p) is None, slice_number(p) or 0, p.name))


def group_volumes(
    files: list[AnyPath], folders: Collection[PurePath] = ()
) -> list[tuple[str, list[AnyPath]]]:
    """Each volume's name (the patient's, or the file's) and slices in numeric order. Training, prediction and
    the pages normalise the slices of a volume together.

    folders: the inputs that were given as folders. The slices in such a folder belong to one patient, unless
    names with the same numbers (`a_1`, `b_1`) show that there are several. Elsewhere slices of one name in
    one folder form a volume, and a file without a slice number is a volume of its own. Raises MedFLError if a
    slice occurs twice.
    """
    places: defaultdict[PurePath, list[AnyPath]] = defaultdict(list)
    for file in files:
        places[file.parent].append(file)
    volumes: list[tuple[str, list[AnyPath]]] = []
    for folder, inside in places.items():
        _refuse_copies(inside)
        whole = folder in folders and not _share_numbers(inside)
        volumes += [(folder.name or volume_name(inside[0]), inside)] if whole else _by_name(inside)
    for _, slices in volumes:
        _refuse_doubles(slices)
    return [(name, numeric_order(slices)) for name, slices in volumes]


def _share_numbers(files: list[AnyPath]) -> bool:
    """Whether several names have the same slice number."""
    names: dict[int | None, str] = {}
    numbered = [file for file in files if slice_number(file) is not None]
    return any(
        names.setdefault(slice_number(file), volume_name(file)) != volume_name(file) for file in numbered
    )


def _by_name(files: list[AnyPath]) -> list[tuple[str, list[AnyPath]]]:
    volumes: defaultdict[tuple, list[AnyPath]] = defaultdict(list)
    for file in files:
        alone = slice_number(file) is None
        volumes[(volume_name(file), alone and file.suffix)].append(file)
    return [(name, slices) for (name, _), slices in volumes.items()]


def _refuse_copies(files: list[AnyPath]) -> None:
    """Raises MedFLError if a file's name is that of a copy of another file."""
    by_stem = {file.stem: file for file in files}
    for file in files:
        original = by_stem.get(COPY.sub("", file.stem), file)
        if original is not file and original.stem != file.stem:
            raise MedFLError(f"{original} and {file.name} are the same slice twice; remove one of them")


def _refuse_doubles(slices: list[AnyPath]) -> None:
    """Raises MedFLError if two files are one slice of a volume: one name in two formats, or one number."""
    known: dict[tuple, AnyPath] = {}
    for file in sorted(slices):
        number = slice_number(file)
        slice_ = (volume_name(file), number) if number is not None else (file.stem,)
        if known.setdefault(slice_, file) != file:
            raise MedFLError(f"{known[slice_]} and {file.name} are the same slice twice; remove one of them")
