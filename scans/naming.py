"""What the names of files say: which is a slice and which a mask, a slice's number, and which slices are one volume."""

import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import PurePath
from typing import TypeVar

from common import MedFLError

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MASK_SUFFIX = "_mask"  # ends a mask's name, after its slice's, where nothing else is said
NUMBER = re.compile(r"[_\-. (]*(?<!\d)(\d{1,18})\)?$")  # of a slice, at the end of its name
COPY = re.compile(  # what file managers and shares append to a copy's name; of ` (1)` nobody can tell
    r" (?:(?:- )?(?:copy|copie|copia|kopie)(?: ?\(?\d+\)?)?|\(.*(?:conflict|konflikt).*\))$", re.IGNORECASE
)
KIND_OF_SCAN = re.compile(r"(?:^|[^a-z])t[12]$", re.IGNORECASE)
AnyPath = TypeVar("AnyPath", bound=PurePath)  # on disk, or the name of a file in memory


def is_image(path: PurePath, mask_suffix: str = MASK_SUFFIX) -> bool:
    """Whether a file's name is that of a slice: an image suffix, not a mask, no contact sheet of prepared
    data, not hidden."""
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
    """What a mask's name says of its slice's name (`p_1` of `p_1_mask.png`), or None where it is no mask's.
    What browsers and file managers append to a copy (` (1)`, ` - Copy`, in any language) is part of no name."""
    found = re.match(rf"(.*){re.escape(mask_suffix)}(?:[ (].*)?$", path.stem, re.IGNORECASE | re.DOTALL)
    return found[1] if found else None


def slice_number(path: PurePath) -> int | None:
    """The number that ends a slice's name (12 of `TCGA_CS_4941_19960909_12.tif`, 7 of `slice007.png` and of
    `scan (7).png`), or None where there is none. `t1` and `t2` are kinds of scans and no numbers."""
    found = NUMBER.search(path.stem)
    return int(found[1]) if found and not KIND_OF_SCAN.search(path.stem) else None


def volume_name(path: PurePath) -> str:
    """The name that the slices of one volume share: the file's name without the slice number."""
    if slice_number(path) is None:
        return path.stem
    return NUMBER.sub("", path.stem) or path.parent.name


def numeric_order(paths: list[AnyPath]) -> list[AnyPath]:
    """Slices of one volume by their number (2 before 10), those without one last, by name."""
    return sorted(paths, key=lambda p: (slice_number(p) is None, slice_number(p) or 0, p.name))


def group_volumes(
    files: list[AnyPath], folders: Collection[PurePath] = ()
) -> list[tuple[str, list[AnyPath]]]:
    """Each volume's name (the patient's, or the file's) and slices in numeric order: what is normalised
    together in training, in prediction and on the pages.

    folders: those that were given as folders. The slices in one of them are one patient's, unless names with
    the same numbers (`a_1`, `b_1`) tell of several. Elsewhere slices of one name in one folder form a volume,
    and a file without a slice number is a volume of its own. Raises MedFLError for one slice that is there
    twice.
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
    """Whether one slice number stands behind several names."""
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
    """Raises MedFLError where a file's name is that of another one's copy."""
    by_stem = {file.stem: file for file in files}
    for file in files:
        original = by_stem.get(COPY.sub("", file.stem), file)
        if original is not file and original.stem != file.stem:
            raise MedFLError(f"{original} and {file.name} are the same slice twice; take one of them away")


def _refuse_doubles(slices: list[AnyPath]) -> None:
    """Raises MedFLError where two files are one slice of a volume: one name in two formats, or one number."""
    known: dict[tuple, AnyPath] = {}
    for file in sorted(slices):
        number = slice_number(file)
        slice_ = (volume_name(file), number) if number is not None else (file.stem,)
        if known.setdefault(slice_, file) != file:
            raise MedFLError(
                f"{known[slice_]} and {file.name} are the same slice twice; take one of them away"
            )
