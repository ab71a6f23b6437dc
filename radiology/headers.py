"""What a DICOM file's header says: whether it is a picture, where its slices lie, and what is wrong with it
by itself."""

import io
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, ImplicitVRLittleEndian

from common import MedFLError

DIRECTORY = "1.2.840.10008.1.3.10"  # Media Storage Directory
OTHER_MODALITY = (
    "it is of modality"  # how that problem begins: a segmentation has it, and is of use all the same
)
PICTURES = (
    "Image Storage",
    "Segmentation Storage",
    "Standalone Overlay Storage",
)  # how classes of pictures are called
MOSAIC = (0x0019, 0x100A)  # Siemens: the number of pictures in a mosaic, where its block is reserved
MOSAIC_OWNER = (0x0019, 0x0010), "SIEMENS MR HEADER"
NOT_PICTURES = {"RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC", "RWV", "FID"}
TAGS: list = [  # what is read of a header
    "StudyDate",
    "StudyTime",
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "Modality",
    "SeriesDescription",
    "ProtocolName",
    "SequenceName",
    "SeriesNumber",
    "ImageType",
    "ContrastBolusAgent",
    "ContrastBolusAgentSequence",
    "RepetitionTime",
    "EchoTime",
    "InversionTime",
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "SliceThickness",
    "SpacingBetweenSlices",
    "SamplesPerPixel",
    "BitsAllocated",
    "NumberOfFrames",
    "FrameOfReferenceUID",
    "BurnedInAnnotation",
    "ConversionType",
    "MagneticFieldStrength",
    "Manufacturer",
    "ManufacturerModelName",
    "ReferencedSeriesSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    MOSAIC,
    MOSAIC_OWNER[0],
]


class InMemory(io.BytesIO):
    """A file in memory that is read as one on disk. Who reads its content begins where the last reader
    stopped."""

    def __init__(self, name: str, content: bytes):
        super().__init__(content)
        self.name = name.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.name

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=len(self.getvalue()))

    def open(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self.getvalue())


File = Path | InMemory


class Place(NamedTuple):
    """Where a slice lies: its first pixel, the directions of its rows and columns, mm between rows and
    columns."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, ...]


class Slice(NamedTuple):
    """What is kept of a slice's header; place is None where a part of it is missing."""

    path: File
    frame: int | None
    place: Place | None
    matrix: tuple[int, int]
    thickness: float


class Header(NamedTuple):
    """What is kept of a file: its own uid and its series', the fields of a Series that it tells, its faults,
    its slices."""

    instance: str
    series: str
    about: dict
    problems: list[str]
    slices: list[Slice]


def read_header(path: File) -> Header:
    """What a file's header says; no pixel is read. Raises MedFLError for what is no DICOM picture."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what deviates from the standard and can be read
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
            _refuse_what_is_no_picture(header)
            uid = str(header.get("SeriesInstanceUID") or path)
            return Header(
                str(header.get("SOPInstanceUID") or path),
                uid,
                _describe(header, uid),
                _problems_of_file(path, header, path.stat().st_size - file.tell()),
                _slices_of(path, header),
            )
    except MedFLError:
        raise
    except InvalidDicomError as error:
        raise MedFLError("no DICOM file; leave it out of the export") from error
    except OSError as error:
        raise MedFLError(
            f"can't be read ({error.strerror or error}); check its permissions and copy it again"
        ) from error
    except (
        Exception
    ) as error:  # pydicom converts values when they are asked for, and raises many kinds for damaged ones
        raise MedFLError("damaged or cut off within its header; export it again") from error


def _refuse_what_is_no_picture(header: pydicom.Dataset) -> None:
    if str(header.file_meta.get("MediaStorageSOPClassUID", "")) == DIRECTORY:
        raise MedFLError("a DICOMDIR, the list of a medium's files; it is not needed")
    kind = UID(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or ""))
    if kind.type == "SOP Class" and not kind.name.endswith(PICTURES):
        raise MedFLError(
            f"{kind.name.removesuffix(' Storage')}, which is no picture of a scan; it is not needed"
        )
    if header.get("Modality") in NOT_PICTURES:
        raise MedFLError(f"of modality {header.Modality}, which holds no pictures; it is not needed")
    if not (header.get("Rows") and header.get("Columns")):
        raise MedFLError("holds no picture, or is cut off within its header; export it again if it should")


def _number(value: Any) -> float | None:
    """The first number in a tag's value, or None."""
    try:
        number = float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
    except (TypeError, ValueError, IndexError):
        return None
    return number if math.isfinite(number) else None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """A tag's `count` finite numbers, or None."""
    try:
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _place(position: Any, orientation: Any, pixel_spacing: Any) -> Place | None:
    """Where a slice lies by these tags' values, or None."""
    first, directions, between = _numbers(position, 3), _numbers(orientation, 6), _numbers(pixel_spacing, 2)
    if first is None or directions is None or between is None:
        return None
    return Place(first, directions, between)


def _describe(header: pydicom.Dataset, uid: str) -> dict:
    """The fields of a Series that its first file tells."""
    kind, number = tuple(map(str, _several(header.get("ImageType")))), _number(header.get("SeriesNumber"))

    def text(name: str) -> str:
        return str(header.get(name) or "").strip()

    return dict(
        uid=uid,
        study_uid=text("StudyInstanceUID"),
        patient_id=text("PatientID"),
        modality=text("Modality"),
        description=text("SeriesDescription"),
        number=None if number is None else int(number),
        protocol=text("ProtocolName"),
        sequence=text("SequenceName"),
        image_type=kind,
        contrast_agent=text("ContrastBolusAgent") or _agent(header),
        repetition_time=_time(
            header, "RepetitionTime", "MRTimingAndRelatedParametersSequence", "RepetitionTime"
        ),
        echo_time=_time(header, "EchoTime", "MREchoSequence", "EffectiveEchoTime"),
        inversion_time=_time(header, "InversionTime", "MRModifierSequence", "InversionTimes"),
        field_strength=_number(header.get("MagneticFieldStrength")),
        manufacturer=text("Manufacturer"),
        model=text("ManufacturerModelName"),
        frame_of_reference=text("FrameOfReferenceUID"),
        person=(text("PatientName"), text("PatientBirthDate"), text("PatientSex")),
        burnt_in=text("BurnedInAnnotation").upper() == "YES"
        or "SECONDARY" in kind[1:2]
        or bool(text("ConversionType")),
        when=text("StudyDate") + text("StudyTime"),
        references=tuple(
            str(r.get("SeriesInstanceUID", "")) for r in header.get("ReferencedSeriesSequence") or ()
        ),
    )


def _several(value: Any) -> tuple:
    """A tag's values, one or more."""
    if value is None or value == "":
        return ()
    return tuple(value) if isinstance(value, pydicom.multival.MultiValue) else (value,)


def _look_up(header: pydicom.Dataset, frame: int, macro: str, name: str) -> Any:
    """What the functional groups of a multi-frame object say of a frame: its own go before the shared."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = header.get(groups) or ()
        if index < len(sequence) and sequence[index].get(macro):
            return sequence[index][macro].value[0].get(name)
    return None


def _time(header: pydicom.Dataset, name: str, macro: str, within: str) -> float | None:
    """A time in ms, from its own tag or from the functional groups."""
    classic = _number(header.get(name))
    return _number(_look_up(header, 0, macro, within)) if classic is None else classic


def _agent(header: pydicom.Dataset) -> str:
    """The contrast agent of an enhanced object, "" where there is none."""
    agents = header.get("ContrastBolusAgentSequence") or ()
    return "; ".join(str(a.get("CodeMeaning") or a.get("CodeValue") or "unnamed") for a in agents)


def _problems_of_file(path: File, header: pydicom.Dataset, left: int) -> list[str]:
    """What is wrong with a file by itself, a sentence each; left: bytes from its pixels on."""
    problems = []
    modality = str(header.get("Modality") or "unknown")
    if modality != "MR":
        problems.append(f"{OTHER_MODALITY} {modality}, not MR")
    if "LOCALIZER" in (str(part).upper() for part in header.get("ImageType") or ()):
        problems.append("it is a localizer")
    if (header.get("SamplesPerPixel") or 1) != 1:
        problems.append("it is in colour, a screen capture or a map, not a scan")
    if _is_mosaic(header):
        problems.append(
            "it is a mosaic, many slices in one picture; export it as an enhanced series, or convert it with dcm2niix"
        )
    syntax = UID(header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    if not syntax.is_transfer_syntax or syntax.is_private:
        name = "" if syntax.name == syntax else f" ({syntax.name})"
        problems.append(
            f"its pixels are stored by the transfer syntax {syntax}{name}, which nothing here knows; export it as "
            "Explicit VR Little Endian"
        )
        return problems
    pixels = (
        header.Rows
        * header.Columns
        * (header.get("NumberOfFrames") or 1)
        * (header.get("SamplesPerPixel") or 1)
    )
    if (
        not (syntax.is_compressed or syntax.is_deflated)
        and left < pixels * (header.get("BitsAllocated") or 16) // 8
    ):
        problems.append(f"{path.name} is truncated; export it again")
    return problems


def _is_mosaic(header: pydicom.Dataset) -> bool:
    if "MOSAIC" in (str(part).upper() for part in _several(header.get("ImageType"))):
        return True
    owner, name = MOSAIC_OWNER
    owned = owner in header and str(header[owner].value) == name
    return bool(owned and MOSAIC in header and (_number(header[MOSAIC].value) or 0) > 1)


def _slices_of(path: File, header: pydicom.Dataset) -> list[Slice]:
    """The slices of a file: one, or one for each frame, whose geometry stands in functional groups."""
    frames, matrix = int(header.get("NumberOfFrames") or 1), (int(header.Rows), int(header.Columns))
    if frames == 1 and not header.get("PerFrameFunctionalGroupsSequence"):
        thickness = (
            _number(header.get("SpacingBetweenSlices")) or _number(header.get("SliceThickness")) or 0.0
        )
        place = _place(
            header.get("ImagePositionPatient"),
            header.get("ImageOrientationPatient"),
            header.get("PixelSpacing"),
        )
        return [Slice(path, None, place, matrix, thickness)]
    found = []
    for frame in range(frames):
        thickness = (
            _number(_look_up(header, frame, "PixelMeasuresSequence", "SpacingBetweenSlices"))
            or _number(_look_up(header, frame, "PixelMeasuresSequence", "SliceThickness"))
            or 0.0
        )
        place = _place(
            _look_up(header, frame, "PlanePositionSequence", "ImagePositionPatient"),
            _look_up(header, frame, "PlaneOrientationSequence", "ImageOrientationPatient"),
            _look_up(header, frame, "PixelMeasuresSequence", "PixelSpacing"),
        )
        found.append(Slice(path, frame, place, matrix, thickness))
    return found
