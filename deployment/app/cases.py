"""From uploaded files to a case: slices in order, their truth if it was uploaded too, and the pixel spacing.

Everything stays in memory; nothing is written to disk.
"""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from types import ModuleType

import numpy as np

from borders.limits import MAX_PIXELS
from common import MedFLError, counted
from deployment.app.archives import check_lengths, check_names, check_number, unpack_zip
from deployment.app.case import LONE_SLICE, MIN_SIDE, Case, short
from deployment.app.nifti import read_nifti, read_nifti_mask
from scans.naming import IMAGE_SUFFIXES, group_volumes, is_mask, masked_stem, slice_number, volume_name
from scans.nifti_file import SUFFIXES as NIFTI
from scans.nifti_file import other_format
from scans.pairing import pair
from scans.pictures import picture_size, read_classes, read_mask_and_form, read_slice
from scans.spacing import NAME, read_spacing
from tasks import LGG, Task

DICOM = (".dcm", ".dicom", ".ima")  # or any other name, if the content is DICOM
ONES = "{masks} with 1, or a palette, instead of 255: 1 is read as 255."
# offered by the page's upload
KINDS = ["tif", "tiff", "png", "jpg", "jpeg", "zip", "nii", "gz", "nrrd", "json"]


def read_case(files: list[tuple[str, bytes]], task: Task = LGG) -> Case:
    """The case made of uploaded files, (name, content): slices, DICOM, one ZIP of either, or a NIfTI file. task: the
    model's, whose classes pictures of masks may name.

    Raises MedFLError, in one sentence, for everything else.
    """
    files = [(name.replace("\\", "/"), content) for name, content in files]
    archives = [name for name, _ in files if name.lower().endswith(".zip")]
    if archives:
        if len(files) > 1:
            raise MedFLError(f"{short(archives[0])} came with other files; upload a ZIP by itself")
        files = unpack_zip(*files[0])
    check_number(len(files))
    check_lengths(name for name, _ in files)
    if any(_is_dicom(*file) for file in files):  # whose names say nothing about their kind
        return _dicom().read_dicom(files)
    check_names(name for name, _ in files)
    if any(name.lower().endswith(NIFTI) for name, _ in files):
        return read_nifti(files)
    if others := [(name, told) for name, _ in files if (told := other_format(name))]:
        raise MedFLError(f"{short(others[0][0])} {others[0][1]}")
    return _read_slices(dict(files), bool(archives), task)


def _is_dicom(name: str, content: bytes) -> bool:
    return name.lower().endswith(DICOM) or content[128:132] == b"DICM"


def _dicom() -> ModuleType:
    """The module that reads DICOM, which is optional. Raises MedFLError if its requirements are not
    installed, or if this page must not take DICOM."""
    try:
        from deployment.app import dicom
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("radiology"):  # left out of a Space
            raise MedFLError(
                "DICOM files contain the patient's name, so this published page does not accept them; run "
                "the page on your own machine, or upload slices or NIfTI"
            ) from error
        raise MedFLError(
            f"DICOM files need {error.name}; install it (`pip install -r requirements-dicom.txt`), or upload "
            "slices or NIfTI"
        ) from error
    return dicom


def _read_slices(files: dict[str, bytes], archive: bool, task: Task) -> Case:
    """A case of TIFF, PNG and JPEG slices, with masks and a prepared patient's `volume.json` among them.

    archive: whether the files came in a ZIP, which counts as a folder, like a folder in the files' names.
    """
    paths = {PurePosixPath(name): content for name, content in files.items()}
    pairing = pair(paths)
    images, masks = pairing.images, pairing.masks
    if not images:
        raise MedFLError(
            f"there is no slice in the upload (TIFF, PNG or JPEG, not a _mask file){_instead(paths)}; "
            "choose other files"
        )
    folders = {path.parent for path in images if archive or path.parent.name}
    volumes = group_volumes(images, folders)
    together = slice_number(volumes[0][1][0]) is not None or len(folders) > 0
    if len(volumes) > 1:
        _refuse_several(volumes, folders)
    order = [path for _, slices in volumes for path in slices]
    _check_sizes(order, [picture_size(path, paths[path]) for path in order])
    pixels = [read_slice(path, paths[path]) for path in order]
    known = [masks.get(path) for path in order]
    names = {volume_name(path) for path in order}
    case = Case(
        name=names.pop() if len(names) == 1 else order[0].parent.name or order[0].stem,
        slices=[path.name for path in order],
        volume=np.stack(pixels),
        groups=np.zeros(len(order), int) if together else np.arange(len(order)),
        numbers=task.numbers,
    )
    if any(known):
        case.truth = _read_masks(
            case, order, [None if mask is None else (mask, paths[mask]) for mask in known]
        )
    if not case.is_volume:
        case.notes.append(LONE_SLICE)
    if spare := len(pairing.alone):
        belong = "belongs" if spare == 1 else "belong"
        case.notes.append(f"{counted(spare, 'mask')} {belong} to no slice of the upload (ignored).")
    told = [path for path in paths if path.name == NAME]
    if len(told) > 1:
        raise MedFLError(
            f"{len(told)} files are called {NAME}, but a patient has one; open one patient at a time"
        )
    if told:
        between, rows, columns = read_spacing(told[0], len(order), paths[told[0]])
        case.spacing, case.measured = (rows, columns, between), True
        case.oriented = (
            True  # written by data/prepare_hospital.py, which refuses scans of unknown orientation
        )
    if left := len(paths) - len(images) - len(masks) - len(pairing.alone) - len(told):
        case.notes.append(f"{counted(left, 'file')} ignored: neither slice nor mask.")
    return case


def _instead(paths: Iterable[PurePosixPath]) -> str:
    """A text about an upload without slices, to be appended to a sentence."""
    names = sorted(paths)
    if any(path.suffix.lower() == ".zip" for path in names):
        return ": a ZIP in a ZIP is not unpacked"
    if any(is_mask(path) for path in names):
        return ": masks are only shown with their slices"
    return f": {short(names[0].name)} is of another kind" if names else ""


def _shown(name: str) -> str:
    """A path's last folder and name, shortened if it is very long."""
    *_, folder, last = ["", *name.split("/")]
    return f"{folder[:20]}/{short(last)}" if folder else short(last)


def _refuse_several(volumes: list[tuple[str, list[PurePosixPath]]], folders: set[PurePosixPath]) -> None:
    """Raises MedFLError if the volumes belong to several patients and are not single slices to be looked at
    side by side."""
    numbered = [slices[0] for _, slices in volumes if slice_number(slices[0]) is not None]
    if len(numbered) > 1 or len(folders) > 1:
        names = sorted(str(slices[0].parent / volume_name(slices[0])) for _, slices in volumes)
        raise MedFLError(
            f"these are slices of {len(volumes)} patients ({', '.join(map(_shown, names[:3]))}); open one at a "
            "time; masks have the slice's name with _mask at its end"
        )
    if numbered:
        odd = next(slices[0] for _, slices in volumes if slice_number(slices[0]) is None)
        raise MedFLError(
            f"{short(odd.name)} has no slice number at the end of its name, but others have; open it by "
            "itself, or the patient's folder as a ZIP"
        )


def _check_sizes(order: list[PurePosixPath], sizes: list[tuple[int, int]]) -> None:
    """Raises MedFLError if slices can't be one case, by the columns and rows in their headers."""
    columns, rows = sizes[0]
    if min(rows, columns) < MIN_SIDE:
        raise MedFLError(
            f"{short(order[0].name)} is {columns}×{rows} pixels, too small for a slice; choose another file"
        )
    for path, size in zip(order, sizes):
        if size != sizes[0]:
            raise MedFLError(
                f"{short(path.name)} is {size[0]}×{size[1]} pixels, but {short(order[0].name)} is "
                f"{columns}×{rows}; open slices of one size together"
            )
    if len(sizes) * rows * columns > MAX_PIXELS:
        raise MedFLError(
            f"{len(sizes)} slices of {columns}×{rows} pixels are more than this page can hold; open fewer "
            f"slices"
        )


def _one_each(masks: list[tuple[str, PurePosixPath]]) -> dict[str, PurePosixPath]:
    """Masks by the name of their slice. Raises MedFLError if two belong to one slice."""
    found: dict[str, PurePosixPath] = {}
    for name, path in masks:
        if name in found:
            raise MedFLError(
                f"{short(found[name].name)} and {short(path.name)} are masks of one slice, so it is not "
                "clear which one counts; leave one out"
            )
        found[name] = path
    return found


def _read_masks(
    case: Case, order: list[PurePosixPath], masks: Sequence[tuple[PurePosixPath, bytes] | None]
) -> np.ndarray:
    """The truth of each slice, (S, H, W) uint8, and a note if masks hold 1 instead of 255. Raises MedFLError
    if a mask is missing or has another size."""
    truth, other_forms, shape = [], 0, case.volume.shape
    for path, mask in zip(order, masks):
        if mask is None:
            raise MedFLError(
                f"{short(path.name)} has no mask, but other slices have; add {short(path.stem)}_mask, or "
                "leave out all masks"
            )
        try:
            pixels, other = read_mask_and_form(*mask)
        except MedFLError:
            if not case.numbers:
                raise
            name, content = mask
            inside = read_classes(name, case.numbers, content) > 0
            pixels, other = np.where(inside, np.uint8(255), np.uint8(0)), True
        other_forms += other and not case.numbers  # where 1 is a class
        if pixels.shape != shape[1:3]:
            raise MedFLError(
                f"{short(mask[0].name)} is {pixels.shape[1]}×{pixels.shape[0]} pixels, but its slice is "
                f"{shape[2]}×{shape[1]}; choose masks of the slices' size"
            )
        truth.append(pixels)
    if other_forms:
        case.notes.append(ONES.format(masks=counted(other_forms, "mask")))
    return np.stack(truth)


def add_truth(case: Case, files: list[tuple[str, bytes]]) -> np.ndarray:
    """The truth, (S, H, W) uint8, from masks that are uploaded for an open case. A mask belongs to the slice
    with its name without `_mask`; for a single slice any one mask is accepted. Raises MedFLError if they
    don't match."""
    check_number(len(files))
    given = [(PurePosixPath(name.replace("\\", "/")), content) for name, content in files]
    check_lengths(str(path) for path, _ in given)
    if len(given) == 1:
        path, content = given[0]
        if case.dicom is not None and path.suffix.lower() not in IMAGE_SUFFIXES:
            return _dicom().read_dicom_mask(case.dicom, str(path), content)
        if str(path).lower().endswith(NIFTI):
            return read_nifti_mask(case, str(path), content)
    order = [PurePosixPath(name) for name in case.slices]
    if len(order) == len(given) == 1:
        return _read_masks(case, order, given)
    named = [
        (name, path)
        for path, _ in given
        if (name := (masked_stem(path) or path.stem).lower()) in {path.stem.lower() for path in order}
    ]
    if not named:
        raise MedFLError(
            "no mask has the name of a slice with _mask at its end; rename the masks, or choose others"
        )
    check_names(str(path) for path, _ in given)
    masks, contents = _one_each(named), dict(given)
    chosen = [masks.get(path.stem.lower()) for path in order]
    return _read_masks(case, order, [None if path is None else (path, contents[path]) for path in chosen])
