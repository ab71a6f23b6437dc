"""From DICOM files to series: which files belong together, in what order, what is wrong with them, and their pixels.

Headers are read first and pixels only when asked for, a slice at a time, so an archive of any size can be looked through.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder, pixel_array
from pydicom.pixels.processing import apply_modality_lut
from pydicom.uid import UID, ImplicitVRLittleEndian

from common import MedFLError

MAX_VOXELS = 2**27  # of a series: 512 MiB as float32
SAME_PLACE = 0.01  # mm; nearer slices lie at one place
UNEVEN = 0.05  # of the distance between slices; scanners round positions
TURNED = 1e-3  # in direction cosines, which are written with six digits or so
DIRECTORY = "1.2.840.10008.1.3.10"  # Media Storage Directory
OTHER_MODALITY = "it is of modality"  # how that problem begins: a segmentation has it, and is of use all the same
NOT_PICTURES = {"RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC", "RWV", "FID"}

TAGS = [  # what is read of a header
    "StudyDate", "StudyTime", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID",
    "Modality", "SeriesDescription", "ProtocolName", "SequenceName", "SeriesNumber", "ImageType", "ContrastBolusAgent",
    "RepetitionTime", "EchoTime", "InversionTime", "Rows", "Columns", "PixelSpacing", "ImageOrientationPatient",
    "ImagePositionPatient", "SliceThickness", "SpacingBetweenSlices", "SamplesPerPixel", "BitsAllocated", "NumberOfFrames",
    "FrameOfReferenceUID", "BurnedInAnnotation", "ConversionType", "MagneticFieldStrength", "Manufacturer",
    "ManufacturerModelName", "ReferencedSeriesSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]


@dataclass(frozen=True)
class Series:
    """One series of an archive.

    files: along the normal of the slices, one per slice, or the one file of a multi-frame series, whose slices are then
    `frames` of it, in order. spacing: mm between slices, rows and columns. positions: mm along the normal, one per slice.
    problems: why it can't be used, a sentence each; empty where it can. references: the series that a segmentation is of.
    when: the study's date and time as DICOM writes them, to put studies in order.
    """

    uid: str
    study_uid: str
    patient_id: str
    modality: str
    description: str
    files: tuple[Path, ...] = field(repr=False)
    frames: tuple[int, ...] = field(default=(), repr=False)
    rows: int = 0
    columns: int = 0
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    orientation: tuple[float, ...] = ()
    positions: tuple[float, ...] = field(default=(), repr=False)
    problems: tuple[str, ...] = ()
    number: int | None = None
    protocol: str = ""
    sequence: str = ""
    image_type: tuple[str, ...] = ()
    contrast_agent: str = ""
    repetition_time: float | None = None
    echo_time: float | None = None
    inversion_time: float | None = None
    field_strength: float | None = None
    manufacturer: str = ""
    model: str = ""
    frame_of_reference: str = ""
    burnt_in: bool = False
    references: tuple[str, ...] = ()
    when: str = ""

    @property
    def slices(self) -> int:
        """How many slices it has."""
        return len(self.frames) or len(self.files)

    @property
    def normal(self) -> np.ndarray:
        """The direction in which the slices follow each other, (3,), in the patient's coordinates (left, back, up)."""
        return np.cross(self.orientation[:3], self.orientation[3:])


@dataclass(frozen=True)
class Refused:
    """A file that belongs to no series, and why."""

    path: Path
    why: str


class _Slice(NamedTuple):
    """What is kept of a slice's header; position and orientation are None where there is no geometry."""

    path: Path
    frame: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    matrix: tuple[int, int]
    pixel_spacing: tuple[float, ...] | None
    thickness: float


def find_series(paths: Iterable[Path]) -> tuple[list[Series], list[Refused]]:
    """The series that these files form, by patient, study and number, and the files that belong to none.

    Reads headers only. A file that is there twice counts once; the second is among the refused.
    """
    slices, heads, notes, refused, seen = defaultdict(list), {}, defaultdict(list), [], {}
    for path in paths:
        try:
            header, left = _read_header(path)
        except MedFLError as error:
            refused.append(Refused(path, str(error)))
            continue
        instance, uid = str(header.get("SOPInstanceUID", path)), str(header.get("SeriesInstanceUID", path))
        if instance in seen:
            refused.append(Refused(path, f"the same image as {seen[instance].name}; it counts once"))
            continue
        seen[instance] = path
        heads.setdefault(uid, _describe(header, uid))
        notes[uid] += _problems_of_file(path, header, left)
        slices[uid] += _slices_of(path, header)
    found = [_assemble(head, slices[uid], notes[uid]) for uid, head in heads.items()]
    return sorted(found, key=lambda s: (s.patient_id, s.study_uid, s.number is None, s.number or 0, s.uid)), refused


def _read_header(path: Path) -> tuple[pydicom.Dataset, int]:
    """A file's header, of which only TAGS are kept, and the bytes that follow. Raises MedFLError for what is no DICOM image."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what deviates from the standard and can be read
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
            [header.get(name) for name in TAGS]  # values are converted when they are asked for, and damaged ones raise here
            left = path.stat().st_size - file.tell()
    except InvalidDicomError as error:
        raise MedFLError("no DICOM file; leave it out of the export") from error
    except OSError as error:
        raise MedFLError(f"can't be read ({error.strerror or error}); check its permissions and copy it again") from error
    except Exception as error:  # pydicom raises many kinds for a damaged file
        raise MedFLError("damaged or cut off within its header; export it again") from error
    if str(header.file_meta.get("MediaStorageSOPClassUID", "")) == DIRECTORY:
        raise MedFLError("a DICOMDIR, the list of a medium's files; it is not needed")
    if header.get("Modality") in NOT_PICTURES:
        raise MedFLError(f"of modality {header.Modality}, which holds no pictures; it is not needed")
    if not (header.get("Rows") and header.get("Columns")):
        raise MedFLError("holds no picture, or is cut off within its header; export it again if it should")
    return header, left


def _number(value: object) -> float | None:
    """The first number in a tag's value, or None."""
    try:
        number = float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
    except (TypeError, ValueError, IndexError):
        return None
    return number if math.isfinite(number) else None


def _numbers(value: object, count: int) -> tuple[float, ...] | None:
    """A tag's `count` finite numbers, or None."""
    try:
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _describe(header: pydicom.Dataset, uid: str) -> dict:
    """The fields of a Series that its first file tells."""
    kind, number = tuple(map(str, header.get("ImageType") or ())), _number(header.get("SeriesNumber"))

    def text(name: str) -> str:
        return str(header.get(name) or "").strip()

    return dict(
        uid=uid, study_uid=text("StudyInstanceUID"), patient_id=text("PatientID"), modality=text("Modality"),
        description=text("SeriesDescription"), number=None if number is None else int(number), protocol=text("ProtocolName"),
        sequence=text("SequenceName"), image_type=kind, contrast_agent=text("ContrastBolusAgent"),
        repetition_time=_number(header.get("RepetitionTime")), echo_time=_number(header.get("EchoTime")),
        inversion_time=_number(header.get("InversionTime")), field_strength=_number(header.get("MagneticFieldStrength")),
        manufacturer=text("Manufacturer"), model=text("ManufacturerModelName"), frame_of_reference=text("FrameOfReferenceUID"),
        burnt_in=text("BurnedInAnnotation").upper() == "YES" or "SECONDARY" in kind[1:2] or bool(text("ConversionType")),
        when=text("StudyDate") + text("StudyTime"),
        references=tuple(str(r.get("SeriesInstanceUID", "")) for r in header.get("ReferencedSeriesSequence") or ()))


def _problems_of_file(path: Path, header: pydicom.Dataset, left: int) -> list[str]:
    """What is wrong with a file by itself, a sentence each; left: bytes from its pixels on."""
    problems = []
    modality = str(header.get("Modality") or "unknown")
    if modality != "MR":
        problems.append(f"{OTHER_MODALITY} {modality}, not MR")
    if "LOCALIZER" in (str(part).upper() for part in header.get("ImageType") or ()):
        problems.append("it is a localizer")
    if (header.get("SamplesPerPixel") or 1) != 1:
        problems.append("it is in colour, a screen capture or a map, not a scan")
    syntax = UID(header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    pixels = header.Rows * header.Columns * (header.get("NumberOfFrames") or 1) * (header.get("SamplesPerPixel") or 1)
    if not (syntax.is_compressed or syntax.is_deflated) and left < pixels * (header.get("BitsAllocated") or 16) // 8:
        problems.append(f"{path.name} is truncated; export it again")
    return problems


def _slices_of(path: Path, header: pydicom.Dataset) -> list[_Slice]:
    """The slices of a file: one, or one for each frame, whose geometry stands in functional groups."""
    frames, matrix = int(header.get("NumberOfFrames") or 1), (int(header.Rows), int(header.Columns))
    shared, groups = header.get("SharedFunctionalGroupsSequence"), header.get("PerFrameFunctionalGroupsSequence")
    if frames == 1 and not groups:
        thickness = _number(header.get("SpacingBetweenSlices")) or _number(header.get("SliceThickness")) or 0.0
        position, orientation = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
        return [_Slice(path, None, _numbers(position, 3), _numbers(orientation, 6), matrix,
                       _numbers(header.get("PixelSpacing"), 2), thickness)]

    def look_up(group: pydicom.Dataset | None, macro: str, name: str) -> object:
        for where in (group, shared[0] if shared else None):
            if where is not None and where.get(macro):
                return where[macro].value[0].get(name)
        return None

    found = []
    for frame in range(frames):
        group = groups[frame] if groups and frame < len(groups) else None
        thickness = (_number(look_up(group, "PixelMeasuresSequence", "SpacingBetweenSlices"))
                     or _number(look_up(group, "PixelMeasuresSequence", "SliceThickness")) or 0.0)
        found.append(_Slice(path, frame, _numbers(look_up(group, "PlanePositionSequence", "ImagePositionPatient"), 3),
                            _numbers(look_up(group, "PlaneOrientationSequence", "ImageOrientationPatient"), 6), matrix,
                            _numbers(look_up(group, "PixelMeasuresSequence", "PixelSpacing"), 2), thickness))
    return found


def _assemble(head: dict, slices: list[_Slice], notes: list[str]) -> Series:
    """A series of slices in any order, with everything that is wrong with it."""
    first, problems = slices[0], list(dict.fromkeys(notes))
    files = tuple(dict.fromkeys(s.path for s in slices))
    rows, columns = first.matrix
    if head["modality"] == "SEG":  # its frames are of several segments, and radiology.segmentation reads them
        return Series(**head, files=files, rows=rows, columns=columns, problems=tuple(problems))
    if sizes := sorted({s.matrix for s in slices} - {first.matrix}):
        problems.append(f"its slices have different sizes, {columns}×{rows} and {sizes[0][1]}×{sizes[0][0]}")
    geometry = problem = None
    if len(files) > 1 and any(s.frame is not None for s in slices):
        problem = "it mixes files of several frames with others; export it as one kind"
    elif any(None in (s.position, s.orientation, s.pixel_spacing) for s in slices):
        problem = "it does not say where its slices lie (position, orientation or pixel spacing is missing)"
    else:
        geometry, problem = _geometry(slices)
    if problem:
        problems.append(problem)
    if len(slices) * rows * columns > MAX_VOXELS:
        problems.append(f"it has {len(slices)} slices of {columns}×{rows}, more than is read at once; export it in smaller series")
    if geometry is None:
        return Series(**head, files=files, rows=rows, columns=columns, problems=tuple(problems))
    order = geometry.pop("order")
    if first.frame is None:
        files, frames = tuple(slices[i].path for i in order), ()
    else:
        frames = tuple(slices[i].frame for i in order)
    return Series(**head, **geometry, files=files, frames=frames, rows=rows, columns=columns, problems=tuple(problems))


def _geometry(slices: list[_Slice]) -> tuple[dict | None, str | None]:
    """Order, spacing, origin, orientation and positions of slices that say where they lie; and what is wrong with them."""
    first = slices[0]
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    if abs(across @ down) > 10 * TURNED or abs(across @ across - 1) > 10 * TURNED or abs(down @ down - 1) > 10 * TURNED \
            or min(first.pixel_spacing) <= 0:
        return None, "its directions are not at right angles, or its pixels have no size; export it again"
    if any(np.abs(np.subtract(s.orientation, first.orientation)).max() > TURNED for s in slices):
        return None, "its slices are turned against each other, as in a localizer of several planes"
    if any(np.abs(np.subtract(s.pixel_spacing, first.pixel_spacing)).max() > TURNED for s in slices):
        return None, "its slices have pixels of different sizes"
    normal = np.cross(across, down)
    places = np.array([s.position for s in slices])
    order = np.argsort(places @ normal, kind="stable")
    along = (places @ normal)[order]
    steps = np.diff(along)
    between = round(float((along[-1] - along[0]) / max(1, len(steps))), 4) if len(steps) and steps.min() > SAME_PLACE else 0.0
    problem = _spacing_problem(steps)
    between = between or float(np.median(steps[steps > SAME_PLACE])) if (steps > SAME_PLACE).any() else first.thickness
    if between <= 0:
        problem = problem or "it is a single slice that does not say how thick it is"
        between = 1.0
    sideways = places[order] - places[order[0]] - np.outer(along - along[0], normal)
    if not problem and np.abs(sideways).max() > min(first.pixel_spacing):
        problem = "its slices do not lie straight above each other (a tilted gantry, or several stacks)"
    return {"order": order.tolist(), "spacing": (between, *first.pixel_spacing), "origin": tuple(places[order[0]].tolist()),
            "orientation": first.orientation, "positions": tuple(along.tolist())}, problem


def _spacing_problem(steps: np.ndarray) -> str | None:
    """What is wrong with the distances between slices, (S - 1,) mm, in order."""
    if not len(steps):
        return None
    if (steps <= SAME_PLACE).any():
        return (f"{int((steps <= SAME_PLACE).sum())} of its slices lie where another lies (several echoes or times, or sent "
                "twice); export them as series of their own")
    usual = float(np.median(steps))
    gaps = steps / usual
    if (np.abs(gaps - 1) <= UNEVEN).all():
        return None
    whole = np.abs(gaps - gaps.round()) <= UNEVEN * gaps.round().clip(1)
    if whole.all():
        missing = int(gaps.round().sum()) - len(gaps)
        return f"{missing} of its slices are missing (a gap of {steps.max():.1f} mm where {usual:.1f} is usual)"
    return f"its slices lie unevenly, {steps.min():.2f} to {steps.max():.2f} mm apart"


def load_series(series: Series) -> sitk.Image:
    """The pixels of a series with its place in the patient, float32 (size: columns, rows, slices; mm; left, back, up).

    Rescale slope and intercept are applied, MONOCHROME1 is turned so that bright is bright. Raises MedFLError for a series
    with problems, for a file that can't be decoded, and where a decoder is not installed.
    """
    if series.problems:
        raise MedFLError(f"the series “{series.description}” can't be used: {'; '.join(series.problems)}")
    volume = np.empty((series.slices, series.rows, series.columns), np.float32)
    whole = pydicom.dcmread(series.files[0]) if series.frames else None
    for index in range(series.slices):
        path = series.files[0 if series.frames else index]
        volume[index] = _decode(path, whole, series.frames[index] if series.frames else 0)
    image = sitk.GetImageFromArray(volume)
    between, row, column = series.spacing
    image.SetSpacing((column, row, between))
    image.SetOrigin(series.origin)
    image.SetDirection(np.stack([series.orientation[:3], series.orientation[3:], series.normal], axis=1).ravel().tolist())
    return image


def _decode(path: Path, whole: pydicom.Dataset | None, frame: int) -> np.ndarray:
    """One slice's values, (rows, columns) float32."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of padding, and of what the decoder then raises
            content = whole if whole is not None else pydicom.dcmread(path)
            syntax = content.file_meta.TransferSyntaxUID
            if syntax.is_compressed and not _can_decode(syntax):
                raise MedFLError(f"{path} is compressed ({syntax.name}), and nothing here can decode it; "
                                 "`pip install -r requirements-dicom.txt`, or export without compression")
            stored = pixel_array(content, index=frame)
    except MedFLError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds for a damaged file
        raise MedFLError(f"{path} can't be decoded (truncated or damaged); export it again") from error
    if content.PhotometricInterpretation == "MONOCHROME1":
        stored = (-1 if content.PixelRepresentation else 2**content.BitsStored - 1) - stored.astype(np.int64)
    return _rescaled(content, stored, frame).astype(np.float32)


def _can_decode(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:  # films, for instance
        return False


def _rescaled(content: pydicom.Dataset, stored: np.ndarray, frame: int) -> np.ndarray:
    """Stored values to the values they stand for: the transformation lies in the file, or in functional groups of frames."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        if index < len(content.get(groups) or ()) and content[groups].value[index].get("PixelValueTransformationSequence"):
            return apply_modality_lut(stored, content[groups].value[index].PixelValueTransformationSequence[0])
    return apply_modality_lut(stored, content)
