"""Volumes of a study as NIfTI (or NRRD) files: found, read, and their labels checked.

    DIR/PATIENT/flair.nii.gz, t1.nii.gz, t1ce.nii.gz, seg.nii.gz
    DIR/PATIENT/STUDY/...                                            a further folder for each study
    DIR/derivatives/TOOL/PATIENT/...                                 BIDS: the same patients as in the raw tree
    DIR/images/PATIENT/... and DIR/labels/PATIENT/...                trees of scans and masks
    DIR/dataset.json, imagesTr, labelsTr, imagesTs                   nnU-Net and Decathlon (collection.py)

All volumes of a study lie in one folder, or at the same place of a `derivatives` tree. The JSON file that
dcm2niix writes beside a volume is read.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np
import SimpleITK as sitk

from borders.limits import fits, is_size_mm, read_json_file
from common import MedFLError
from radiology.collection import IMAGES, LABELS, NAME, Collection, collection_in, trees_in
from radiology.geometry import on_grid
from radiology.series import Refused, Series
from scans import nifti_file
from scans.folders import as_text
from scans.nifti_file import NRRD, SUFFIXES, WHOLE
from scans.orientation import mirrored

DERIVATIVES = "derivatives"
MASK = "seg"  # a name that the rules recognise as a mask
KINDS_OF_SCAN = ("anat",)  # BIDS folders that name the kind of scan, not a patient or a session


def find_volumes(root: Path, paths: Iterable[Path]) -> tuple[list[Series], list[Refused]]:
    """The volumes among these files below `root`, as series whose patient and study are folders, and the files that
    are not volumes.

    Only headers are read. The description of a series is the file's name without its ending.
    """
    found: list[Series] = []
    refused: list[Refused] = []
    collection, trees = collection_in(root), trees_in(root)
    for path in paths:
        if path == root / NAME:
            continue
        folders = _of_patient(root, path.relative_to(root).parent.parts, trees)
        if path.suffix.lower() == ".json" and _has_volume(path):
            continue
        if not path.name.lower().endswith(SUFFIXES):
            told = nifti_file.other_format(path.name) or "not a NIfTI file (.nii or .nii.gz)"
            refused.append(Refused(path, told))
        elif not folders:
            refused.append(Refused(path, "is not in a patient's folder; make a folder per patient"))
        else:
            try:
                found += _describe(root, path, folders, collection, trees)
            except MedFLError as error:
                refused.append(Refused(path, str(error)))
    return found, refused


def _of_patient(root: Path, folders: tuple[str, ...], trees: set[str]) -> tuple[str, ...]:
    """The folders that name patient and study. In a `derivatives` tree they have the names of the raw tree's."""
    if DERIVATIVES in folders:
        folders = folders[folders.index(DERIVATIVES) + 1 :]
        known = [k for k, name in enumerate(folders) if (root / name).is_dir() and name != DERIVATIVES]
        folders = folders[known[0] if known else 1 :]
    if len(folders) > 1 and folders[0] in trees:
        folders = folders[1:]  # images/anna and labels/anna belong to one patient
    return folders[:-1] if len(folders) > 1 and _is_of_one_scan(folders[-1]) else folders


def _is_of_one_scan(folder: str) -> bool:
    """Whether a folder below a patient's names the scan, not the study: BIDS folders, and those that unpackers make
    for a file (`anna/anna_t1.nii/0001_t1.nii`)."""
    return folder in KINDS_OF_SCAN or folder.lower().endswith(SUFFIXES)


def _has_volume(path: Path) -> bool:
    return any((path.parent / f"{path.stem}{suffix}").exists() for suffix in SUFFIXES)


def _describe(
    root: Path, path: Path, folders: tuple[str, ...], collection: Collection | None, trees: set[str]
) -> list[Series]:
    """A file's header as a series, or one series for each channel of a collection's file. Raises MedFLError for a
    file that is not a readable volume, and for a file in a flat tree of images if nothing says what it shows."""
    header, name = _header(path), nifti_file.stem(path.name)
    shape = header.get_data_shape()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    first = path.relative_to(root).parts[0]
    tree, flat = first.lower() if first in trees else "", path.parent == root / first
    if flat and tree in IMAGES and collection:
        parts = collection.parts(path, math.prod(shape[3:]))
        return [_series(path, header, shape[:3], (p.case,), p.shows, p.volume) for p in parts]
    if flat and tree in IMAGES:
        raise MedFLError(
            f"lies in {path.parent.name} without a {NAME} that says what it shows; write one "
            '({"channel_names": {"0": "FLAIR"}, "labels": {"background": 0, "tumour": 1}}), or make a folder per '
            "patient"
        )
    if flat and tree in LABELS:
        return [_series(path, header, shape, (name,), MASK)]
    return [_series(path, header, shape, folders, f"{name} {MASK}" if tree in LABELS else name)]


def _series(
    path: Path,
    header: Any,
    shape: tuple[int, ...],
    folders: tuple[str, ...],
    description: str,
    volume: int | None = None,
) -> Series:
    """A volume of this shape as a series."""
    dtype, problems = header.get_data_dtype(), []
    values = len(dtype.names or (1,))
    if len(shape) != 3 or values != 1:
        problems.append(
            f"it has {len(shape)} dimensions and {values} values per pixel, but a volume has 3 and 1; split "
            "it"
        )
    elif not fits(shape[::-1]):
        problems.append(
            f"it has {'×'.join(map(str, shape))} voxels, more than can be read at once; make it smaller"
        )
    if dtype.kind == "c":
        problems.append("it holds complex numbers, but a scan has real ones; export its magnitude")
    if why := nifti_file.doubt(header):
        problems.append(f"it {why}: left and right can't be told apart; convert the scan's DICOM files again")
    if why := nifti_file.unlike_sizes(header):
        problems.append(f"it {why}; convert the scan's DICOM files again")
    columns, rows, slices = (*shape, 1, 1)[:3]
    column, row, between = (*map(float, header.get_zooms()[:3]), 1.0, 1.0)[:3]
    if not all(map(is_size_mm, (between, row, column))):
        problems.append(
            f"it says that voxels measure {column:g} × {row:g} × {between:g} mm, which can't be right; "
            "convert it again"
        )
    return Series(
        uid=str(path) if volume is None else f"{path}#{volume}",
        study_uid="/".join(map(as_text, folders)),
        patient_id=as_text(folders[0]),
        modality="NIfTI",
        description=description,
        files=(path,),
        frames=tuple(range(slices)),
        rows=rows,
        columns=columns,
        spacing=(between, row, column),
        problems=tuple(problems),
        volume=volume,
        **_told_beside(path),
    )


def _header(path: Path) -> Any:
    """nibabel's header of a file. Raises MedFLError for a file that is not a volume."""
    try:
        with path.open("rb") as file:
            head = nifti_file.read_head(file)
        if head[:4] == NRRD:
            return nifti_file.read_image(nifti_file.read_content(path)).header
        return nifti_file.read_header(head)
    except MedFLError as error:
        raise MedFLError(f"damaged, or not a NIfTI file: it {error}") from error
    except OSError as error:
        raise MedFLError(f"can't be read ({error.strerror or error}); check its permissions") from error


def _told_beside(path: Path) -> dict:
    """The fields of a Series from the JSON file that dcm2niix writes beside a volume, with seconds converted to ms.
    Empty if there is no such file."""
    beside = path.parent / f"{nifti_file.stem(path.name)}.json"
    try:
        told = read_json_file(beside)
    except (OSError, ValueError):
        return {}
    if not isinstance(told, dict):
        return {}

    def number(name: str, factor: float = 1.0) -> float | None:
        value = told.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return value * factor

    def text(*names: str) -> str:
        return next((told[n].strip() for n in names if isinstance(told.get(n), str) and told[n].strip()), "")

    return {
        "protocol": text("SeriesDescription", "ProtocolName"),
        "contrast_agent": text("ContrastBolusAgent", "ContrastBolusIngredient"),
        "repetition_time": number("RepetitionTime", 1000),
        "echo_time": number("EchoTime", 1000),
        "inversion_time": number("InversionTime", 1000),
        "field_strength": number("MagneticFieldStrength"),
        "manufacturer": text("Manufacturer"),
        "model": text("ManufacturersModelName", "ManufacturerModelName"),
        # where dcm2niix was told to keep them (-ba n); the number is not always the folder's name
        "person": tuple(map(text, ("PatientName", "PatientBirthDate", "PatientSex", "PatientID"))),
    }


def load_volume(series: Series) -> sitk.Image:
    """A volume's voxels with their geometry, float32, in the stored order.

    Raises MedFLError for a truncated or damaged file, one of unknown orientation, and one without a finite value.
    """
    return load_counted(series)[0]


def load_counted(series: Series) -> tuple[sitk.Image, int]:
    """The same as `load_volume`, and the number of values that were not finite: they are replaced by background."""
    path = series.files[0]
    if series.problems:
        raise MedFLError(f"{path} can't be used: {'; '.join(series.problems)}")
    try:
        image = nifti_file.read_image(nifti_file.read_content(cast(Path, path)))  # no volume is in memory
        values = np.asarray(image.dataobj)
        if series.volume is not None:
            values = values[..., series.volume]
        values, odd = nifti_file.finite(values)
    except MedFLError as error:
        raise MedFLError(f"{path} {error}") from error
    return _placed(image, values.reshape(values.shape[:3])), odd


def _placed(image: nibabel.Nifti1Image, values: np.ndarray) -> sitk.Image:
    """Stored values (I, J, K) with the geometry from the file."""
    affine = mirrored(image.affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    placed = sitk.GetImageFromArray(values.transpose(2, 1, 0).astype(np.float32))
    placed.SetSpacing(spacing.tolist())
    placed.SetOrigin(affine[:3, 3].tolist())
    placed.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return placed


def read_labels(
    series: Series, labels: tuple[int, ...], references: list[sitk.Image]
) -> tuple[sitk.Image, int]:
    """The tumour of a label file, uint8 0 or 1, and the index of the reference on whose grid it lies.

    labels: the values that mean tumour. references: images from `load_volume`. Raises MedFLError for other values,
    an empty file, and a geometry that fits no reference.
    """
    path, (image, odd) = series.files[0], load_counted(series)
    if odd:
        raise MedFLError(f"{path.name} holds {odd:,} values that are not numbers; export it again")
    values = sitk.GetArrayViewFromImage(image)
    present = np.unique(values)
    whole = present.round()
    if unknown := [f"{v:g}" for v, n in zip(present, whole) if abs(v - n) > WHOLE or n not in (0, *labels)]:
        raise MedFLError(
            f"{path.name} holds the values {', '.join(unknown[:5])}, but tumour is "
            f"{', '.join(map(str, labels))}; list those that mean tumour in the rules (mask, labels)"
        )
    if not whole.any():
        raise MedFLError(f"{path.name} is empty: no voxel is marked as tumour")
    tumour = sitk.Cast(image > 0.5, sitk.sitkUInt8)
    cropped = path.name.lower().endswith(".nrrd")  # Slicer stores only the segmentation's bounding box
    for place, reference in enumerate(references):
        if (cropped or image.GetSize() == reference.GetSize()) and on_grid(image, reference):
            if not cropped:
                return tumour, place
            nearest = sitk.sitkNearestNeighbor
            return sitk.Resample(tumour, reference, sitk.Transform(), nearest, 0, sitk.sitkUInt8), place
    raise MedFLError(
        f"{path.name} has a different geometry from the volumes beside it; draw or export the mask on one "
        "of them"
    )
