"""NIfTI files in and masks out, through nibabel, which is optional."""

import gzip
import io
import math
import struct
from typing import TYPE_CHECKING

import numpy as np

from common import MedFLError
from deployment.app.archives import gzip_begins_with, unpack_gzip
from deployment.app.case import MIN_SIDE, Case
from limits import MAX_PIXELS, SIZES_MM, fits, is_size_mm

if TYPE_CHECKING:
    import nibabel

HEADER = 352  # bytes, with those that say whether extensions follow
BRIGHTEST = 99.9  # percentile of the voxels above 0 that becomes 255


def read_nifti(files: list[tuple[str, bytes]]) -> Case:
    """The case of one NIfTI file, its axial slices from feet to head, and of its `_mask` or `_seg` file if
    that came along.

    One volume fills all three channels; three volumes are pre-contrast, FLAIR and post-contrast. Raises
    MedFLError.
    """
    scans = [(name, content) for name, content in files if not _is_truth(name)]
    truths = [file for file in files if _is_truth(file[0])]
    if len(scans) != 1 or len(truths) > 1:
        raise MedFLError(
            "a NIfTI case is one scan and at most one mask (named ..._mask or ..._seg); upload these alone"
        )
    name = scans[0][0].rsplit("/", 1)[-1]
    stored, image = _load(*scans[0])
    values = np.asarray(image.dataobj)
    if values.dtype.names:  # stored as RGB
        values = np.stack([values[channel] for channel in values.dtype.names[:3]], axis=-1)
    values = values.reshape(*values.shape[:3], -1)
    if values.shape[3] not in (1, 3):
        raise MedFLError(
            f"{name} holds {values.shape[3]} volumes, and a case has one, or three (pre-contrast, FLAIR and "
            "post-contrast); choose another file"
        )
    if not np.isfinite(values).all():
        raise MedFLError(f"{name} holds values that are not finite; write it again without them")
    volume = to_axial(
        np.concatenate(
            [to_bytes(values[..., channel])[..., None] for channel in range(values.shape[3])], axis=3
        )
    )
    volume = np.ascontiguousarray(np.broadcast_to(volume, (*volume.shape[:3], 3)))
    if min(volume.shape[1:3]) < MIN_SIDE or volume[..., 0].size > MAX_PIXELS:
        raise MedFLError(f"{name} has {_size(volume)}, which this page can't hold; crop or resample it first")
    columns, rows, between = (float(size) for size in image.header.get_zooms()[:3])
    stem = name[: name.lower().index(".nii")]
    measured = all(map(is_size_mm, (rows, columns, between)))
    case = Case(
        name=stem,
        slices=[f"{stem}_{k + 1}" for k in range(len(volume))],
        volume=volume,
        groups=np.zeros(len(volume), int),
        spacing=(rows, columns, between) if measured else None,
        measured=measured,
        nifti=stored,
    )
    if not measured:
        case.notes.append(
            f"The file tells voxels of {columns:g} × {rows:g} × {between:g} mm, which can't be right (they are "
            f"{SIZES_MM[0]:g} to {SIZES_MM[1]:g} mm): there are no figures in mm unless you give the sizes."
        )
    if values.dtype != np.uint8:
        case.notes.append(
            "The intensities of each sequence were scaled to 0–255: 0 and below become 0, and the "
            f"{BRIGHTEST} % percentile of the rest becomes 255."
        )
    if truths:
        case.truth = read_nifti_mask(case, *truths[0])
    return case


def _is_truth(name: str) -> bool:
    return name.lower().split(".nii")[0].endswith(("_mask", "_seg"))


def _load(name: str, content: bytes):
    """The image in a NIfTI file's bytes: as it is stored, and turned so that its axes are right, front and
    up."""
    try:
        import nibabel
    except ImportError as error:
        raise MedFLError(
            "NIfTI files need nibabel; install it (`pip install nibabel`), or upload slices as TIFF or PNG"
        ) from error
    name = name.rsplit("/", 1)[-1]
    packed = name.lower().endswith(".gz")
    _check_header(name, gzip_begins_with(name, content, HEADER) if packed else content[:HEADER])
    if packed:
        content = unpack_gzip(name, content)
    try:
        stored = nibabel.Nifti1Image.from_stream(io.BytesIO(content))
        values = math.prod(stored.shape) * stored.get_data_dtype().itemsize
        if stored.header["vox_offset"] + values > len(content):
            raise ValueError("truncated")
        turned = nibabel.as_closest_canonical(stored)
        np.asarray(turned.dataobj)
    except Exception as error:  # nibabel raises many kinds for a damaged file
        raise MedFLError(f"{name} can't be read as NIfTI; copy it again") from error
    return stored, turned


def _check_header(name: str, head: bytes) -> None:
    """Raises MedFLError for a header that asks for more than a page can hold, before anything more is read or
    unpacked. What is no header passes: its reader says so."""
    import nibabel

    if len(head) < HEADER or head[:4] not in (
        struct.pack(f"{order}i", nibabel.Nifti1Header.sizeof_hdr) for order in "<>"
    ):
        return
    header = nibabel.Nifti1Header(head[: nibabel.Nifti1Header.sizeof_hdr], check=False)
    try:
        shape = tuple(int(side) for side in header.get_data_shape())
    except Exception as error:  # nibabel raises many kinds for a damaged header
        raise MedFLError(f"{name} can't be read as NIfTI; copy it again") from error
    if len(shape) < 3:
        raise MedFLError(f"{name} has {len(shape)} dimensions, and a scan has three; choose another file")
    volumes = math.prod(shape[3:])
    if volumes not in (1, 3):
        raise MedFLError(
            f"{name} holds {volumes} volumes, and a case has one, or three (pre-contrast, FLAIR and "
            "post-contrast); choose another file"
        )
    if not fits(shape[2::-1], MAX_PIXELS):
        raise MedFLError(
            f"{name} asks for {'×'.join(map(str, shape))} values, which this page can't hold; crop or resample "
            f"it first"
        )


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Intensities of one sequence as uint8: 0 stays 0, the brightest become 255. uint8 stays as it is."""
    if values.dtype == np.uint8:
        return values
    values = np.asarray(values, np.float32)
    above = values[values > 0]
    top = float(np.percentile(above, BRIGHTEST)) if above.size else 1.0
    return (values / max(top, 1e-6) * 255).clip(0, 255).round().astype(np.uint8)


def to_axial(values: np.ndarray) -> np.ndarray:
    """(X, Y, Z, ...) from left to right, back to front, feet to head, as slices (Z, Y, X, ...) with the front
    at the top."""
    return np.ascontiguousarray(np.moveaxis(values, (0, 1, 2), (2, 1, 0))[:, ::-1])


def from_axial(slices: np.ndarray) -> np.ndarray:
    """The inverse of `to_axial`."""
    return np.ascontiguousarray(np.moveaxis(slices[:, ::-1], (0, 1, 2), (2, 1, 0)))


def read_nifti_mask(case: Case, name: str, content: bytes) -> np.ndarray:
    """A mask of the case's shape from a NIfTI file, (S, H, W) uint8: every value above 0 is tumour."""
    values = np.asarray(_load(name, content)[1].dataobj)
    if values.dtype.names:
        raise MedFLError(
            f"{name.rsplit('/', 1)[-1]} holds colours, and a mask holds numbers; choose the mask of this scan"
        )
    mask = to_axial(
        values[..., 0] if values.shape[3:] == (1,) else values
    )  # one volume may be told as a fourth dimension
    if mask.shape != case.volume.shape[:3]:
        raise MedFLError(
            f"the mask has {_size(mask)} and the scan {_size(case.volume)}; choose the mask of this scan"
        )
    return np.where(mask > 0, np.uint8(255), np.uint8(0))


def _size(slices: np.ndarray) -> str:
    return f"{slices.shape[0]} slices of {slices.shape[2]}×{slices.shape[1]} pixels"


def write_nifti(scan: "nibabel.Nifti1Image", mask: np.ndarray) -> bytes:
    """A mask (S, H, W) uint8 0/255 as .nii.gz, voxel for voxel on the scan that was uploaded, 1 where there
    is tumour."""
    from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

    canonical = [[0, 1], [1, 1], [2, 1]]
    back = ornt_transform(canonical, io_orientation(scan.affine))
    voxels = apply_orientation(from_axial((mask > 0).astype(np.uint8)), back)
    return nifti_file(voxels, scan.affine)


def nifti_file(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """Voxels (X, Y, Z) uint8 as .nii.gz; affine: (4, 4), from indices to mm to the right, front and top."""
    import nibabel

    image = nibabel.Nifti1Image(np.ascontiguousarray(voxels), affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), mtime=0)
