"""The size that a compressed frame states in its own first bytes: a decoder allocates that much memory, whatever
the DICOM header states."""

import struct
from collections.abc import Iterator
from io import BytesIO

import pydicom
from pydicom.encaps import get_frame
from pydicom.uid import RLELossless

from borders.limits import has_many_scans
from common import MedFLError

JPEG, JPEG_2000, BOXES = b"\xff\xd8", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"
NO_FRAME = {
    0xC4,
    0xC8,
    0xCC,
}  # among the markers C0 to CF of JPEG that begin a frame; F7 begins one of JPEG-LS
NO_SEGMENT = {
    0x00,
    0x01,
    *range(0xD0, 0xDB),
    0xDE,
}  # what never stands before a frame, or begins one of frames
MOST_PRECINCTS = (
    2**16
)  # in a JPEG 2000 frame; the decoder allocates half a kilobyte for each before it reads a pixel
MOST_TILES, MOST_COMPONENTS = 2**12, 4
SPARE = 2**10  # bytes by which a compressed frame may be longer than its pixels twice
# tables of offsets by which a decoder could take other bytes for a frame than are checked here; it does without them
OFFSETS = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")


def check_frame(content: pydicom.Dataset, frame: int) -> None:
    """Raises MedFLError for a compressed frame whose size differs from the header's, that is far longer than its
    pixels, or that has far too many parts; pydicom's errors for a frame that is not there. Takes tables of offsets
    away, so that the decoder finds the frame where it is checked."""
    syntax = content.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    for name in OFFSETS:
        content.pop(name, None)
    frames, rows, columns = int(content.get("NumberOfFrames") or 1), int(content.Rows), int(content.Columns)
    data = get_frame(content.PixelData, frame, number_of_frames=frames)
    told = told_size(data)
    pixels = rows * columns * max(1, content.BitsAllocated // 8)
    if has_many_scans(BytesIO(data)) or _is_cut_small(data, rows, columns):
        raise MedFLError("a frame is cut into more parts than any encoder makes; export it again")
    if told is None and syntax != RLELossless:  # which has no size of its own
        raise MedFLError("a frame does not begin with its size, as JPEG and JPEG 2000 do; export it again")
    if told not in (None, (rows, columns)) or len(data) > 2 * pixels + SPARE:
        raise MedFLError(
            f"a compressed frame states {'×'.join(map(str, told[::-1])) if told else 'more'} pixels, but "
            f"the header {columns}×{rows}; export it again"
        )


def _stream_2000(data: bytes) -> int | None:
    """Where a JPEG 2000 stream begins: with the frame, or in the box of it if the frame has a file's boxes. None for
    other kinds. Raises struct.error if the boxes are cut off, and ValueError for one that has no length."""
    place = 0
    if data.startswith(BOXES):
        while data[place + 4 : place + 8] != b"jp2c":
            (length,) = struct.unpack_from(">I", data, place)
            if length < 8:
                raise ValueError("a box without a length")
            place += length
        place += 8
    return place if data.startswith(JPEG_2000, place) else None


def _is_cut_small(data: bytes, rows: int, columns: int) -> bool:
    """Whether a JPEG 2000 frame is cut into far too many tiles, components or precincts. The sizes of precincts
    stand in COD and COC segments, anywhere before or between the pixels. Bytes count as such a segment only if they
    agree with its stated length."""
    start = _stream_2000(data)
    if start is None:
        return False
    wide, tall = struct.unpack_from(">2I", data, start + 24)
    (components,) = struct.unpack_from(">H", data, start + 40)
    tiles = -(-rows // max(tall, 1)) * -(-columns // max(wide, 1))
    if not wide or not tall or tiles > MOST_TILES or components > MOST_COMPONENTS:
        return True
    return any(
        _precincts(sizes, rows, columns) > MOST_PRECINCTS
        for marker, before in ((b"\xff\x52", 9), (b"\xff\x53", 6))
        for sizes in _precinct_sizes(data, marker, before)
    )


def _precinct_sizes(data: bytes, marker: bytes, before: int) -> Iterator[bytes]:
    """The sizes of precincts in the segments that begin with a marker: one byte for each resolution, the coarsest
    first. before: bytes from the marker to the number of levels."""
    place = data.find(marker)
    while place >= 0:
        head = data[place : place + before + 6]
        if len(head) == before + 6:
            levels, length = head[before], int.from_bytes(head[2:4], "big")
            if levels <= 32 and length == before + 4 + levels:
                yield data[place + before + 5 : place + before + 6 + levels]
        place = data.find(marker, place + 1)


def _precincts(sizes: bytes, rows: int, columns: int) -> int:
    """The number of precincts of a frame at all resolutions together."""
    count = 0
    for coarser, size in enumerate(reversed(sizes)):
        tall, wide = coarser + (size >> 4), coarser + (size & 15)
        count += ((rows - 1 >> tall) + 1) * ((columns - 1 >> wide) + 1)
    return count


def told_size(data: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 frame states; None for other kinds. Raises struct.error
    if the frame is cut off, and ValueError if it has no size where decoders look for it."""
    if (start := _stream_2000(data)) is not None:
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        return bottom - top, right - left
    if data[:2] != JPEG:
        return None
    place = 2
    while True:
        fill, marker, length = struct.unpack_from(">BBH", data, place)
        if fill != 0xFF or marker in NO_SEGMENT:
            raise ValueError("no segment of a JPEG")
        if marker == 0xFF:  # any number of them may fill
            place += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in NO_FRAME) or marker == 0xF7:
            rows, columns = struct.unpack_from(">HH", data, place + 5)
            return rows, columns
        place += 2 + length
