"""The header of a DICOM file: whether the file is a picture, where its slices lie, and the problems that can be
seen in this file."""

import warnings
from typing import Any, NamedTuple

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    UID,
    AllTransferSyntaxes,
    ImplicitVRLittleEndian,
)

from borders.limits import MAX_HEADER
from common import MedFLError
from radiology.bounds import File, Readings, beginning_of, check_size, read_up_to_pixels
from radiology.values import look_up, number_in, numbers_in, several_in, time_in, whole_number_in

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


GREY = ("MONOCHROME1", "MONOCHROME2")


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


def read_header(path: File, readings: Readings | None = None) -> Header:
    """The header of a file; no pixel is read. readings: what it may cost, if several files share that.

    Raises MedFLError for a file that is not a DICOM picture.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deviations from the standard that can still be read
            beginning, length = beginning_of(path, file)
            header = read_up_to_pixels(beginning, TAGS, readings or Readings())
            _refuse_what_is_no_picture(header)
            left = length - beginning.tell()
            if header.get("Modality") != "RTSTRUCT":
                check_size(header, length, left)
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
        raise MedFLError("not a DICOM file; leave it out of the export") from error
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
            f"{kind.name.removesuffix(' Storage')}, which is not a picture of a scan; it is not needed"
        )
    if header.get("Modality") in NOT_PICTURES:
        raise MedFLError(f"of modality {header.Modality}, which holds no pictures; it is not needed")
    if header.get("Modality") != "RTSTRUCT" and not (header.get("Rows") and header.get("Columns")):
        raise MedFLError("holds no picture, or is cut off within its header; export it again if it should")


def _place(position: Any, orientation: Any, pixel_spacing: Any) -> Place | None:
    """The place of a slice from these tags' values, or None."""
    first, directions, between = (
        numbers_in(position, 3),
        numbers_in(orientation, 6),
        numbers_in(pixel_spacing, 2),
    )
    if first is None or directions is None or between is None:
        return None
    return Place(first, directions, between)


def _describe(header: pydicom.Dataset, uid: str) -> dict:
    """The fields of a Series that are read from its first file."""
    kind, number = (
        tuple(map(str, several_in(header.get("ImageType")))),
        whole_number_in(header.get("SeriesNumber")),
    )

    def text(name: str) -> str:
        return str(header.get(name) or "").strip()

    return dict(
        uid=uid,
        study_uid=text("StudyInstanceUID"),
        patient_id=text("PatientID"),
        modality=text("Modality"),
        description=text("SeriesDescription"),
        number=number,
        protocol=text("ProtocolName"),
        sequence=text("SequenceName"),
        image_type=kind,
        contrast_agent=text("ContrastBolusAgent") or _agent(header),
        repetition_time=time_in(
            header, "RepetitionTime", "MRTimingAndRelatedParametersSequence", "RepetitionTime"
        ),
        echo_time=time_in(header, "EchoTime", "MREchoSequence", "EffectiveEchoTime"),
        inversion_time=time_in(header, "InversionTime", "MRModifierSequence", "InversionTimes"),
        field_strength=number_in(header.get("MagneticFieldStrength")),
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
    stored, highest = number_in(header.get("BitsStored")), number_in(header.get("HighBit"))
    if stored is not None and highest is not None and highest != stored - 1:
        problems.append(
            f"its values of {stored:.0f} bits end at bit {highest:.0f}, an old form that can't be read; export it again"
        )
    syntax = UID(header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    if syntax not in AllTransferSyntaxes:  # and not those that another package registered
        name = "" if syntax.name == syntax else f" ({syntax.name})"
        problems.append(
            f"its pixels are stored in the transfer syntax {syntax}{name}, which MedFL can't read; export "
            "it as Explicit VR Little Endian"
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
    if "MOSAIC" in (str(part).upper() for part in several_in(header.get("ImageType"))):
        return True
    owner, name = MOSAIC_OWNER
    owned = owner in header and str(header[owner].value) == name
    return bool(owned and MOSAIC in header and (number_in(header[MOSAIC].value) or 0) > 1)


def _slices_of(path: File, header: pydicom.Dataset) -> list[Slice]:
    """The slices of a file: one, or one for each frame, with its geometry from the functional groups."""
    if header.get("Modality") == "RTSTRUCT":
        return [Slice(path, None, None, (0, 0), 0.0)]
    frames, matrix = int(header.get("NumberOfFrames") or 1), (int(header.Rows), int(header.Columns))
    if frames == 1 and not header.get("PerFrameFunctionalGroupsSequence"):
        thickness = (
            number_in(header.get("SpacingBetweenSlices")) or number_in(header.get("SliceThickness")) or 0.0
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
            number_in(look_up(header, frame, "PixelMeasuresSequence", "SpacingBetweenSlices"))
            or number_in(look_up(header, frame, "PixelMeasuresSequence", "SliceThickness"))
            or 0.0
        )
        place = _place(
            look_up(header, frame, "PlanePositionSequence", "ImagePositionPatient"),
            look_up(header, frame, "PlaneOrientationSequence", "ImageOrientationPatient"),
            look_up(header, frame, "PixelMeasuresSequence", "PixelSpacing"),
        )
        found.append(Slice(path, frame, place, matrix, thickness))
    return found
