"""A NRRD file leads to no bytes but its own, and a packed one to no more than is read at once."""

import bz2
import gzip
import io
import struct

import nibabel
import nrrd
import numpy as np
import pytest

import scans.nifti_file
from common import MedFLError
from scans.nifti_file import doubt, read_image, unlike_sizes

SCAN = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
ELSEWHERE = (
    "data file: {}",
    "datafile: {}",
    "data file: {} 0 0 1",
    "line skip: 999999999",
    "byte skip: 9",
)


def stored(*lines: str, voxels: bytes = SCAN.tobytes(order="F"), encoding: str = "raw") -> bytes:
    """A NRRD file of the scan with these lines in its header."""
    head = ["NRRD0004", "type: uint8", "dimension: 3", "sizes: 4 5 6", f"encoding: {encoding}", *lines]
    return "\n".join(head).encode() + b"\n\n" + voxels


@pytest.mark.parametrize("line", ELSEWHERE)
def test_a_header_that_leads_elsewhere_is_refused(tmp_path, line):
    """The page's users name files of their own machines only: what lies on the server is none of theirs."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(SCAN.size))
    with pytest.raises(MedFLError, match="split into several files"):
        read_image(stored(line.format(secret)))
    assert (read_image(stored("byte skip: 0")).dataobj == SCAN).all()


@pytest.mark.parametrize(
    "line",
    [
        "space directions: (1,0,0) (0,1,0)",
        "space directions: none (0,1,0) (0,0,1)",
        "space directions: (nan,0,0) (0,1,0) (0,0,1)",
        "space directions: (0,0,0) (0,0,0) (0,0,0)",
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0)",
    ],
)
def test_directions_that_can_not_be_right_are_told(line):
    with pytest.raises(MedFLError, match="directions, origin or spacings"):
        read_image(stored(f"space: left-posterior-superior\n{line}"))


@pytest.mark.parametrize("begins", [0, 100, float("nan")])
def test_voxels_do_not_begin_within_the_header(begins):
    """Read from byte 0, as some readers do, every voxel would lie beside its place."""
    content = bytearray(nibabel.Nifti1Image(SCAN, np.eye(4)).to_bytes())
    struct.pack_into("<f", content, 108, begins)
    with pytest.raises(MedFLError, match="within its header|header is damaged"):
        read_image(bytes(content))


def test_a_rotation_that_is_none_is_told():
    image = nibabel.Nifti1Image(SCAN, np.eye(4))
    image.set_qform(image.affine, 1)
    content = bytearray(image.to_bytes())
    struct.pack_into("<f", content, 256, 2.0)  # a quaternion that is longer than 1
    with pytest.raises(MedFLError, match="header is damaged"):
        doubt(read_image(bytes(content)).header)


def test_two_sizes_of_a_voxel_are_told():
    header = nibabel.Nifti1Image(SCAN, np.diag([-2.0, -2, 4, 1])).header
    assert unlike_sizes(header) is None
    header.set_qform(None, 0)
    header["pixdim"][1:4] = 1
    assert unlike_sizes(header) == "says that voxels measure 1 × 1 × 1 mm but places them 2 × 2 × 4 mm apart"


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("bz2", bz2.compress)])
def test_packed_voxels_are_read_whole_or_refused(monkeypatch, encoding, pack):
    whole = pack(SCAN.tobytes(order="F"))
    assert (read_image(stored(voxels=whole, encoding=encoding)).dataobj == SCAN).all()
    with pytest.raises(MedFLError, match="truncated"):
        read_image(stored(voxels=whole[:-3], encoding=encoding))
    monkeypatch.setattr(scans.nifti_file, "MAX_UNPACKED", SCAN.nbytes - 1)
    with pytest.raises(MedFLError, match="can't be read as NRRD"):
        read_image(stored(voxels=whole, encoding=encoding))


def test_voxels_that_are_written_as_text_are_refused_before_they_are_read():
    with pytest.raises(MedFLError, match="written as text"):
        read_image(stored(voxels=b"1 " * SCAN.size, encoding="ascii"))


def test_what_pynrrd_writes_is_read():
    file = io.BytesIO()
    nrrd.write(
        file,
        SCAN,
        {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": [0] * 3},
    )
    assert (read_image(file.getvalue()).dataobj == SCAN).all()


@pytest.mark.parametrize(
    ("told", "sizes"),
    [
        ({"space": "left-posterior-superior"}, (0.5, 0.5, 5.0)),
        ({"space": "scanner-xyz"}, (0.5, 0.5, 5.0)),
        ({"space dimension": 3}, (0.5, 0.5, 5.0)),
        ({}, (0.0, 0.0, 0.0)),
        ({"spacings": [0.5, 0.5, 5.0]}, (0.5, 0.5, 5.0)),
    ],
)
def test_voxels_of_a_nrrd_file_are_as_large_as_it_says_whatever_its_space(told, sizes):
    """Where nothing tells their size none is made up: no scan has voxels of 0 mm."""
    if told and "spacings" not in told:
        told = {**told, "space directions": np.diag([0.5, 0.5, 5.0])}
    file = io.BytesIO()
    nrrd.write(file, SCAN, told)
    assert tuple(map(float, read_image(file.getvalue()).header.get_zooms())) == sizes
