"""The header of a DICOM file: whether the file is a picture, where its slices lie, and the problems that can be
seen in this file."""

import contextlib
import io
import math
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    UID,
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from borders.limits import MAX_HEADER, MAX_ITEMS, MAX_SEGMENTS, MAX_SIDE, MAX_UNPACKED, fits
from common import MedFLError

# warnings about odd values quote them: a patient's date of birth in an old form would get into a worker's log
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

DIRECTORY = "1.2.840.10008.1.3.10"  # Media Storage Directory
OTHER_MODALITY = (
    "it is of modality"  # the beginning of this problem's text; a segmentation has it, and can still be used
)
OUTLINES = ("SEG", "RTSTRUCT")  # modalities of masks, whose geometry is read later
# the ends of the names of SOP classes for pictures, and for outlines on them
PICTURES = ("Image Storage", "Segmentation Storage", "Standalone Overlay Storage", "RT Structure Set Storage")
MOSAIC = (0x0019, 0x100A)  # Siemens: the number of pictures in a mosaic, if the private block is Siemens'
MOSAIC_OWNER = (0x0019, 0x0010), "SIEMENS MR HEADER"
NOT_PICTURES = {"RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC", "RWV", "FID"}
TAGS: list = [  # the tags that are read
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
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "NumberOfFrames",
    "FrameOfReferenceUID",
    "BurnedInAnnotation",
    "ConversionType",
    "MagneticFieldStrength",
    "Manufacturer",
    "ManufacturerModelName",
    "ReferencedSeriesSequence",
    "ReferencedFrameOfReferenceSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    MOSAIC,
    MOSAIC_OWNER[0],
]


PREAMBLE = 132  # bytes, which end in DICM
META = 0x0002  # the group of tags that says how the file is written
ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # the start of each sequence item, in either byte order
GREY = ("MONOCHROME1", "MONOCHROME2")


class InMemory(io.BytesIO):
    """A file in memory that can be read like one on disk. Reading the object itself continues where the last reader
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
    """Where a slice lies: the position of its first pixel, the directions of its rows and columns, and the mm
    between rows and columns."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, ...]


class Slice(NamedTuple):
    """The data kept from a slice's header. place: None if a part of it is missing."""

    path: File
    frame: int | None
    place: Place | None
    matrix: tuple[int, int]
    thickness: float


class Header(NamedTuple):
    """The data kept from a file: its own uid, its series' uid, the fields for `Series`, its problems and its
    slices."""

    instance: str
    series: str
    about: dict
    problems: list[str]
    slices: list[Slice]


def read_header(path: File) -> Header:
    """The header of a file; no pixel is read. Raises MedFLError for a file that is not a DICOM picture."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deviations from the standard that can still be read
            beginning, length = _beginning(path, file)
            header = pydicom.dcmread(beginning, stop_before_pixels=True, specific_tags=TAGS)
            _refuse_what_is_no_picture(header)
            left = length - beginning.tell()
            if header.get("Modality") != "RTSTRUCT":
                _check_size(header, length, left)
            elif length > MAX_HEADER:  # it has no pixels, and each number becomes an object
                raise MedFLError(
                    f"holds more than {MAX_HEADER >> 20} MB of outlines; export the tumour's by itself"
                )
            uid = str(header.get("SeriesInstanceUID") or path)
            return Header(
                str(header.get("SOPInstanceUID") or path),
                uid,
                _describe(header, uid),
                _problems_of_file(path, header, left),
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
    except Exception as error:  # pydicom converts values when they are read; damaged ones raise many kinds
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
    if header.get("Modality") != "RTSTRUCT" and not (header.get("Rows") and header.get("Columns")):
        raise MedFLError("holds no picture, or is cut off within its header; export it again if it should")


def check_bounds(path: File) -> None:
    """Raises MedFLError for a file that claims more than can be read. A damaged file, or one that is not DICOM,
    passes: its reader reports that."""
    refusal = None
    with contextlib.suppress(Exception), path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            beginning, length = _beginning(path, file)
            tags = ["Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "SegmentSequence"]
            header = pydicom.dcmread(beginning, stop_before_pixels=True, specific_tags=tags)
            _check_size(header, length, length - beginning.tell())
            if (segments := len(header.get("SegmentSequence") or ())) > MAX_SEGMENTS:
                raise MedFLError(f"holds {segments:,} segments; export the tumour's by itself")
        except MedFLError as error:
            refusal = MedFLError(f"{path} {error}")
    if refusal:
        raise refusal


def _beginning(path: File, file: Any) -> tuple[Any, int]:
    """The stream from which pydicom reads a file up to its pixels, and the length of the whole file in bytes, both
    after inflation. The stream of a large file is cut, so that a header with far too many elements ends. Raises
    MedFLError for a file that inflates to too much, and for a header with far too many sequence items."""
    length = path.stat().st_size
    if file.read(PREAMBLE)[128:] == b"DICM":
        meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != META)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            file = _plain(meta, _inflated(file.read()))
            length = len(file.getbuffer())
    file.seek(0)
    if length <= 2 * len(ITEMS[0]) * MAX_ITEMS:  # too short for too many items
        return file, length
    content = file.read(MAX_HEADER)
    if max(map(content.count, ITEMS)) > MAX_ITEMS:
        raise MedFLError(f"holds more than {MAX_ITEMS:,} items in its header; export it again")
    return io.BytesIO(content), length


def _plain(meta: pydicom.Dataset, content: bytes) -> io.BytesIO:
    """A deflated file after inflation. meta: the group of tags that says how the file is written."""
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    plain = io.BytesIO()
    plain.write(bytes(PREAMBLE - 4) + b"DICM")
    write_file_meta_info(DicomIO(plain), FileMetaDataset(meta), enforce_standard=False)
    plain.write(content)
    return plain


def _inflated(content: bytes) -> bytes:
    """The inflated data set of a deflated file. Raises MedFLError if it is too large, zlib.error if it is
    damaged."""
    unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, MAX_UNPACKED // 2 + 1)
    if len(unpacked) > MAX_UNPACKED // 2:
        raise MedFLError(f"unpacks to more than {MAX_UNPACKED >> 21} MB; export it without compression")
    return unpacked


def _check_size(header: pydicom.Dataset, length: int, left: int) -> None:
    """Raises MedFLError for a picture that claims more pixels than can be read, before memory is allocated for
    them. length: bytes of the file; left: bytes from its pixels on."""
    frames, rows, columns = int(header.get("NumberOfFrames") or 1), int(header.Rows), int(header.Columns)
    if not fits((frames, rows, columns)) or max(rows, columns) > MAX_SIDE:
        raise MedFLError(
            f"claims {frames:,} frames of {columns}×{rows} pixels, more than is read at once; export it in "
            f"smaller series"
        )
    pixels = frames * rows * columns * 8 * (header.get("SamplesPerPixel") or 1)
    if left > pixels + MAX_HEADER or length - left >= MAX_HEADER:
        raise MedFLError("holds far more than its picture; export it again without what was added to it")


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
    """The place of a slice from these tags' values, or None."""
    first, directions, between = _numbers(position, 3), _numbers(orientation, 6), _numbers(pixel_spacing, 2)
    if first is None or directions is None or between is None:
        return None
    return Place(first, directions, between)


def _describe(header: pydicom.Dataset, uid: str) -> dict:
    """The fields of a Series that are read from its first file."""
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
        references=_references(header),
    )


def _references(header: pydicom.Dataset) -> tuple[str, ...]:
    """The series that a segmentation or a structure set is of."""
    named = list(header.get("ReferencedSeriesSequence") or ())
    for frame in header.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            named += study.get("RTReferencedSeriesSequence") or ()
    return tuple(str(series.get("SeriesInstanceUID", "")) for series in named)


def _several(value: Any) -> tuple:
    """A tag's values, one or more."""
    if value is None or value == "":
        return ()
    return tuple(value) if isinstance(value, pydicom.multival.MultiValue) else (value,)


def _look_up(header: pydicom.Dataset, frame: int, macro: str, name: str) -> Any:
    """A value for a frame from the functional groups of a multi-frame object: the frame's own group comes before
    the shared group."""
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
    """The contrast agent of an enhanced object, "" if there is none."""
    agents = header.get("ContrastBolusAgentSequence") or ()
    return "; ".join(str(a.get("CodeMeaning") or a.get("CodeValue") or "unnamed") for a in agents)


def _problems_of_file(path: File, header: pydicom.Dataset, left: int) -> list[str]:
    """The problems that can be seen in this file, a sentence each. left: bytes from its pixels on."""
    problems = []
    modality = str(header.get("Modality") or "unknown")
    if modality != "MR":
        problems.append(f"{OTHER_MODALITY} {modality}, not MR")
    if "LOCALIZER" in (str(part).upper() for part in header.get("ImageType") or ()):
        problems.append("it is a localizer")
    if (header.get("SamplesPerPixel") or 1) != 1 or header.get(
        "PhotometricInterpretation", GREY[0]
    ) not in GREY:
        problems.append("it is in colour, a screen capture or a map, not a scan")
    if _is_mosaic(header):
        problems.append(
            "it is a mosaic, many slices in one picture; export it as an enhanced series, or convert it with dcm2niix"
        )
    if modality == "RTSTRUCT":  # without pixels
        return problems
    stored, highest = _number(header.get("BitsStored")), _number(header.get("HighBit"))
    if stored is not None and highest is not None and highest != stored - 1:
        problems.append(
            f"its values of {stored:.0f} bits end at bit {highest:.0f}, an old form that can't be read; export it again"
        )
    syntax = UID(header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    if syntax not in AllTransferSyntaxes:  # and not those that another package registered
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
    """The slices of a file: one, or one for each frame, with its geometry from the functional groups."""
    if header.get("Modality") == "RTSTRUCT":
        return [Slice(path, None, None, (0, 0), 0.0)]
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
