"""NIfTI volumes of a study: found, read, and their labels told.

    DIR/PATIENT/flair.nii.gz, t1.nii.gz, t1ce.nii.gz, seg.nii.gz
    DIR/PATIENT/STUDY/...                                            a folder more for each study

All volumes of a study lie in one folder.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from common import MedFLError
from limits import fits
from radiology.geometry import on_grid
from radiology.series import Refused, Series

SUFFIXES = (".nii", ".nii.gz")


def find_volumes(root: Path, paths: Iterable[Path]) -> tuple[list[Series], list[Refused]]:
    """The volumes among these files below `root`, as series whose patient and study are folders, and the
    files that are none.

    Reads headers only. A series' description is the file's name without its ending.
    """
    found, refused = [], []
    for path in paths:
        folders = path.relative_to(root).parent.parts
        if not path.name.lower().endswith(SUFFIXES):
            refused.append(Refused(path, "no NIfTI file (.nii or .nii.gz)"))
        elif not folders:
            refused.append(Refused(path, "lies in no patient's folder; make a folder per patient"))
        else:
            try:
                found.append(_describe(path, folders))
            except MedFLError as error:
                refused.append(Refused(path, str(error)))
    return found, refused


def _describe(path: Path, folders: tuple[str, ...]) -> Series:
    """A file's header as a series. Raises MedFLError for what is no readable volume."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NiftiImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise MedFLError("damaged, or no NIfTI file; export it again") from error
    problems, size = [], reader.GetSize()
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        problems.append(
            f"it has {reader.GetDimension()} dimensions and {reader.GetNumberOfComponents()} values a pixel, "
            "and a volume has 3 and 1; split it"
        )
    elif not fits(size[::-1]):
        problems.append(
            f"it has {'×'.join(map(str, size))} voxels, more than is read at once; make it smaller"
        )
    columns, rows, slices = (*size, 1)[:3]
    column, row, between = (*reader.GetSpacing(), 1.0)[:3]
    return Series(
        uid=str(path),
        study_uid="/".join(folders),
        patient_id=folders[0],
        modality="NIfTI",
        description=path.name[: path.name.lower().index(".nii")],
        files=(path,),
        frames=tuple(range(slices)),
        rows=rows,
        columns=columns,
        spacing=(between, row, column),
        problems=tuple(problems),
    )


def load_volume(series: Series) -> sitk.Image:
    """A volume's pixels with their place, float32. Raises MedFLError for a damaged file and for pixels that
    are not finite."""
    if series.problems:
        raise MedFLError(f"{series.files[0]} can't be used: {'; '.join(series.problems)}")
    try:
        image = sitk.ReadImage(str(series.files[0]), sitk.sitkFloat32, imageIO="NiftiImageIO")
    except RuntimeError as error:
        raise MedFLError(
            f"{series.files[0]} can't be read (truncated or damaged); export it again"
        ) from error
    if not np.isfinite(sitk.GetArrayViewFromImage(image)).all():
        raise MedFLError(f"{series.files[0]} holds values that are no numbers; export it again")
    return image


def read_labels(
    series: Series, labels: tuple[int, ...], references: list[sitk.Image]
) -> tuple[sitk.Image, int]:
    """A label file's tumour, uint8 0 or 1, and the place of the reference on whose grid it lies.

    labels: the values that mean tumour. Raises MedFLError for other values, an empty file, and another
    geometry.
    """
    path, image = series.files[0], load_volume(series)
    values = sitk.GetArrayViewFromImage(image)
    present = np.unique(values)
    if unknown := [f"{v:g}" for v in present if v != 0 and v not in labels]:
        raise MedFLError(
            f"{path.name} holds the values {', '.join(unknown[:5])}, and tumour is "
            f"{', '.join(map(str, labels))}; name those that mean tumour in the rules (mask, labels)"
        )
    if not present.any():
        raise MedFLError(f"{path.name} is empty: no voxel is marked as tumour")
    for place, reference in enumerate(references):
        if image.GetSize() == reference.GetSize() and on_grid(image, reference):
            return sitk.Cast(image != 0, sitk.sitkUInt8), place
    raise MedFLError(
        f"{path.name} has another geometry than the volumes beside it; draw or export the mask on one of them"
    )
