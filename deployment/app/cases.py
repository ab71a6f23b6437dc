"""From what a user uploads to a case: slices in order, their truth if it came along, and the space between
pixels.

Everything stays in memory; nothing is written to disk.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from types import ModuleType

import numpy as np

from common import MedFLError, counted
from deployment.app.archives import check_names, check_number, unpack_zip
from deployment.app.case import LONE_SLICE, MIN_SIDE, Case, short
from deployment.app.nifti import read_nifti, read_nifti_mask
from limits import MAX_PIXELS
from preprocessing import (
    IMAGE_SUFFIXES,
    group_volumes,
    is_image,
    is_mask,
    picture_size,
    read_mask,
    read_slice,
    slice_number,
)
from spacing import NAME, read_spacing

NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".dicom", ".ima")  # or any other name, where the content says so
KINDS = ["tif", "tiff", "png", "jpg", "jpeg", "zip", "nii", "gz", "json"]  # that the page's upload offers


def read_case(files: list[tuple[str, bytes]]) -> Case:
    """The case that (name, content) of uploaded files make: slices, DICOM, one ZIP of either, or a NIfTI
    file.

    Raises MedFLError, in one sentence, for everything else.
    """
    files = [(name.replace("\\", "/"), content) for name, content in files]
    archives = [name for name, _ in files if name.lower().endswith(".zip")]
    if archives:
        if len(files) > 1:
            raise MedFLError(f"{short(archives[0])} came with other files; upload a ZIP by itself")
        files = unpack_zip(*files[0])
    check_number(len(files))
    if any(_is_dicom(*file) for file in files):  # whose names say nothing
        return _dicom().read_dicom(files)
    check_names(name for name, _ in files)
    if any(name.lower().endswith(NIFTI) for name, _ in files):
        return read_nifti(files)
    return _read_slices(dict(files))


def _is_dicom(name: str, content: bytes) -> bool:
    return name.lower().endswith(DICOM) or content[128:132] == b"DICM"


def _dicom() -> ModuleType:
    """The module that reads DICOM, which is optional. Raises MedFLError where what it needs is not installed,
    or not here."""
    try:
        from deployment.app import dicom
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("radiology"):  # left out of a Space
            raise MedFLError(
                "DICOM files carry the patient's name, so this published page takes none; run the page on a "
                "machine of your own, or upload slices or NIfTI"
            ) from error
        raise MedFLError(
            f"DICOM files need {error.name}; install it (`pip install -r requirements-dicom.txt`), or upload "
            "slices or NIfTI"
        ) from error
    return dicom


def _read_slices(files: dict[str, bytes]) -> Case:
    """A case of TIFF, PNG and JPEG slices, with masks and a prepared patient's `volume.json` among them."""
    paths = {PurePosixPath(name): content for name, content in files.items()}
    images = [path for path in paths if is_image(path)]
    if not images:
        raise MedFLError(
            "there is no slice in the upload (TIFF, PNG or JPEG, not a _mask file); choose other files"
        )
    masks = _one_each([(str(p.parent / p.stem[: -len("_mask")]), p) for p in paths if is_mask(p)])
    volumes = group_volumes(images)
    numbered = {name for name, slices in volumes if slice_number(slices[0]) is not None}
    if len([v for v in volumes if slice_number(v[1][0]) is not None]) > 1:
        raise MedFLError(
            f"these are slices of {len(numbered)} patients ({', '.join(map(short, sorted(numbered)[:3]))}); "
            "open one at a time"
        )
    if numbered and len(volumes) > 1:
        odd = next(slices[0] for _, slices in volumes if slice_number(slices[0]) is None)
        raise MedFLError(
            f"{short(odd.name)} has no slice number at its end and others have; open it by itself"
        )
    order = [path for _, slices in volumes for path in slices]
    for one, other in pairwise(order):
        if slice_number(one) is not None and slice_number(one) == slice_number(other):
            raise MedFLError(
                f"{short(one.name)} and {short(other.name)} have one slice number, and which one counts can't "
                f"be told; leave one out"
            )
    _check_sizes(order, [picture_size(path, paths[path]) for path in order])
    pixels = [read_slice(path, paths[path]) for path in order]
    known = [masks.get(str(path.with_suffix(""))) for path in order]
    case = Case(
        name=next(iter(numbered), order[0].stem),
        slices=[path.name for path in order],
        volume=np.stack(pixels),
        groups=np.zeros(len(order), int) if numbered else np.arange(len(order)),
    )
    if any(known):
        case.truth = _read_masks(
            order, [None if mask is None else (mask, paths[mask]) for mask in known], case.volume.shape
        )
    if not case.is_volume:
        case.notes.append(LONE_SLICE)
    if spare := len(masks) - sum(mask is not None for mask in known):
        belong = "belongs" if spare == 1 else "belong"
        case.notes.append(f"{counted(spare, 'mask')} {belong} to no slice of the upload. Ignored.")
    told = [path for path in paths if path.name == NAME]
    if len(told) > 1:
        raise MedFLError(
            f"{len(told)} files are called {NAME}, and a patient has one; open one patient at a time"
        )
    if told:
        between, rows, columns = read_spacing(told[0], len(order), paths[told[0]])
        case.spacing, case.measured = (rows, columns, between), True
    if left := len(paths) - len(images) - len(masks) - len(told):
        case.notes.append(f"{counted(left, 'file')} ignored: neither slice nor mask.")
    return case


def _check_sizes(order: list[PurePosixPath], sizes: list[tuple[int, int]]) -> None:
    """Raises MedFLError where slices, whose columns and rows their headers tell, can't be one case."""
    columns, rows = sizes[0]
    if min(rows, columns) < MIN_SIDE:
        raise MedFLError(
            f"{short(order[0].name)} is {columns}×{rows} pixels, too small for a slice; choose another file"
        )
    for path, size in zip(order, sizes):
        if size != sizes[0]:
            raise MedFLError(
                f"{short(path.name)} is {size[0]}×{size[1]} pixels and {short(order[0].name)} is "
                f"{columns}×{rows}; open slices of one size together"
            )
    if len(sizes) * rows * columns > MAX_PIXELS:
        raise MedFLError(
            f"{len(sizes)} slices of {columns}×{rows} pixels are more than this page can hold; open fewer "
            f"slices"
        )


def _one_each(masks: list[tuple[str, PurePosixPath]]) -> dict[str, PurePosixPath]:
    """Masks by the slice that each is of. Raises MedFLError where two are of one slice."""
    found: dict[str, PurePosixPath] = {}
    for name, path in masks:
        if name in found:
            raise MedFLError(
                f"{short(found[name].name)} and {short(path.name)} are masks of one slice, and which one "
                f"counts can't be told; leave one out"
            )
        found[name] = path
    return found


def _read_masks(
    order: list[PurePosixPath], masks: Sequence[tuple[PurePosixPath, bytes] | None], shape: tuple
) -> np.ndarray:
    """The truth of each slice, (S, H, W) uint8. Raises MedFLError where
    one is missing or has another size."""
    truth = []
    for path, mask in zip(order, masks):
        if mask is None:
            raise MedFLError(
                f"{short(path.name)} has no mask and other slices have; add {short(path.stem)}_mask, or "
                "leave all masks out"
            )
        pixels = read_mask(*mask)
        if pixels.shape != shape[1:3]:
            raise MedFLError(
                f"{short(mask[0].name)} is {pixels.shape[1]}×{pixels.shape[0]} pixels and its slice is "
                f"{shape[2]}×{shape[1]}; choose masks of the slices' size"
            )
        truth.append(pixels)
    return np.stack(truth)


def add_truth(case: Case, files: list[tuple[str, bytes]]) -> np.ndarray:
    """The truth, (S, H, W) uint8, that uploaded masks give for a case that is open. A mask belongs to the
    slice of its name without `_mask`; for a lone slice any one mask does. Raises MedFLError where they don't
    fit."""
    check_number(len(files))
    given = [(PurePosixPath(name.replace("\\", "/")), content) for name, content in files]
    if len(given) == 1:
        path, content = given[0]
        if case.dicom is not None and path.suffix.lower() not in IMAGE_SUFFIXES:
            return _dicom().read_dicom_mask(case.dicom, str(path), content)
        if str(path).lower().endswith(NIFTI):
            return read_nifti_mask(case, str(path), content)
    order = [PurePosixPath(name) for name in case.slices]
    if len(order) == len(given) == 1:
        return _read_masks(order, given, case.volume.shape)
    named = [(path.stem.lower().removesuffix("_mask"), path) for path, _ in given]
    if not {path.stem.lower() for path in order} & {name for name, _ in named}:
        raise MedFLError(
            "no mask has the name of a slice with _mask at its end; rename the masks, or choose others"
        )
    check_names(str(path) for path, _ in given)
    masks, contents = _one_each(named), dict(given)
    chosen = [masks.get(path.stem.lower()) for path in order]
    return _read_masks(
        order, [None if path is None else (path, contents[path]) for path in chosen], case.volume.shape
    )
