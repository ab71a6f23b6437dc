"""Masks as DICOM SEG: written with references to their source series, so that a viewer overlays them on it, and read
back onto its grid."""

import re
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import SimpleITK as sitk
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.pixels import pixel_array
from pydicom.sr.codedict import codes
from pydicom.uid import MRImageStorage, generate_uid

from common import MedFLError, __version__
from radiology.bounds import File, check_bounds, read_with_pixels
from radiology.codestreams import check_frame
from radiology.series import Series
from scans.orientation import OFF_GRID
from storage.files import atomic_write

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
FRAMED = ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
MOST_BYTES = 65_536  # of a header's element that a segmentation may take over from its source
BESIDE = 0.3  # slices by which a frame may be off its series' regular grid; slice distances may vary by 5 %
MANUFACTURER = "MedFL"
SERIES_NUMBER = 9001  # far from the scanner's own


def write_segmentation(mask: np.ndarray, series: Series, path: Path) -> None:
    """Write a mask as DICOM SEG. Raises MedFLError like `make_segmentation`, and if the file can't be written."""
    segmentation = make_segmentation(mask, series)
    with atomic_write(path) as file:
        segmentation.save_as(file)


def make_segmentation(mask: np.ndarray, series: Series) -> highdicom.seg.Segmentation:
    """A mask as a binary DICOM SEG with one segment, "tumour", that refers to its source series. Nothing is written
    to the disk.

    mask: (S, H, W) bool or uint8, non-zero is tumour; the slices are in the series' order. The SEG contains the
    patient's name and number from the source, because a viewer needs them. Raises MedFLError for a mask of another
    shape, an empty mask, and a series that lacks a required tag, such as the frame of reference.
    """
    mask = np.asarray(mask) != 0
    shape = (series.slices, series.rows, series.columns)
    if mask.shape != shape:
        raise MedFLError(
            f"the mask is {_size(mask.shape)}, but the series “{series.description}” {_size(shape)}; draw "
            "the mask on the series' own slices"
        )
    if not mask.any():
        raise MedFLError(
            "the mask is empty, and a DICOM SEG without a pixel can't be shown; there is nothing to write"
        )
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
            warnings.simplefilter("ignore")  # about the scanner's tags that deviate from the standard
            sources, frames = _sources(series)
            segmentation = highdicom.seg.Segmentation(
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
    except Exception as error:  # for example a missing tag; pydicom and highdicom raise many kinds of errors
        raise MedFLError(
            f"the series “{series.description}” lacks what a DICOM SEG needs ({error}); export it without "
            "removing tags"
        ) from error
    if frames:
        _name_frames(segmentation, frames)
    return segmentation


def refusal(series: Series) -> str | None:
    """Why no DICOM SEG can be made for a series, or None if it can: found by making one with a single pixel."""
    pixel = np.zeros((series.slices, series.rows, series.columns), bool)
    pixel[0, 0, 0] = True
    try:
        make_segmentation(pixel, series)
    except MedFLError as error:
        return str(error)
    return None


def _sources(series: Series) -> tuple[list[pydicom.Dataset], dict[str, tuple[str, str, int]]]:
    """A header for each slice of a series, in the form that highdicom needs, and the frames behind placeholder UIDs.

    Headers are copies with small corrections: directions that differ in their last digit, dates and times in old
    forms, and required tags that anonymisers remove. A frame of a multi-frame file is given as a slice with a
    placeholder UID, which `_name_frames` later replaces.
    """
    headers: dict[File, pydicom.Dataset] = {}
    sources, frames = [], {}
    for index in range(series.slices):
        path, frame = series.place_of(index)
        if path not in headers:
            headers[path] = valid_header(path)
        source = pydicom.Dataset()
        source.update(headers[path])
        changed: dict[str, Any] = {
            "ImageOrientationPatient": list(series.orientation),
            "PixelSpacing": list(series.spacing[1:]),
            "SliceThickness": source.get("SliceThickness") or series.spacing[0],
        }
        if frame is not None:
            for name in FRAMED:
                if name in source:
                    delattr(source, name)
            stands = str(generate_uid())
            frames[stands] = (str(source.SOPClassUID), str(source.SOPInstanceUID), frame + 1)
            along = series.positions[index] - series.positions[0]
            place = np.array(series.origin) + along * series.normal
            changed |= {
                "SOPClassUID": MRImageStorage,
                "SOPInstanceUID": stands,
                "ImagePositionPatient": [round(v, 6) for v in place.tolist()],
            }
        for name, value in changed.items():  # new elements, because all copies share those of the header
            source.add_new(name, dictionary_VR(name), value)
        sources.append(source)
    return sources, frames


def valid_header(path: File) -> pydicom.Dataset:
    """A file's header, with dates, times and sex in valid DICOM forms or empty."""
    with path.open("rb") as file:
        header = pydicom.dcmread(file, stop_before_pixels=True)
    for tag in list(
        header.keys()
    ):  # each value is unpacked below, and what is long or a maker's own is not needed
        element = header.get_item(tag)
        if tag.is_private or (isinstance(element, RawDataElement) and len(element.value or b"") > MOST_BYTES):
            del header[tag]
    for element in header:
        if element.VR in ("DA", "TM", "DT") and isinstance(element.value, str):
            element.value = _in_dicoms_form(element.VR, element.value)
    for name in EXPECTED:
        if name not in header:
            setattr(header, name, None)
    if str(header.PatientSex or "") not in ("M", "F", "O"):
        header.PatientSex = None
    return header


def _in_dicoms_form(kind: str, text: str) -> str:
    """A date or time without the separators of old forms; "" if it is not valid."""
    digits = re.sub(r"[^0-9]", "", text.split(".")[0] if kind == "TM" else text)
    form, count = ("%Y%m%d", 8) if kind == "DA" else ("%H%M%S", 6)
    if kind == "DT":
        return text if re.fullmatch(r"\d{4,14}(\.\d{1,6})?([+-]\d{4})?", text) else ""
    try:
        datetime.strptime(digits[:count], form[: 2 * (len(digits[:count]) // 2)] if kind == "TM" else form)
    except ValueError:
        return ""
    return digits[:count]


def _name_frames(dataset: pydicom.Dataset, frames: dict[str, tuple[str, str, int]]) -> None:
    """Replace placeholder UIDs by files and frame numbers. A reference without a frame number names each file only
    once."""
    for element in dataset:
        if element.VR != "SQ":
            continue
        kept: list[pydicom.Dataset] = []
        for item in element.value:
            meant = frames.get(str(item.get("ReferencedSOPInstanceUID", "")))
            if meant is not None:
                item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = meant[:2]
                if element.keyword == "SourceImageSequence" and "PurposeOfReferenceCodeSequence" in item:
                    item.ReferencedFrameNumber = meant[2]
                elif any(other.ReferencedSOPInstanceUID == meant[1] for other in kept):
                    continue
            else:
                _name_frames(item, frames)
            kept.append(item)
        element.value = kept


def read_segmentation(path: File, reference: sitk.Image, labels: tuple[int, ...] = (1,)) -> sitk.Image:
    """The tumour of a DICOM SEG (binary or a label map) on the grid of its source series, uint8 0 or 1.

    reference: the source series from `load_series`. labels: the segment numbers that mean tumour, from the rules; a
    single segment is the tumour whatever its number. Raises MedFLError for a fractional SEG, for segments that the
    labels do not name, for a file on another grid, and for an empty one.
    """
    check_bounds(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = highdicom.seg.Segmentation.from_dataset(read_with_pixels(path), copy=False)
            kind = stored.segmentation_type
            names = {
                int(s.SegmentNumber): str(s.SegmentLabel) for s in stored.SegmentSequence if s.SegmentNumber
            }
            frames = None
            if kind != SegmentationTypeValues.FRACTIONAL:
                for number in range(int(stored.NumberOfFrames)):
                    check_frame(stored, number)
                frames = pixel_array(stored).reshape(-1, stored.Rows, stored.Columns)
                corners = [_corners(stored, number) for number in range(len(frames))]
    except MedFLError as error:
        raise MedFLError(f"{path}: {error}") from error
    except Exception as error:  # highdicom and pydicom raise many kinds for a damaged or unusual file
        raise MedFLError(
            f"{path} can't be read as a DICOM SEG with parallel frames; export it again"
        ) from error
    if frames is None:
        raise MedFLError(f"{path} holds fractions, not a mask; export it as a binary segmentation")
    if len(names) > 1 and not names.keys() <= set(labels):
        raise MedFLError(
            f"{path} holds {len(names)} segments ({', '.join(names.values())}), numbers "
            f"{', '.join(map(str, names))}, but tumour is {', '.join(map(str, labels))}; list all that mean "
            "tumour in the rules (mask, labels), or export only the tumour's segment"
        )
    if not frames.any():
        raise MedFLError(f"{path} is empty: no pixel is marked as tumour")
    tumour = np.zeros(reference.GetSize()[::-1], np.uint8)
    for frame, corner in zip(frames, corners):
        if not _draw(tumour, frame > 0, corner, reference):
            raise MedFLError(
                f"{path} lies on another grid than its series; draw or export the mask on the series itself"
            )
    image = sitk.GetImageFromArray(tumour)
    image.CopyInformation(reference)
    return image


def _corners(stored: pydicom.Dataset, number: int) -> np.ndarray:
    """Three corners of a frame: its first pixel, and the last pixels of its first row and of its first column, (3, 3)
    mm."""

    def group(macro: str) -> pydicom.Dataset:
        own = stored.PerFrameFunctionalGroupsSequence[number]
        return (own if macro in own else stored.SharedFunctionalGroupsSequence[0])[macro].value[0]

    first = np.array(group("PlanePositionSequence").ImagePositionPatient, float)
    directions = np.array(group("PlaneOrientationSequence").ImageOrientationPatient, float)
    down, across = map(float, group("PixelMeasuresSequence").PixelSpacing)
    row = first + directions[:3] * across * (stored.Columns - 1)
    return np.array([first, row, first + directions[3:] * down * (stored.Rows - 1)])


def _draw(tumour: np.ndarray, frame: np.ndarray, corners: np.ndarray, reference: sitk.Image) -> bool:
    """Mark a frame's pixels (rows, columns) bool in `tumour` (S, H, W). Returns False if the frame does not match a
    slice of the reference."""
    index = np.array(
        [reference.TransformPhysicalPointToContinuousIndex(corner.tolist()) for corner in corners]
    )
    nearest = index.round()
    beside = np.abs(index - nearest).max(axis=0)
    columns, rows, slices = reference.GetSize()
    if frame.shape != (rows, columns) or beside[:2].max() > OFF_GRID or beside[2] > BESIDE:
        return False
    if not (sorted({*nearest[:, 0]}) == sorted({0, columns - 1}) and len({*nearest[:, 2]}) == 1):
        return False
    if sorted({*nearest[:, 1]}) != sorted({0, rows - 1}) or not 0 <= nearest[0, 2] < slices:
        return False
    if nearest[0, 1] != nearest[1, 1]:  # its rows are the columns of the reference
        return False
    turned = frame[:: -1 if nearest[0, 1] else 1, :: -1 if nearest[0, 0] else 1]
    tumour[int(nearest[0, 2])] |= turned.astype(np.uint8)
    return True


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
