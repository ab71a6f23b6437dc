"""How much what comes from outside may ask for. Readers ask here, with what a header says, before anything is
decoded or allocated.

One budget holds for all of them: reading a case, a series or a model takes less than `BUDGET` bytes, however
much a file of a few bytes claims to hold. Sizes that are told twice are told here only.
"""

import json
import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

BUDGET = 2**30  # bytes that reading may take
MAX_FILES = 1_000  # of one case, masks and all
MAX_UNPACKED = BUDGET // 4  # bytes that an archive may unpack to
MAX_VOXELS = BUDGET // 16  # of a series: float32, and turning, resampling and comparing hold four at once
MAX_PIXELS = 12 * 2**20  # of a case on a page: 192 slices of 256×256; normalising more needs over 1.5 GiB
MAX_SIDE = 4096  # pixels of a slice; larger than any of a brain
MAX_SLICES = 4096  # of a volume or a file of several frames
MAX_NETWORK_SIDE = 1024  # pixels of a network's input
MAX_TEXT = 4 * 2**20  # bytes of a JSON file
MAX_HEADER = 8 * 2**20  # bytes of a DICOM file without its pixels
MAX_ITEMS = 100_000  # of all sequences in such a header; each becomes an object of a kilobyte
SIZES_MM = (0.01, 100.0)  # of a pixel, or between slices

_DIGITS = 18  # of a whole number in JSON; longer ones become a float, which may be infinite
# TIFF: bytes of a value by its type; (entry's bytes, count's and offset's format) of classic and big files
_TIFF_VALUES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8,
}  # fmt: skip
_TIFF_KINDS = {42: ("H", 12, "I", 4), 43: ("Q", 20, "Q", 8)}


def is_size_mm(value: object) -> bool:
    """Whether a number can be the millimetres of a pixel or between slices."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and SIZES_MM[0] <= value <= SIZES_MM[1]  # false for NaN, and true whole numbers of any length compare
    )


def fits(shape: Sequence[int], most: int = MAX_VOXELS) -> bool:
    """Whether (slices, rows, columns, ...) are sizes, and not more than `most` values together."""
    return all(side > 0 for side in shape) and shape[0] <= MAX_SLICES and math.prod(shape) <= most


def read_json(content: bytes | str) -> Any:
    """What a JSON text holds. Raises ValueError for more than `MAX_TEXT`, for brackets within brackets
    without end, and for what is no JSON."""
    if len(content) > MAX_TEXT:
        raise ValueError(f"more than {MAX_TEXT >> 20} MB of JSON")
    try:
        return json.loads(content, parse_int=lambda text: int(text) if len(text) <= _DIGITS else float(text))
    except RecursionError as error:
        raise ValueError("JSON within JSON without end") from error


def tiff_asks_for_more(file: IO[bytes], length: int) -> bool:
    """Whether the tags of a TIFF's first picture claim more bytes than the file has: a reader that collects
    them would take a gigabyte for a small file. Other files claim nothing."""
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    kind = _TIFF_KINDS.get(struct.unpack(f"{order}H", start[2:4])[0]) if order and len(start) == 16 else None
    if kind is None:
        return False
    count_format, entry_bytes, value_format, offset_bytes = kind
    file.seek(struct.unpack(f"{order}{value_format}", start[offset_bytes : 2 * offset_bytes])[0])
    head = file.read(struct.calcsize(count_format))
    if len(head) < struct.calcsize(count_format):
        return False  # cut off, as its reader will say
    (entries,) = struct.unpack(f"{order}{count_format}", head)
    if entries * entry_bytes > length:
        return True
    claimed = 0
    for entry in struct.iter_unpack(
        f"{order}HH{value_format}{value_format}", _whole(file, entries, entry_bytes)
    ):
        claimed += _TIFF_VALUES.get(entry[1], 0) * entry[2]
    return claimed > length


def _whole(file: IO[bytes], entries: int, entry_bytes: int) -> bytes:
    content = file.read(entries * entry_bytes)
    return content[: len(content) // entry_bytes * entry_bytes]


def unpacks_to_more(path: Path) -> bool:
    """Whether a file of torch, a ZIP, holds packed entries or claims more bytes than it has; torch packs
    nothing. Raises zipfile.BadZipFile for a damaged one."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    return packed or sum(entry.file_size for entry in entries) > path.stat().st_size
