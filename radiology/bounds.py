"""What a DICOM file may claim, checked before memory is taken for it: the length of its header, the number of its
items, the size of its picture and of what it inflates to."""

import contextlib
import io
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomIO
from pydicom.filereader import read_dataset, read_partial
from pydicom.filewriter import write_file_meta_info
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from borders.limits import (
    MAX_ELEMENTS,
    MAX_HEADER,
    MAX_ITEMS,
    MAX_READINGS,
    MAX_SEGMENTS,
    MAX_SIDE,
    MAX_UNPACKED,
    fits,
)
from common import MedFLError

# warnings about odd values quote them: a patient's date of birth in an old form would get into a worker's log
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

PREAMBLE = 132  # bytes, which end in DICM
META = 0x0002  # the group of tags that says how the file is written
ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # the start of each sequence item, in either byte order
PIXELS = {0x7FE00008, 0x7FE00009, 0x7FE00010}  # tags that hold them, as fractions or whole numbers


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


class Readings:
    """How often files may still be read from. pydicom reads one to three times for each element of a header and of its
    sequences, and each reading costs microseconds, however short the element is.

    files: how many share this number.
    """

    def __init__(self, files: int = 1):
        self.left = MAX_READINGS + files * MAX_ELEMENTS

    def of(self, file: Any) -> Any:
        return CountedFile(file, self)


class CountedFile:
    """A file whose readings are counted. Raises MedFLError when none is left."""

    def __init__(self, file: Any, readings: Readings):
        self._file, self._readings = file, readings

    def read(self, size: int = -1) -> bytes:
        self._readings.left -= 1
        if self._readings.left < 0:
            raise MedFLError("holds far too many elements in the sequences of its header; export it again")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def check_bounds(path: File) -> None:
    """Raises MedFLError for a file that claims more than can be read. A damaged file, or one that is not DICOM,
    passes: its reader reports that."""
    refusal = None
    with contextlib.suppress(Exception), path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            beginning, length = beginning_of(path, file)
            tags = ["Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "SegmentSequence"]
            header = read_up_to_pixels(beginning, tags, Readings())
            check_size(header, length, length - beginning.tell())
            if (segments := len(header.get("SegmentSequence") or ())) > MAX_SEGMENTS:
                raise MedFLError(f"holds {segments:,} segments; export the tumour's by itself")
        except MedFLError as error:
            refusal = MedFLError(f"{path} {error}")
    if refusal:
        raise refusal


def read_up_to_pixels(file: Any, tags: list, readings: Readings) -> pydicom.Dataset:
    """These tags of a file, read up to its pixels. Raises MedFLError for a header with far too many elements."""
    elements = 0

    def stop(tag: int, *_: Any) -> bool:
        nonlocal elements
        elements += 1
        if elements > MAX_ELEMENTS:
            raise MedFLError(f"holds more than {MAX_ELEMENTS:,} elements in its header; export it again")
        return tag in PIXELS

    return read_partial(readings.of(file), stop, specific_tags=[Tag(tag) for tag in tags])


def read_with_pixels(path: File) -> pydicom.Dataset:
    """A file's header and pixels. What lies behind the pixels is not read: nothing there is needed, and nothing has
    checked it. Raises MedFLError for pixels in far too many pieces."""
    is_behind = False

    def stop(tag: int, *_: Any) -> bool:
        nonlocal is_behind
        ends, is_behind = is_behind, is_behind or tag in PIXELS
        return ends

    with path.open("rb") as file:
        content = read_partial(file, stop)
    pixels = content.get("PixelData") or b""
    packed = UID(content.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)).is_compressed
    if packed and pixels.count(ITEMS[0]) > MAX_ITEMS:
        raise MedFLError(f"{path} holds its pixels in more than {MAX_ITEMS:,} pieces; export it again")
    return content


def beginning_of(path: File, file: Any) -> tuple[Any, int]:
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


def check_size(header: pydicom.Dataset, length: int, left: int) -> None:
    """Raises MedFLError for a picture that claims more pixels than can be read, before memory is allocated for
    them. length: bytes of the file; left: bytes from its pixels on."""
    frames, rows, columns = int(header.get("NumberOfFrames") or 1), int(header.Rows), int(header.Columns)
    if not fits((frames, rows, columns)) or max(rows, columns) > MAX_SIDE:
        raise MedFLError(
            f"claims {frames:,} frames of {columns}×{rows} pixels, more than can be read at once; export it "
            "in smaller series"
        )
    pixels = frames * rows * columns * 8 * (header.get("SamplesPerPixel") or 1)
    if left > pixels + MAX_HEADER or length - left >= MAX_HEADER:
        raise MedFLError("holds far more data than its picture; export it again without the additions")
