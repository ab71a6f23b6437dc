"""DICOM series in and masks out, through radiology/, which is optional here (requirements-dicom.txt).

Of a file's tags a case keeps what its mask as DICOM SEG needs, until it is closed; the page shows none but the geometry.
"""

import importlib.util
import io
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import SimpleITK as sitk

from cases import LONE_SLICE, MAX_PIXELS, MIN_SIDE, Case
from common import MedFLError
from preprocessing import CHANNELS
from radiology.geometry import register, resample, to_bytes
from radiology.rules import FLAIR, POST, PRE, load_rules, role_of
from radiology.segmentation import make_segmentation, read_segmentation
from radiology.series import Refused, Series, find_series, load_series

ACQUIRED = {"L": "sagittal", "R": "sagittal", "A": "coronal", "P": "coronal"}  # by the direction in which the slices follow


class Upload(io.BytesIO):
    """A file in memory that radiology/ reads as it reads one on disk."""

    def __init__(self, name: str, content: bytes):
        super().__init__(content)
        self.name = name.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.name

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self.getbuffer().nbytes)


@dataclass
class Source:
    """The series that a case's slices were made of, and how to get back onto its grid.

    series: FLAIR, its files in memory; grid: an empty image on it; margins: black rows above and black columns on the left
    that made the slices square, and the rows and columns in between.
    """

    series: Series
    grid: sitk.Image
    margins: tuple[int, int, int, int]


def read_dicom(files: list[tuple[str, bytes]]) -> Case:
    """The case of the DICOM files of one study: FLAIR, and pre- and post-contrast laid over it where they are there.

    One series alone is taken for FLAIR. Slices are axial, from feet to head, as the series has them or cut across it; a DICOM
    SEG of the FLAIR series becomes the truth. Raises MedFLError where no series can be used.
    """
    found, refused = find_series([Upload(name, content) for name, content in files])
    masks = [series for series in found if series.modality == "SEG"]
    scans = [series for series in found if series not in masks]
    usable = [series for series in scans if not series.problems]
    if not usable:
        raise MedFLError(f"the upload holds no series that can be used ({_reasons(scans, refused)}); export the FLAIR series anew")
    if len({(series.patient_id, series.study_uid) for series in usable}) > 1:
        raise MedFLError("the upload holds series of several studies; open one at a time")
    chosen = _choose(usable)
    flair = chosen[FLAIR]
    _check_size(flair.slices, flair.rows, flair.columns)
    image = _load(flair)
    oriented = sitk.DICOMOrient(image, "LPS")
    grid = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    grid.CopyInformation(image)
    source = Source(flair, grid, _margins(oriented))
    planes = {FLAIR: _onto_page(to_bytes(sitk.GetArrayViewFromImage(oriented)), source)}
    for channel in (PRE, POST):
        if channel in chosen:
            moved = _laid_over(chosen[channel], flair, oriented)
            planes[channel] = _onto_page(to_bytes(sitk.GetArrayViewFromImage(moved)), source)
    volume = np.stack([planes.get(channel, planes[FLAIR]) for channel in CHANNELS], axis=-1)
    _check_size(*volume.shape[:3])
    columns, rows, between = oriented.GetSpacing()
    case = Case(name="DICOM series", slices=[f"slice_{k + 1}" for k in range(len(volume))], volume=volume,
                groups=np.zeros(len(volume), int), spacing=(rows, columns, between), measured=True, dicom=source,
                notes=_notes(chosen, image, oriented, [s for s in scans if s not in chosen.values()], refused))
    own = [series for series in masks if flair.uid in series.references]
    if len(own) == 1:
        case.truth = read_dicom_mask(case, own[0].files[0].name, own[0].files[0].getvalue())
    elif masks:
        case.notes.append(f"{len(masks)} DICOM SEG were passed over: one that belongs to the FLAIR series becomes the truth.")
    return case


def _choose(usable: list[Series]) -> dict[str, Series]:
    """The series of each channel, FLAIR among them. Raises MedFLError where none can be told to be FLAIR."""
    if len(usable) == 1:
        return {FLAIR: usable[0]}
    rules, claims = load_rules(), {}
    for series in usable:
        claims.setdefault(role_of(series, rules)[0], []).append(series)
    claimed = len(claims.get(FLAIR, ()))
    if claimed != 1:
        raise MedFLError(f"{claimed or 'none'} of the upload's {len(usable)} series are FLAIR by what they say of themselves, and one "
                         "must be; upload the FLAIR series alone")
    return {channel: claims[channel][0] for channel in CHANNELS if len(claims.get(channel, ())) == 1}


def _reasons(series: list[Series], refused: list[Refused]) -> str:
    """Why series and files can't be used, each reason once."""
    told = [problem for one in series for problem in one.problems] + [f"{file.path} is {file.why}" for file in refused]
    return "; ".join(list(dict.fromkeys(told))[:3])


def _check_size(slices: int, rows: int, columns: int) -> None:
    if min(rows, columns) < MIN_SIDE or slices * rows * columns > MAX_PIXELS:
        raise MedFLError(f"the series has {slices} slices of {columns}×{rows} pixels, which this page can't hold; prepare it with "
                         "data/prepare_hospital.py and open the slices")


def _load(series: Series) -> sitk.Image:
    _rewind(series)
    return load_series(series)


def _rewind(series: Series) -> None:
    """What reads a file in memory begins where the last reader stopped."""
    for file in series.files:
        file.seek(0)


def _laid_over(series: Series, flair: Series, fixed: sitk.Image) -> sitk.Image:
    """Another series of the study, registered to FLAIR and on its grid."""
    moving = _load(series)
    same = bool(flair.frame_of_reference) and series.frame_of_reference == flair.frame_of_reference
    return resample(moving, fixed, register(moving, fixed, same))


def _margins(oriented: sitk.Image) -> tuple[int, int, int, int]:
    """The margins that make slices square in mm, as the slices were that the network learned from."""
    columns, rows = oriented.GetSize()[:2]
    across, down = oriented.GetSpacing()[:2]
    side = max(columns * across, rows * down)
    more_rows, more_columns = max(0, round(side / down) - rows), max(0, round(side / across) - columns)
    return more_rows // 2, more_columns // 2, more_rows - more_rows // 2, more_columns - more_columns // 2


def _notes(chosen: dict[str, Series], image: sitk.Image, oriented: sitk.Image, left: list[Series],
           refused: list[Refused]) -> list[str]:
    """What a reader should know about how the files were read."""
    notes = ["The mask as DICOM SEG carries the patient's name and number from the series, as a viewer needs them; the page shows "
             "neither, and no other download holds them."]
    if missing := [channel for channel in (PRE, POST) if channel not in chosen]:
        notes.append(f"There is no series for {' and '.join(missing)}: FLAIR stands in, as in the training set where one was "
                     "missing.")
    follows = _orientation(image)[2]
    if follows in ACQUIRED:
        across, down = oriented.GetSpacing()[:2]
        notes.append(f"The series was acquired {ACQUIRED[follows]}; its axial slices have pixels of {across:.1f} × {down:.1f} mm.")
    if image.GetSize()[2] == 1:
        notes.append(LONE_SLICE)
    if left:
        why = _reasons(left, []) or "not chosen for a channel by their descriptions"
        notes.append(f"{len(left)} series were passed over: {why}.")
    if refused:
        notes.append(f"{len(refused)} files were passed over: {_reasons([], refused[:1])}.")
    return notes


def _orientation(image: sitk.Image) -> str:
    """Where an image's columns, rows and slices lead to, a letter each, such as LPS."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())


def _onto_page(slices: np.ndarray, source: Source) -> np.ndarray:
    """Axial slices (S, H, W) with the source's margins."""
    above, left, below, right = source.margins
    return np.pad(slices, ((0, 0), (above, below), (left, right)))


def read_dicom_mask(case: Case, name: str, content: bytes) -> np.ndarray:
    """A mask of the case's shape from a DICOM SEG of its series, (S, H, W) uint8. Raises MedFLError for any other."""
    labels = sitk.DICOMOrient(read_segmentation(Upload(name, content), case.dicom.grid), "LPS")
    return _onto_page(sitk.GetArrayFromImage(labels), case.dicom) * np.uint8(255)


def on_series(case: Case, mask: np.ndarray) -> np.ndarray:
    """A mask (S, H, W) uint8 of the case on the source series' own slices, rows and columns, in its order, 1 where there is
    tumour."""
    above, left, below, right = case.dicom.margins
    inner = mask[:, above:mask.shape[1] - below, left:mask.shape[2] - right] > 0
    oriented = sitk.GetImageFromArray(inner.astype(np.uint8))
    oriented.CopyInformation(sitk.DICOMOrient(case.dicom.grid, "LPS"))
    return sitk.GetArrayFromImage(sitk.DICOMOrient(oriented, _orientation(case.dicom.grid)))


def write_segmentation(case: Case, mask: np.ndarray) -> bytes:
    """A mask of the case as DICOM SEG over its source series. Raises MedFLError for an empty one."""
    _rewind(case.dicom.series)
    file = io.BytesIO()
    make_segmentation(on_series(case, mask), case.dicom.series).save_as(file)
    return file.getvalue()


def write_series_nifti(case: Case, mask: np.ndarray) -> bytes:
    """A mask of the case as .nii.gz, voxel for voxel on the source series, 1 where there is tumour."""
    from nifti import nifti_file

    grid = case.dicom.grid
    affine = np.eye(4)
    affine[:3, :3] = np.array(grid.GetDirection()).reshape(3, 3) * grid.GetSpacing()
    affine[:3, 3] = grid.GetOrigin()
    affine[:2] *= -1  # DICOM counts to the left and back, NIfTI to the right and front
    return nifti_file(on_series(case, mask).transpose(2, 1, 0), affine)


def has_nifti() -> bool:
    """Whether nibabel is installed, which is optional."""
    return importlib.util.find_spec("nibabel") is not None
