"""The size of a compressed frame is read where its decoder reads it, in whatever way the frame is written."""

import io
import struct

import numpy as np
import pytest
from bombs import dicom
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from common import MedFLError
from radiology.codestreams import check_frame, told_size

LARGE = struct.pack(">HH", 60_000, 60_000)


def picture(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(file, kind, **options)
    return file.getvalue()


def large_2000() -> bytes:
    small = picture("JPEG2000", no_jp2=True)
    return small[:8] + struct.pack(">2I", 60_000, 60_000) + small[16:]


def in_boxes(stream: bytes, before: bytes) -> bytes:
    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", 8 + len(content)) + kind + content

    return box(b"jP  ", b"\r\n\x87\n") + box(b"free", before) + box(b"jp2c", stream)


def frame(kind: str) -> bytes:
    jpeg, stream = picture("JPEG"), large_2000()
    start = jpeg.index(b"\xff\xc0")
    large = jpeg[:start] + jpeg[start : start + 5] + LARGE + jpeg[start + 9 :]
    return {
        "behind a long box": in_boxes(stream, bytes(3_000)),
        "behind a box with another's size": in_boxes(stream, picture("JPEG2000", no_jp2=True)[:100]),
        "behind an unknown marker": stream[:2] + b"\xff\x30" + stream[2:],
        "behind bytes that fill": large[:start] + b"\xff" + large[start:],
        "of frames of a larger one": jpeg[:start]
        + b"\xff\xde"
        + large[start + 2 : start + 13]
        + jpeg[start:],
        "behind a byte": b"\0" + large,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "behind a long box",
        "behind a box with another's size",
        "behind an unknown marker",
        "behind bytes that fill",
        "of frames of a larger one",
        "behind a byte",
    ],
)
def test_a_large_frame_is_refused_wherever_its_size_stands(kind):
    syntax = JPEGBaseline8Bit if b"\xff\xc0" in frame(kind) else JPEG2000Lossless
    with pytest.raises((MedFLError, ValueError)):
        check_frame(dicom(syntax=syntax, PixelData=encapsulate([frame(kind)])), 0)


def test_the_decoder_gets_the_frame_that_was_checked():
    """A table of offsets could lead it to another one."""
    small, large = picture("JPEG2000", no_jp2=True), large_2000()
    small, large = small + bytes(len(small) % 2), large + bytes(len(large) % 2)
    file = dicom(
        syntax=JPEG2000Lossless,
        PixelData=encapsulate([small, large], has_bot=False),
        ExtendedOffsetTable=struct.pack("<Q", 8 + len(small)),
        ExtendedOffsetTableLengths=struct.pack("<Q", len(large)),
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
    )
    check_frame(file, 0)
    assert file.pixel_array.shape == (64, 64)


def test_sizes_in_boxes_and_behind_bytes_that_fill_are_read():
    jpeg = picture("JPEG")
    start = jpeg.index(b"\xff\xc0")
    assert told_size(picture("JPEG2000")) == told_size(picture("JPEG2000", no_jp2=True)) == (64, 64)
    assert told_size(jpeg) == told_size(jpeg[:start] + b"\xff\xff" + jpeg[start:]) == (64, 64)
