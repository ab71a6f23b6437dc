"""Masks as DICOM SEG: written over their source series, so that a viewer lays them over it, and read back
onto its grid."""

import warnings
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import SimpleITK as sitk
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription, segread
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from common import MedFLError, __version__, atomic_write
from radiology.geometry import on_grid
from radiology.headers import File, check_bounds
from radiology.series import Series

EXPECTED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
MANUFACTURER = "MedFL"
SERIES_NUMBER = 9001  # far from the scanner's own


def write_segmentation(mask: np.ndarray, series: Series, path: Path) -> None:
    """Write a mask as `make_segmentation` makes it. Raises MedFLError for what that refuses, and where it
    can't be written."""
    segmentation = make_segmentation(mask, series)
    with atomic_write(path) as file:
        segmentation.save_as(file)


def make_segmentation(mask: np.ndarray, series: Series) -> highdicom.seg.Segmentation:
    """A mask as a binary DICOM SEG of one segment, "tumour", that refers to its source series; nothing
    touches the disk.

    mask: (S, H, W) bool or uint8, not 0 is tumour; the series' slices in its own order. The file carries the
    patient's name and number from the source, as a viewer needs them. Raises MedFLError for a mask of another
    shape, for an empty one, and for a series that lacks what a SEG has to say, such as a frame of reference.
    """
    mask = np.asarray(mask) != 0
    shape = (series.slices, series.rows, series.columns)
    if mask.shape != shape:
        raise MedFLError(
            f"the mask is {_size(mask.shape)} and the series “{series.description}” {_size(shape)}; "
            "give the mask on the series' own slices"
        )
    if not mask.any():
        raise MedFLError(
            "the mask is empty, and a DICOM SEG without a pixel can't be shown; there is nothing to write"
        )
    sources = [_source(file, series.spacing[0]) for file in series.files]
    if series.frames:  # highdicom takes frames in the file's order
        mask = mask[np.argsort(series.frames)]
    tumour = SegmentDescription(
        segment_number=1,
        segment_label="tumour",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Neoplasm,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="MedFL", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of source tags that deviate from the standard, which are the scanner's
            return highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=mask,
                segmentation_type=SegmentationTypeValues.BINARY,
                segment_descriptions=[tumour],
                series_instance_uid=generate_uid(),
                series_number=SERIES_NUMBER,
                sop_instance_uid=generate_uid(),
                instance_number=1,
                manufacturer=MANUFACTURER,
                manufacturer_model_name=MANUFACTURER,
                software_versions=__version__,
                device_serial_number="0",
                series_description="MedFL tumour, research use only",
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of a tag that is missing
        raise MedFLError(
            f"the series “{series.description}” lacks what a DICOM SEG needs ({error}); export it without "
            "taking tags away"
        ) from error


def _source(path: File, thickness: float) -> pydicom.Dataset:
    """A source file's header, where what anonymisers take away and a SEG has to have is put back, empty if it
    may be."""
    header = pydicom.dcmread(path, stop_before_pixels=True)
    for name in EXPECTED:
        if name not in header:
            setattr(header, name, None)
    if "NumberOfFrames" not in header and not header.get("SliceThickness"):
        header.SliceThickness = thickness
    return header


def read_segmentation(path: File, reference: sitk.Image) -> sitk.Image:
    """The tumour of a DICOM SEG on the grid of its source series, uint8 0 or 1.

    reference: the source series, as `load_series` gives it. Raises MedFLError for a file that is no binary
    SEG of one segment, for one that lies on another grid, and for an empty one.
    """
    check_bounds(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = segread(path)
            names = [str(stored.get_segment_description(n).segment_label) for n in stored.segment_numbers]
            binary = stored.segmentation_type == SegmentationTypeValues.BINARY
            one = binary and len(names) == 1
            volume = stored.get_volume(combine_segments=True, allow_missing_positions=True) if one else None
    except Exception as error:  # highdicom and pydicom raise many kinds for a damaged or unusual file
        raise MedFLError(
            f"{path} can't be read as a DICOM SEG whose frames lie in parallel; export it again"
        ) from error
    if not binary:
        raise MedFLError(f"{path} holds shares of tumour, not a mask; export it as a binary segmentation")
    if volume is None:
        raise MedFLError(
            f"{path} holds {len(names)} segments ({', '.join(names)}), and one means tumour; export that "
            f"one alone"
        )
    labels = _image(volume)
    if not sitk.GetArrayViewFromImage(labels).any():
        raise MedFLError(f"{path} is empty: no pixel is marked as tumour")
    if labels.GetSize()[:2] != reference.GetSize()[:2] or not on_grid(labels, reference):
        raise MedFLError(
            f"{path} lies on another grid than its series; draw or export the mask on the series itself"
        )
    return sitk.Resample(labels, reference, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _image(volume: highdicom.Volume) -> sitk.Image:
    """A volume of highdicom, whose axes are slices, rows, columns, as an image of SimpleITK."""
    image = sitk.GetImageFromArray((volume.array > 0).astype(np.uint8))
    image.SetSpacing([float(step) for step in volume.spacing[::-1]])
    image.SetOrigin([float(place) for place in volume.position])
    image.SetDirection(np.stack(volume.unit_vectors()[::-1], axis=1).ravel().tolist())
    return image
