"""How large a compressed frame says that it is, read from its own first bytes: a decoder allocates what they
ask for, whatever the DICOM header tells."""

import struct

import pydicom
from pydicom.encaps import get_frame

from common import MedFLError

JPEG, JPEG_2000 = b"\xff\xd8", b"\xff\x4f\xff\x51"
NO_FRAME = {
    0xC4,
    0xC8,
    0xCC,
}  # among the markers C0 to CF of JPEG that begin a frame; F7 begins one of JPEG-LS
BEGINNING = 2**10  # bytes in which the size of JPEG 2000 stands, also within a file's boxes


def check_frame(content: pydicom.Dataset, frame: int) -> None:
    """Raises MedFLError for a compressed frame of another size than the header's, and for one that is far
    longer than its pixels; errors of pydicom for one that is not there."""
    if not content.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    frames, rows, columns = int(content.get("NumberOfFrames") or 1), int(content.Rows), int(content.Columns)
    data = get_frame(content.PixelData, frame, number_of_frames=frames)
    told = told_size(data)
    pixels = rows * columns * max(1, content.BitsAllocated // 8)
    if told not in (None, (rows, columns)) or len(data) > 2 * pixels + BEGINNING:
        raise MedFLError(
            f"a frame says that it has {'×'.join(map(str, told[::-1])) if told else 'more'} pixels, and the header "
            f"{columns}×{rows}; export it again"
        )


def told_size(data: bytes) -> tuple[int, int] | None:
    """Rows and columns of a frame of JPEG, JPEG-LS or JPEG 2000; None of another kind. Raises struct.error
    where it is cut off."""
    start = data[:BEGINNING].find(JPEG_2000)
    if start >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        return bottom - top, right - left
    if data[:2] != JPEG:
        return None
    place = 2
    while True:
        marker, length = struct.unpack_from(">xBH", data, place)
        if (0xC0 <= marker <= 0xCF and marker not in NO_FRAME) or marker == 0xF7:
            rows, columns = struct.unpack_from(">HH", data, place + 5)
            return rows, columns
        place += 2 + length
