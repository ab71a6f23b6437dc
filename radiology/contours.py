"""Radiotherapy outlines (RTSTRUCT): written over their source series, and read as the truth.

Outlines run between marked and unmarked pixels, so that a pixel is marked if its centre lies inside. A written
outline is read back pixel for pixel. A ring inside another ring of the same slice is a hole.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime

import contourpy
import highdicom
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, RTStructureSetStorage

from common import MedFLError, __version__
from radiology.bounds import File
from radiology.segmentation import EXPECTED, MANUFACTURER, valid_header
from radiology.series import Series
from scans.orientation import OFF_GRID

STUDY_COMPONENT = (
    "1.2.840.10008.3.1.2.3.1"  # the SOP class for a reference to a study; retired, but still required
)
TUMOUR = (
    "gtv",
    "tumor",
    "tumour",
    "glioma",
    "lesion",
)  # words in the name of the tumour's outline, if there are several outlines
COLOUR = [255, 150, 0]
FARTHEST = 1e6  # mm from the scanner's centre, farther than any point of a patient
MOST_AROUND = 2**28  # pixels in the boxes around all rings; that tumour has 10 million
MOST_CROSSED = (
    2**22
)  # pixel rows crossed by all lines of an outline; 100 slices of a large tumour have 50,000


def make_structure_set(
    mask: np.ndarray, series: Series, series_uid: UID, instance_uid: UID, number: int
) -> pydicom.Dataset:
    """A mask as an RTSTRUCT with one outline, "tumour", that refers to its source series.

    mask: (S, H, W), non-zero is tumour; the slices are in the series' order. Raises MedFLError for a series that
    names no frame of reference or lacks a required tag.
    """
    if not series.frame_of_reference:
        raise MedFLError(
            "the series names no frame of reference, which an RTSTRUCT must refer to; export the series "
            "completely"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the scanner's tags that deviate from the standard
            images = [_image_reference(series, index) for index in range(series.slices)]
            made = _empty(series, series_uid, instance_uid, number)
    except Exception as error:  # as for a DICOM SEG
        raise MedFLError(
            f"the series “{series.description}” lacks what an RTSTRUCT needs ({error}); export it without removing tags"
        ) from error
    made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(series, images)]
    made.StructureSetROISequence = [
        _dataset(
            ROINumber=1,
            ReferencedFrameOfReferenceUID=series.frame_of_reference,
            ROIName="tumour",
            ROIGenerationAlgorithm="AUTOMATIC",
        )
    ]
    made.ROIContourSequence = [
        _dataset(
            ROIDisplayColor=COLOUR, ContourSequence=_contours(mask, series, images), ReferencedROINumber=1
        )
    ]
    made.RTROIObservationsSequence = [
        _dataset(ObservationNumber=1, ReferencedROINumber=1, RTROIInterpretedType="", ROIInterpreter="")
    ]
    return made


def _empty(series: Series, series_uid: UID, instance_uid: UID, number: int) -> pydicom.Dataset:
    """A structure set for the series' patient and study, without an outline."""
    source = valid_header(series.files[0])
    told = {name: source.get(name) for name in EXPECTED}
    now = datetime.now()
    made = highdicom.base.SOPClass(
        study_instance_uid=source.StudyInstanceUID,
        series_instance_uid=series_uid,
        series_number=number,
        sop_instance_uid=instance_uid,
        instance_number=1,
        sop_class_uid=RTStructureSetStorage,
        modality="RTSTRUCT",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MANUFACTURER,
        software_versions=__version__,
        device_serial_number="0",
        patient_id=told["PatientID"],
        patient_name=told["PatientName"],
        patient_birth_date=told["PatientBirthDate"],
        patient_sex=told["PatientSex"],
        accession_number=told["AccessionNumber"],
        study_id=told["StudyID"],
        study_date=told["StudyDate"] or None,
        study_time=told["StudyTime"] or None,
        referring_physician_name=told["ReferringPhysicianName"],
    )
    made.OperatorsName = None
    made.FrameOfReferenceUID = series.frame_of_reference
    made.PositionReferenceIndicator = told["PositionReferenceIndicator"]
    made.StructureSetLabel = MANUFACTURER
    made.StructureSetDate, made.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    made.ApprovalStatus = "UNAPPROVED"
    return made


def _image_reference(series: Series, index: int) -> Dataset:
    """The file of a slice, and its frame in a multi-frame file."""
    with series.files[0 if series.frames else index].open("rb") as content:
        header = pydicom.dcmread(
            content, stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"]
        )
    reference = _dataset(
        ReferencedSOPClassUID=header.SOPClassUID, ReferencedSOPInstanceUID=header.SOPInstanceUID
    )
    if series.frames:
        reference.ReferencedFrameNumber = series.frames[index] + 1
    return reference


def _frame_of_reference(series: Series, images: list[Dataset]) -> Dataset:
    whole = {str(image.ReferencedSOPInstanceUID): image for image in images}
    named = [
        _dataset(
            ReferencedSOPClassUID=image.ReferencedSOPClassUID,
            ReferencedSOPInstanceUID=image.ReferencedSOPInstanceUID,
        )
        for image in whole.values()
    ]
    study = _dataset(
        ReferencedSOPClassUID=STUDY_COMPONENT,
        ReferencedSOPInstanceUID=series.study_uid,
        RTReferencedSeriesSequence=[_dataset(SeriesInstanceUID=series.uid, ContourImageSequence=named)],
    )
    return _dataset(FrameOfReferenceUID=series.frame_of_reference, RTReferencedStudySequence=[study])


def _contours(mask: np.ndarray, series: Series, images: list[Dataset]) -> list[Dataset]:
    """The outlines of every slice, in mm."""
    between, row, column = series.spacing
    across, down = np.array(series.orientation[:3]) * column, np.array(series.orientation[3:]) * row
    contours: list[Dataset] = []
    for index, pixels in enumerate(np.asarray(mask) != 0):
        if not pixels.any():
            continue
        start = np.array(series.origin) + series.normal * between * index
        lines = contourpy.contour_generator(z=np.pad(pixels, 1).astype(float)).lines(0.5)
        for ring in map(np.asarray, lines):
            points = (
                start + (ring[:-1, :1] - 1) * across + (ring[:-1, 1:] - 1) * down
            )  # the last point repeats the first
            contours.append(
                _dataset(
                    ContourImageSequence=[images[index]],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourNumber=len(contours) + 1,
                    ContourData=[f"{value:.4f}" for value in points.ravel()],
                )
            )
    return contours


def _dataset(**tags) -> Dataset:
    made = Dataset()
    for name, value in tags.items():
        setattr(made, name, value)
    return made


def read_structure_set(path: File, reference: sitk.Image) -> sitk.Image:
    """The tumour's outline, filled, on the grid of its series, uint8 0 or 1.

    If there are several outlines, the one that is named as the tumour is read. Raises MedFLError if none or several
    are, for outlines that don't lie on the series' slices, and for an empty outline.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = pydicom.dcmread(file)
            number = _tumour(path, stored)
            rings = list(_rings(stored, number))
    except MedFLError:
        raise
    except Exception as error:  # pydicom raises many kinds for a damaged file
        raise MedFLError(f"{path} can't be read as an RTSTRUCT; export it again") from error
    filled = np.zeros(reference.GetSize()[::-1], bool)
    for index, inside in _by_slice(path, rings, reference).items():
        filled[index] = fill(inside, filled.shape[1:])
    if not filled.any():
        raise MedFLError(f"{path} is empty: no pixel is marked as tumour")
    image = sitk.GetImageFromArray(filled.astype(np.uint8))
    image.CopyInformation(reference)
    return image


def _tumour(path: File, stored: pydicom.Dataset) -> int:
    """The number of the outline that is the tumour."""
    names = {
        int(roi.ROINumber): str(roi.get("ROIName") or "")
        for roi in stored.get("StructureSetROISequence") or ()
    }
    meant = (
        names if len(names) == 1 else {n: t for n, t in names.items() if any(w in t.lower() for w in TUMOUR)}
    )
    if len(meant) != 1:
        raise MedFLError(
            f"{path} holds {len(names)} outlines, of which {len(meant)} are called GTV, tumour or lesion, but exactly "
            "one must be; export only the tumour's outline"
        )
    return next(iter(meant))


def _rings(stored: pydicom.Dataset, number: int) -> Iterator[np.ndarray]:
    """An outline's closed rings, (points, 3) mm."""
    for outline in stored.get("ROIContourSequence") or ():
        if int(outline.ReferencedROINumber) == number:
            for contour in outline.get("ContourSequence") or ():
                points = np.array(contour.ContourData, float).reshape(-1, 3)
                if not (np.abs(points) < FARTHEST).all():  # true of NaN as well
                    raise ValueError("a point without a valid position")
                if not str(contour.ContourGeometricType).startswith("CLOSED") or len(points) < 3:
                    raise MedFLError(
                        "it holds points or open lines, which enclose no area; draw closed outlines"
                    )
                yield points


def _by_slice(path: File, rings: list[np.ndarray], reference: sitk.Image) -> dict[int, list[np.ndarray]]:
    """Rings by the slice that they lie in, as columns and rows, (points, 2). Raises MedFLError for a ring that does
    not lie on a slice, and for more lines than a person would draw."""
    found: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    columns, rows, slices = reference.GetSize()
    crossed = around = 0.0
    for ring in rings:
        places = np.array(
            [reference.TransformPhysicalPointToContinuousIndex(point) for point in ring.tolist()]
        )
        index = round(float(places[:, 2].mean()))
        if np.abs(places[:, 2] - index).max() > OFF_GRID or not 0 <= index < slices:
            raise MedFLError(
                f"{path} has outlines that do not lie on the slices of its series; draw them on the series "
                "itself"
            )
        shown = places[:, 1].clip(-1, rows)
        crossed += float(np.abs(shown - np.roll(shown, -1)).sum())
        around += (np.ptp(shown) + 1) * (np.ptp(places[:, 0].clip(-1, columns)) + 1)
        if crossed > MOST_CROSSED or around > MOST_AROUND:
            raise MedFLError(
                f"{path} has far more lines than an outline of a tumour; export only the tumour's outline"
            )
        found[index].append(places[:, :2])
    return found


def fill(rings: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of a slice that rings enclose, (H, W) bool. A ring inside another is a hole, one inside that is
    marked again, and one that is there twice counts once.

    rings: (points, 2) each, columns and rows, the first pixel's centre at 0. Raises MedFLError for rings that share
    only a part of what they enclose: some programs mark that part, and others leave it out.
    """
    filled, innermost, sizes = np.zeros(shape, bool), np.zeros(shape, np.int32), [0]
    for ring in sorted(rings, key=_area, reverse=True):
        place = _box(ring, shape)
        if place is None or not (inside := _inside(ring, place)).any():
            continue
        around = innermost[place][inside]
        if (around != around[0]).any():
            raise MedFLError(
                "it has outlines that overlap on one slice, and what lies in both may be meant or not; unite them"
            )
        if around[0] == 0 or sizes[around[0]] != len(around):
            filled[place] ^= inside
            innermost[place][inside] = len(sizes)
            sizes.append(len(around))
    return filled


def _area(ring: np.ndarray) -> float:
    """What a ring encloses, in pixels. Turned or begun elsewhere, it is the same ring."""
    x, y = (ring - ring[0]).T
    return round(abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2, 6)


def _box(ring: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice] | None:
    """The rows and columns of the pixels that a ring can enclose, None if there are none."""
    (left, top), (right, bottom) = np.ceil(ring.min(axis=0)), np.floor(ring.max(axis=0)) + 1
    rows, columns = (
        slice(int(max(0, top)), int(min(shape[0], bottom))),
        slice(int(max(0, left)), int(min(shape[1], right))),
    )
    return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None


def _inside(ring: np.ndarray, place: tuple[slice, slice]) -> np.ndarray:
    """The pixels of a box whose centres lie inside a ring. A pixel is inside if an odd number of lines cross its row
    on its left."""
    rows, columns = place
    shape = rows.stop - rows.start, columns.stop - columns.start
    start = ring - (columns.start, rows.start)
    end = np.roll(start, -1, axis=0)
    low, high = np.sort([start[:, 1], end[:, 1]], axis=0)
    first, last = (
        np.ceil(low).clip(0, shape[0]),
        np.ceil(high).clip(0, shape[0]),
    )  # a line ends before its last row
    count = (last - first).astype(int)
    line = np.repeat(np.arange(len(start)), count)
    row = first[line].astype(int) + np.arange(len(line)) - np.repeat(count.cumsum() - count, count)
    share = (row - start[line, 1]) / (end[line, 1] - start[line, 1])
    at = np.ceil(start[line, 0] + share * (end[line, 0] - start[line, 0])).clip(0, shape[1]).astype(int)
    wide = shape[1] + 1  # one more, for lines that cross on the right of all pixels
    crossings = np.bincount(row * wide + at, minlength=shape[0] * wide).reshape(shape[0], wide)
    return crossings.cumsum(axis=1)[:, :-1] % 2 == 1
