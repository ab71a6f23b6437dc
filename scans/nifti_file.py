"""Reads a volume's file (NIfTI-1 or -2, or NRRD) completely, checks it against its own header, and returns
its orientation if the file gives one.

The preparation and the page read volumes only here. Needs nibabel, and pynrrd for NRRD, which are optional
for the page: both are imported when a file is read.
"""

import bz2
import gzip
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal

import numpy as np

from borders.limits import BUDGET, MAX_LARGE, MAX_UNPACKED, fits
from common import MedFLError
from scans.orientation import APART, distance_apart, is_sheared

WHOLE = 1e-4  # how far a label may lie from a whole number: 255 × 0.00392157 is 1.00000035
UNLIKE = 0.01  # share of a voxel's size by which its two records may differ
SUFFIXES = (".nii", ".nii.gz", ".nrrd")
GZIP, NRRD = b"\x1f\x8b", b"NRRD"
HEADERS = {348: "Nifti1Header", 540: "Nifti2Header"}  # nibabel's, by their length in bytes
HEAD = 544  # bytes that contain any header completely
MAX_BYTES = BUDGET // 3  # bytes of an unpacked file: they are held twice, beside the volume
NRRD_HEADER = 2**18  # bytes; a header of Slicer with a hundred segments has half as many
BEHIND = 2**20  # bytes that may lie behind a NIfTI file's voxels
OTHERS = {  # other formats that lie beside NIfTI in research folders
    (".mgz", ".mgh"): "is FreeSurfer's format; convert it with `mri_convert IN OUT.nii.gz`",
    (".img", ".hdr"): "is half of a pair (.hdr and .img); convert the pair to one .nii.gz file",
    (".mha", ".mhd"): "is MetaImage; convert it to .nii.gz (3D Slicer does)",
}
# entries of a NRRD header that point to other bytes: to any file of this machine, or behind any number of lines
NRRD_ELSEWHERE = ("data file", "datafile", "line skip", "lineskip", "byte skip", "byteskip")
NRRD_PACKED: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("gzip", "gz"), lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)),
    **dict.fromkeys(("bzip2", "bz2"), bz2.BZ2Decompressor),
}
NRRD_SPACES = {  # towards left, back, head
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
}


def stem(name: str) -> str:
    """A volume file's name without its ending; Slicer's `.seg.nrrd` keeps the `.seg`, which says what it is."""
    return re.sub(r"\.(nii(\.gz)?|nrrd)$", "", PurePath(name).name, flags=re.IGNORECASE)


def other_format(name: str) -> str | None:
    """For a file of another volume format, by its suffix: what it is and what to do with it."""
    return next((told for endings, told in OTHERS.items() if name.lower().endswith(endings)), None)


def read_head(file: BinaryIO) -> bytes:
    """The first bytes of a file, unpacked if it is gzipped, whatever its name. Raises MedFLError for a damaged
    gzip."""
    start = file.read(2)
    file.seek(0)
    try:
        return (gzip.GzipFile(fileobj=file) if start == GZIP else file).read(HEAD)
    except (OSError, EOFError, zlib.error) as error:
        raise MedFLError("is a damaged gzip file; copy it again") from error


def read_content(path: Path) -> bytes:
    """A file's bytes, unpacked to the end of the stream, so that a truncated file or a flipped bit is
    noticed, but no more than its header announces. Raises MedFLError, in words that follow the file's name,
    for a damaged file and one that holds more."""
    with path.open("rb") as file:
        head = read_head(file)
        most = MAX_BYTES if head[:4] == NRRD else promised(read_header(head)) + BEHIND
        if most > MAX_BYTES:
            raise MedFLError(
                "holds more voxels than can be read at once; make it smaller, or store it in single precision"
            )
        file.seek(0)
        start = file.read(2)
        file.seek(0)
        try:
            content = (gzip.GzipFile(fileobj=file) if start == GZIP else file).read(most + 1)
        except EOFError as error:
            raise MedFLError("is truncated: its gzip stream has no end; copy it again") from error
        except (OSError, zlib.error) as error:
            raise MedFLError("is a damaged gzip file; copy it again") from error
    if len(content) > most:
        raise MedFLError("holds more than its header says; export it again")
    return content


def header_length(head: bytes) -> int | None:
    """The length of the header that begins with these bytes, or None if they are not NIfTI."""
    orders: tuple[Literal["little", "big"], ...] = ("little", "big")
    return next((n for n in HEADERS for order in orders if int.from_bytes(head[:4], order) == n), None)


def read_header(head: bytes) -> Any:
    """nibabel's header of a NIfTI file that begins with these bytes. Raises MedFLError, in words that follow
    the file's name, if they are not such a header."""
    import nibabel

    if not head:
        raise MedFLError("is empty; copy it again")
    length = header_length(head)
    if length is None or len(head) < length:
        raise MedFLError("can't be read as NIfTI: it is damaged or another kind of file; copy it again")
    magic = head[344:348] if length == 348 else head[4:8]
    if magic[:3] in (b"ni1", b"ni2"):
        raise MedFLError("is the header of a pair (.hdr and .img); convert the pair to one .nii.gz file")
    if magic[:3] not in (b"n+1", b"n+2"):
        raise MedFLError(
            "is ANALYZE 7.5, which does not say where left is; convert the scan's DICOM files to NIfTI"
        )
    try:
        header = getattr(nibabel, HEADERS[length])(head[:length])
        begins = int(header["vox_offset"])
        promised(header), header.get_best_affine(), header.get_qform(coded=True), header.get_sform(coded=True)
    except Exception as error:  # nibabel raises many kinds of exceptions for impossible values
        raise MedFLError("can't be read as NIfTI: its header is damaged; copy it again") from error
    if begins < length + 4:  # some readers would take the header as voxels and shift all others
        raise MedFLError(f"says that its voxels begin at byte {begins}, within its header; convert it again")
    return header


def promised(header: Any) -> int:
    """The number of bytes that a file with this NIfTI header must have."""
    shape = header.get_data_shape()
    return int(header["vox_offset"]) + header.get_data_dtype().itemsize * int(np.prod(shape, dtype=object))


def read_image(content: bytes) -> Any:
    """nibabel's image of a file's unpacked bytes. Raises MedFLError, in words that follow the file's name,
    for a file that is damaged or truncated or holds complex numbers."""
    import nibabel

    if content[:4] == NRRD:
        return _read_nrrd(content)
    header = read_header(content[:HEAD])
    if header.get_data_dtype().kind == "c":
        raise MedFLError("holds complex numbers, but a scan has real ones; export its magnitude")
    if len(content) < promised(header):
        raise MedFLError(
            f"is truncated: its header promises {promised(header):,} bytes, but it has {len(content):,}; copy it again"
        )
    kind = nibabel.Nifti1Image if int(header["sizeof_hdr"]) == 348 else nibabel.Nifti2Image
    try:
        image = kind.from_stream(io.BytesIO(content))
        np.asarray(image.dataobj)
    except Exception as error:  # nibabel raises many kinds of exceptions for a damaged file
        raise MedFLError("can't be read as NIfTI: it is damaged; copy it again") from error
    return image


def finite(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The values, and how many of them were replaced. NaN, infinity and values too large to compute with are
    replaced by the background's value (0, or the lowest value if some lie below 0). Raises MedFLError if no
    value is usable."""
    if values.dtype.kind != "f":
        return values, 0
    good = np.abs(values) <= MAX_LARGE
    if good.all():
        return values, 0
    if not good.any():
        raise MedFLError("holds no finite value; export it again")
    return np.where(good, values, min(0, values[good].min())), int(np.count_nonzero(~good))


def doubt(header: Any) -> str | None:
    """Why a header's orientation is not reliable, in words that follow the file's name, or None if it is
    reliable."""
    shape = (*header.get_data_shape(), 1, 1, 1)[:3]
    records = {
        name: affine
        for name, affine in (
            ("qform", header.get_qform(coded=True)[0]),
            ("sform", header.get_sform(coded=True)[0]),
        )
        if affine is not None
    }
    if not records:
        return "does not give the patient's orientation (qform and sform code are 0)"
    for name, affine in records.items():
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
            return f"places all voxels in one plane, or gives no valid place (its {name})"
        if is_sheared(affine[:3, :3]):
            return f"has axes that are not at right angles (its {name} is sheared)"
    if len(records) == 2:
        apart = distance_apart(records["qform"], records["sform"], shape)
        if apart > APART:
            return f"contradicts itself: its qform and sform place a voxel {apart:.0f} mm apart"
    return None


def unlike_sizes(header: Any) -> str | None:
    """A text about two voxel sizes of a header that contradict each other, or None if its pixel sizes agree
    with its affine."""
    sizes = np.abs(np.array(header.get_zooms()[:3], float))
    steps = np.linalg.norm(header.get_best_affine()[:3, :3], axis=0)[: len(sizes)]
    if (np.abs(sizes - steps) <= UNLIKE * steps).all():
        return None
    one, other = (" × ".join(f"{mm:g}" for mm in values) for values in (sizes, steps))
    return f"says that voxels measure {one} mm but places them {other} mm apart"


def nrrd_sizes(content: bytes) -> tuple[int, ...]:
    """The shape in the header of a NRRD file. Raises MedFLError for a damaged header and for an overlong one:
    the reader takes 10 s for a million lines, which can be packed into a few kilobytes."""
    import nrrd

    if not re.search(rb"\n\r?\n", content[:NRRD_HEADER]):
        raise MedFLError("can't be read as NRRD: its header has no end; copy it again")
    try:
        return tuple(int(side) for side in nrrd.read_header(io.BytesIO(content))["sizes"])
    except Exception as error:  # pynrrd raises many kinds of exceptions
        raise MedFLError("can't be read as NRRD: its header is damaged; copy it again") from error


def _unpacked(voxels: bytes, encoding: str | None) -> bytes:
    """A NRRD file's voxels, unpacked. Raises ValueError, or the decompressor's exception, for data that is
    cut off, unpacks to too much, or is written as text, where two bytes can make a value of eight."""
    if encoding == "raw":
        return voxels
    if encoding not in NRRD_PACKED:
        raise ValueError("text")
    unpacker = NRRD_PACKED[encoding]()
    unpacked = unpacker.decompress(voxels, MAX_UNPACKED + 1)
    if len(unpacked) > MAX_UNPACKED or not unpacker.eof:
        raise ValueError("unpacks to too much, or is cut off")
    return unpacked


def _read_nrrd(content: bytes) -> Any:
    """A NRRD file as a NIfTI image; its codes are 0 if it has no anatomical `space`."""
    import nrrd

    if not fits(nrrd_sizes(content)[::-1]):
        raise MedFLError("asks for more voxels than can be read at once; make it smaller")
    try:
        stream = io.BytesIO(content)
        header = nrrd.read_header(stream)
        if any(header.get(name) for name in NRRD_ELSEWHERE):
            raise ValueError("its voxels lie in another file, or behind something")
        unpacked = _unpacked(stream.read(), header.get("encoding"))
        if header.get("encoding") in NRRD_PACKED:
            header["encoding"] = "raw"
        values = nrrd.read_data(header, io.BytesIO(unpacked))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # pynrrd and its decompressors raise many kinds of exceptions
        raise MedFLError(
            "can't be read as NRRD: it is truncated, damaged, written as text or split into several files; copy it "
            "again, or export it as one file"
        ) from error
    if values.ndim != 3:
        raise MedFLError(
            f"has {values.ndim} dimensions (overlapping segments of Slicer have 4), but a volume has 3; "
            "export it as a label map"
        )
    try:
        return _placed_nrrd(values, header)
    except Exception as error:  # numpy and nibabel raise many kinds of exceptions for invalid directions
        raise MedFLError("has invalid directions, origin or spacings; export it again") from error


def _placed_nrrd(values: np.ndarray, header: dict) -> Any:
    """Voxels with the affine from a NRRD header. Raises many kinds of exceptions if the header gives none."""
    import nibabel

    signs = NRRD_SPACES.get(str(header.get("space", "")).lower())
    directions, origin = header.get("space directions"), header.get("space origin")
    affine = np.eye(4)
    if signs is not None and directions is not None:
        affine[:3, :3] = np.asarray(directions, float).T
        affine[:3, 3] = 0 if origin is None else origin
        affine[:3] *= np.array([-signs[0], -signs[1], signs[2]])[
            :, None
        ]  # NIfTI counts towards the right and front
        return nibabel.Nifti1Image(values, affine, dtype=values.dtype)
    sizes = (
        header.get("spacings")
        if directions is None
        else np.linalg.norm(np.asarray(directions, float), axis=1)
    )
    image = nibabel.Nifti1Image(
        values, np.diag([*([1, 1, 1] if sizes is None else np.asarray(sizes, float)), 1])
    )
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    if sizes is None:  # the file gives none, and 1 mm would be a guess
        image.header.set_zooms((0, 0, 0))
    return image
