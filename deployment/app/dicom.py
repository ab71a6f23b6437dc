"""DICOM series in and masks out, through radiology/, which is optional here (requirements-dicom.txt).

Until it is closed, a case keeps the tags that its mask as DICOM SEG needs; the page shows only the geometry.
"""

import importlib.util
import io
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk

from borders.limits import MAX_PIXELS
from common import MedFLError
from deployment.app.case import LONE_SLICE, MIN_SIDE, Case
from deployment.app.framing import FRAMED
from deployment.app.nifti import nifti_bytes
from deployment.app.source import Source
from preprocessing import CHANNELS
from radiology.bounds import File, InMemory, Readings
from radiology.geometry import (
    POOR,
    SIDE,
    agreement,
    as_shown,
    register,
    resample,
    resample_mask,
    to_axial,
    to_uint8,
)
from radiology.headers import read_header
from radiology.rules import FLAIR, LEFT_OUT, POST, PRE, load_rules, role_of
from radiology.segmentation import make_segmentation, read_segmentation, refusal
from radiology.series import Refused, Series, find_series, load_series
from radiology.studies import plan_studies
from scans.field_of_view import square_margins

if TYPE_CHECKING:
    from radiology.prediction import Proposal

LONGEST = 2.0  # longest ratio of a pixel's sides that a page can show and a network can judge
ACQUIRED = ("sagittal", "coronal", None)  # by the axis along which slices follow each other


def read_dicom(files: list[tuple[str, bytes]]) -> Case:
    """The case of the DICOM files of one study: FLAIR, with pre- and post-contrast aligned to it if there are
    any.

    A single series is taken as FLAIR. Slices are axial, from feet to head: the series' own, or resampled from
    it. A DICOM SEG of the FLAIR series becomes the truth. Raises MedFLError if no series can be used.
    """
    found, refused = find_series([InMemory(name, content) for name, content in files], Readings(len(files)))
    masks = [series for series in found if series.modality == "SEG"]
    scans = [series for series in found if series not in masks]
    channels, notes = _choose(scans, masks, refused)
    flair = channels[FLAIR]
    if min(flair.rows, flair.columns) < MIN_SIDE:
        raise MedFLError(_too_large(flair.slices, flair.rows, flair.columns))
    image = _load(flair)
    oriented = as_shown(image)
    _check_pixels(*oriented.GetSpacing()[:2])
    fixed, told = to_axial(image)
    page, margins = _page(oriented, fixed)
    source = Source(flair, _grid(image), _grid(page), margins, np.empty(0), _grid(fixed), refusal(flair))
    fed, shown = {FLAIR: fixed}, {FLAIR: page}
    for channel in (PRE, POST):
        if channel in channels:
            try:
                fed[channel], shown[channel] = _laid_over(channels[channel], flair, fixed, page, notes)
            except MedFLError as error:
                notes.append(f"The series for {channel} was ignored: {error}.")
    if missing := [channel for channel in (PRE, POST) if channel not in fed]:
        notes.append(
            f"FLAIR stands in for {' and '.join(missing)}, as in the training set where one was missing."
        )
    source.fed = _volume({channel: sitk.GetArrayViewFromImage(plane) for channel, plane in fed.items()})
    framed = {c: sitk.GetArrayViewFromImage(plane) for c, plane in shown.items()}
    volume = _volume({c: source.framed(plane, plane.min()) for c, plane in framed.items()})
    columns, rows, between = page.GetSpacing()
    case = Case(
        name="DICOM series",
        slices=[f"slice_{k + 1}" for k in range(len(volume))],
        volume=volume,
        groups=np.zeros(len(volume), int),
        spacing=(rows, columns, between),
        measured=True,
        oriented=True,
        feed=source,
        dicom=source,
        notes=notes
        + _notes_on(source, image)
        + ([FRAMED.format(told=told)] if "cropped" in (told or "") else []),
    )
    own = [series for series in masks if flair.uid in series.references]
    if len(own) == 1:
        _rewind(own[0])
        case.truth = _mask_on_page(source, own[0].files[0])
    if passed := len(masks) - (case.truth is not None):
        case.notes.append(
            f"{passed} DICOM SEG were ignored: only a single one of the FLAIR series becomes the truth."
        )
    return case


def _choose(
    scans: list[Series], masks: list[Series], refused: list[Refused]
) -> tuple[dict[str, Series], list[str]]:
    """The series of each channel, including FLAIR, and notes about the others. Among several that claim to be
    FLAIR, one with a mask is preferred. Raises MedFLError if none can be used, or none can be identified as
    FLAIR."""
    usable = [series for series in scans if not series.problems]
    if not usable:
        raise MedFLError(
            f"the upload holds no series that can be used ({_reasons(scans, refused)}); export the FLAIR "
            f"series again"
        )
    if len({(series.patient_id, series.study_uid) for series in usable}) > 1:
        raise MedFLError("the upload holds series of several studies; open one at a time")
    rules, notes = load_rules(), []
    broken = [series for series in scans if series.problems and role_of(series, rules)[0] == FLAIR]
    if len(usable) == 1 and not broken:
        channels = {FLAIR: usable[0]}
        role, why = role_of(usable[0], rules)
        if role is not None and role != FLAIR or why == LEFT_OUT:
            told = f"it is {role} {why}" if role else why
            raise MedFLError(
                f"the upload's only series is not FLAIR according to its header ({told}), and the network "
                "needs FLAIR; open the FLAIR series, with or without this one"
            )
        if role != FLAIR:
            notes.append(
                "The series does not say that it is FLAIR, and was taken as FLAIR because it is the only one."
            )
    else:
        study = next(s for s in plan_studies(usable + masks, rules) if s.uid == usable[0].study_uid)
        channels = study.channels
        if not channels:
            why = f"; one that does can't be used ({_reasons(broken, [])})" if broken else ""
            raise MedFLError(
                f"none of the upload's {len(usable)} usable series says that it is FLAIR{why}; upload only "
                "the FLAIR series"
            )
        notes += [
            f"{line.used_as} was chosen {line.why}."
            for line in study.lines
            if line.used_as and "claim" in line.why
        ]
    spare = [series for series in scans if series not in channels.values()]
    if spare:
        notes.append(f"{len(spare)} series were ignored: {_reasons(spare, []) or 'no channel needs them'}.")
    if refused:
        notes.append(f"{len(refused)} files were ignored: {_reasons([], refused[:1])}.")
    return channels, notes


def _reasons(series: list[Series], refused: list[Refused]) -> str:
    """Why series and files can't be used, each reason once."""
    told = [problem for one in series for problem in one.problems] + [
        f"{file.path}: {file.why}" for file in refused
    ]
    return "; ".join(list(dict.fromkeys(told))[:3])


def _too_large(slices: int, rows: int, columns: int) -> str:
    return (
        f"the series has {slices} slices of {columns}×{rows} pixels, which this page can't hold; prepare it "
        "with data/prepare_hospital.py and open the slices"
    )


def _page(oriented: sitk.Image, fixed: sitk.Image) -> tuple[sitk.Image, tuple[int, int, int, int]]:
    """The slices that are shown, and their margins: the series' own unless they are too many, otherwise the
    network's input."""
    columns, rows, slices = oriented.GetSize()
    across, down, _ = oriented.GetSpacing()
    above, left, below, right = margins = square_margins(rows, columns, down, across)
    if slices * (above + rows + below) * (left + columns + right) <= MAX_PIXELS:
        return oriented, margins
    if fixed.GetSize()[2] * SIDE * SIDE > MAX_PIXELS:
        raise MedFLError(_too_large(slices, rows, columns))
    return fixed, (0, 0, 0, 0)


def _grid(image: sitk.Image) -> sitk.Image:
    """An empty image on an image's grid."""
    grid = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    grid.CopyInformation(image)
    return grid


def _volume(planes: dict[str, np.ndarray]) -> np.ndarray:
    """Channels of one shape, (S, H, W) float32, as (S, H, W, 3) uint8; FLAIR replaces missing ones."""
    each = {channel: to_uint8(plane) for channel, plane in planes.items()}
    return np.stack([each.get(channel, each[FLAIR]) for channel in CHANNELS], axis=-1)


def _check_pixels(across: float, down: float) -> None:
    if max(across, down) > LONGEST * min(across, down):
        raise MedFLError(
            f"cut axially, the series has pixels of {across:.1f} × {down:.1f} mm; open an axial series or a "
            "3-D one, or prepare this one with data/prepare_hospital.py and open the slices"
        )


def _load(series: Series) -> sitk.Image:
    _rewind(series)
    return load_series(series)


def _rewind(series: Series) -> None:
    """Rewind a file in memory, because its reader begins where the last one stopped."""
    for file in series.files:
        if isinstance(file, InMemory):
            file.seek(0)


def _laid_over(
    series: Series, flair: Series, fixed: sitk.Image, page: sitk.Image, notes: list[str]
) -> tuple[sitk.Image, sitk.Image]:
    """Another series of the study, registered to FLAIR: for the network, and as it is shown. Adds to `notes`
    if it does not fit well."""
    moving = _load(series)
    same = bool(flair.frame_of_reference) and series.frame_of_reference == flair.frame_of_reference
    transform = register(moving, fixed, same)
    moved = resample(moving, fixed, transform)
    if agreement(moved, fixed) < POOR:
        notes.append(
            "A series is poorly aligned with FLAIR, even after registration: look at the channels before "
            "you trust the mask."
        )
    return moved, resample(moving, page, transform)


def _notes_on(source: Source, image: sitk.Image) -> list[str]:
    """Notes for a reader about the series of the slices."""
    series, notes = source.series, []
    if not series.frame_of_reference:
        notes.append(
            "The series names no frame of reference, which a DICOM SEG must refer to, so there is no mask "
            "in this form."
        )
    elif source.refusal:
        notes.append(f"There is no mask as DICOM SEG: {source.refusal}.")
    else:
        notes.append(
            "The mask as DICOM SEG carries the patient's name and number from the series, as a viewer needs "
            "them; the page shows neither, and no other download holds them."
        )
    across, down, between = source.page.GetSpacing()
    acquired = ACQUIRED[int(np.abs(np.array(image.GetDirection()).reshape(3, 3)[:, 2]).argmax())]
    if acquired:
        notes.append(
            f"The series was acquired {acquired}; its axial slices have pixels of {across:.1f} × {down:.1f} mm."
        )
    if source.page.GetSize()[:2] == (SIDE, SIDE) != as_shown(image).GetSize()[:2]:
        notes.append(
            f"The series is larger than this page shows: its slices were resampled to {SIDE}×{SIDE} pixels, "
            f"{between:.1f} mm apart, as data/prepare_hospital.py does. Masks are resampled back to the "
            "series' own grid."
        )
    if series.slices == 1:
        notes.append(LONE_SLICE)
    return notes


def _source(of: Case | Source) -> Source:
    """The source of a DICOM case. Raises MedFLError for a case of other files."""
    source = of.dicom if isinstance(of, Case) else of
    if source is None:
        raise MedFLError("the case was not opened from DICOM files; open the DICOM series itself")
    return source


def read_dicom_mask(of: Case | Source, name: str, content: bytes) -> np.ndarray:
    """A mask of the case's shape from a DICOM SEG of its series, (S, H, W) uint8. Raises MedFLError for any
    other file."""
    source, file = _source(of), InMemory(name, content)
    mask = _mask_on_page(source, file)
    file.seek(0)
    told, own = read_header(file).about["frame_of_reference"], source.series.frame_of_reference
    if told and own and told != own:  # two scans of one protocol can have the same grid in mm
        raise MedFLError(
            f"{name} belongs to another scan, by its frame of reference; choose the mask of this scan"
        )
    return mask


def _mask_on_page(source: Source, file: File) -> np.ndarray:
    labels = read_segmentation(file, source.grid, load_rules().labels)
    return source.framed(resample_mask(labels, source.page, sitk.Transform()))


def on_series(of: Case | Source, mask: np.ndarray) -> np.ndarray:
    """A mask (S, H, W) uint8 of the case on the source series' own slices, rows and columns, in its order, 1
    where there is tumour."""
    return _source(of).onto_series(mask)


def write_segmentation(of: Case | Source, mask: np.ndarray) -> bytes:
    """A mask of the case as DICOM SEG over its source series. Raises MedFLError for an empty one."""
    source = _source(of)
    _rewind(source.series)
    file = io.BytesIO()
    make_segmentation(on_series(source, mask), source.series).save_as(file)
    return file.getvalue()


def as_proposal(
    source: Source, mask: np.ndarray, way: str, probability: np.ndarray | None = None
) -> "Proposal":
    """A mask of the case as a proposal for its source series. way: how it was made, to distinguish it from
    other masks; probability: (S, H, W) float32 from which the mask was made, None if a person drew it."""
    from radiology.prediction import Proposal

    _rewind(source.series)
    likely = None if probability is None else source.probability_on_series(probability)
    marked = on_series(source, mask) * np.uint8(255)
    return Proposal(marked, source.series, (source.series,), (), way, likely)


def write_series_nifti(of: Case | Source, mask: np.ndarray) -> bytes:
    """A mask of the case as .nii.gz, voxel for voxel on the source series, 1 where there is tumour."""
    source = _source(of)
    grid = source.grid
    affine = np.eye(4)
    affine[:3, :3] = np.array(grid.GetDirection()).reshape(3, 3) * grid.GetSpacing()
    affine[:3, 3] = grid.GetOrigin()
    affine[:2] *= -1  # DICOM counts towards the left and back, NIfTI towards the right and front
    return nifti_bytes(on_series(source, mask).transpose(2, 1, 0), affine)


def has_nifti() -> bool:
    """Whether nibabel is installed, which is optional."""
    return importlib.util.find_spec("nibabel") is not None
