"""Limits for files from outside. Readers check the sizes in a header here before they decode or allocate anything.

One budget holds for all of them: reading a case, a series or a model takes less than `BUDGET` bytes, however much a
file of a few bytes claims to hold. Sizes that several modules need are defined only here.
"""

import json
import math
import struct
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal

BUDGET = 2**30  # bytes that reading may take
MAX_FILES = 1_000  # of one case, masks and all
MAX_NAME = 255  # characters of a file's name, as in file systems; patterns would search a longer one for ever
MAX_UNPACKED = BUDGET // 4  # bytes that an archive may unpack to
# Python unpacks other kinds without bounds: 1 kB to gigabytes
ZIP_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MAX_VOXELS = BUDGET // 16  # of a series: float32; turning, resampling and comparing hold four copies at once
MAX_PIXELS = 12 * 2**20  # of a case on a page: 192 slices of 256×256; normalising more needs over 1.5 GiB
MAX_SIDE = 4096  # pixels of a slice; larger than any of a brain
MAX_SLICES = 4096  # of a volume or a file of several frames
MAX_NETWORK_SIDE = 1024  # pixels of a network's input
MAX_TEXT = 4 * 2**20  # bytes of a JSON file
MAX_HEADER = 8 * 2**20  # bytes of a DICOM file without its pixels
MAX_SCANS = 100  # passes in which a JPEG is refined; each decodes the whole picture again, and ten are usual
MAX_LARGE = 1e15  # of a voxel's value; larger ones have squares that overflow single precision
MAX_ITEMS = 100_000  # of all sequences in such a header; each becomes an object of a kilobyte
MAX_ELEMENTS = 10_000  # of such a header, beside those in its items; each costs microseconds at every reading
MAX_READINGS = 500_000  # of the headers of one study beyond that; an object of 2,000 frames takes 400,000
MAX_SEGMENTS = (
    1_000  # of a DICOM SEG, whose reader takes 3 ms for each; an atlas of the brain has two hundred
)
SIZES_MM = (0.01, 100.0)  # of a pixel, or between slices

_PIECE = 2**20  # bytes that are looked through at a time
_DIGITS = 18  # of a whole number in JSON; longer ones become a float, which may be infinite
# TIFF: bytes of a value by its type; (entry's bytes, count's and offset's format) of classic and big files
_TIFF_VALUES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8,
}  # fmt: skip
_TILE = (322, 323)  # tags of a tile's columns and rows
_TIFF_KINDS = {42: ("H", 12, "I", 4), 43: ("Q", 20, "Q", 8)}


def is_size_mm(value: object) -> bool:
    """Whether a number can be the millimetres of a pixel or between slices."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and SIZES_MM[0] <= value <= SIZES_MM[1]  # false for NaN; whole numbers of any length compare
    )


def fits(shape: Sequence[int], most: int = MAX_VOXELS) -> bool:
    """Whether (slices, rows, columns, ...) are valid sizes with at most `most` values together."""
    return all(side > 0 for side in shape) and shape[0] <= MAX_SLICES and math.prod(shape) <= most


def read_json(content: bytes | str) -> Any:
    """The content of a JSON text. Raises ValueError for more than `MAX_TEXT`, for brackets nested too deeply, and
    for a text that is not JSON."""
    if len(content) > MAX_TEXT:
        raise ValueError(f"more than {MAX_TEXT >> 20} MB of JSON")
    try:
        return json.loads(content, parse_int=lambda text: int(text) if len(text) <= _DIGITS else float(text))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def read_json_file(path: Path) -> Any:
    """The content of a JSON file; no more than `MAX_TEXT` is read. Raises OSError, and ValueError as `read_json`."""
    with open(path, "rb") as file:
        return read_json(file.read(MAX_TEXT + 1))


def has_many_scans(file: IO[bytes]) -> bool:
    """Whether a file is a JPEG that is refined in more than `MAX_SCANS` passes, which take seconds per kilobyte."""
    scans, piece = 0, file.read(_PIECE)
    if not piece.startswith(b"\xff\xd8"):
        return False
    while piece:
        scans += piece.count(b"\xff\xda")
        piece = file.read(_PIECE)
    return scans > MAX_SCANS


def tiff_asks_for_more(file: IO[bytes], length: int) -> bool:
    """Whether a TIFF holds more than `MAX_FILES` pictures, tiles that are larger than any slice, or tags that claim
    more bytes than the file has: a reader would take a gigabyte, or minutes, for a small file. False for other
    files."""
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    kind = _TIFF_KINDS.get(struct.unpack(f"{order}H", start[2:4])[0]) if order and len(start) == 16 else None
    if kind is None:
        return False
    count_format, entry_bytes, value_format, offset_bytes = kind
    head_bytes, next_bytes = struct.calcsize(count_format), struct.calcsize(value_format)
    (place,) = struct.unpack(f"{order}{value_format}", start[offset_bytes : 2 * offset_bytes])
    for _ in range(MAX_FILES):
        if not 0 < place < length:
            return False  # the last picture, or cut off, which its reader will report
        file.seek(place)
        head = file.read(head_bytes)
        if len(head) < head_bytes:
            return False
        (entries,) = struct.unpack(f"{order}{count_format}", head)
        if entries * entry_bytes > length:
            return True
        tags = struct.iter_unpack(f"{order}HH{value_format}{next_bytes}s", _whole(file, entries, entry_bytes))
        little_or_big: Literal["little", "big"] = "little" if order == "<" else "big"
        if _claim_more(tags, little_or_big, length):
            return True
        place = int.from_bytes(file.read(next_bytes), little_or_big)
    return True


def _claim_more(
    tags: Iterable[tuple[int, int, int, bytes]], order: Literal["little", "big"], length: int
) -> bool:
    """Whether a picture's tags (number, type, count, value or its place) claim more than `length` bytes, or tiles of
    more than `MAX_SIDE` a side."""
    claimed = 0
    for number, kind, count, value in tags:
        claimed += _TIFF_VALUES.get(kind, 0) * count
        if number in _TILE and int.from_bytes(value[: _TIFF_VALUES.get(kind, 4)], order) > MAX_SIDE:
            return True
    return claimed > length


def _whole(file: IO[bytes], entries: int, entry_bytes: int) -> bytes:
    content = file.read(entries * entry_bytes)
    return content[: len(content) // entry_bytes * entry_bytes]
