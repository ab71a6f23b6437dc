"""Reads a NIfTI (or NRRD) file's bytes as nibabel's image, within the page's limits."""

import math
from typing import TYPE_CHECKING

import numpy as np

from borders.limits import MAX_PIXELS, fits
from common import MedFLError
from deployment.app.archives import gzip_begins_with, unpack_gzip
from scans.nifti_file import GZIP, HEAD, NRRD, header_length, nrrd_sizes, read_header, read_image

if TYPE_CHECKING:
    pass


def load(name: str, content: bytes):
    """nibabel's image in a file's bytes. Raises MedFLError for a damaged file or another kind of file."""
    name = short(name)
    try:
        if content[:2] == GZIP or (
            name.lower().endswith(".gz") and content and header_length(content) is None
        ):
            _check_size(gzip_begins_with(content, HEAD))
            content = unpack_gzip(content)
        _check_size(content)
        image = read_image(content)
    except ModuleNotFoundError as error:
        package = {"nrrd": "pynrrd"}.get(error.name or "", error.name)
        raise MedFLError(
            f"this kind of file needs {package}; install it (`pip install {package}`), or upload slices as TIFF "
            f"or PNG"
        ) from error
    except MedFLError as error:
        raise MedFLError(f"{name} {error}") from error
    if len(image.shape) < 3:
        raise MedFLError(
            f"{name} has {len(image.shape)} dimensions, but a scan has three; choose another file"
        )
    return image


def _check_size(content: bytes) -> None:
    """Raises MedFLError for a header that asks for more than a page can hold, before more is read or
    unpacked."""
    if content[:4] == NRRD:
        shape = nrrd_sizes(content)
    elif header_length(content) is not None:
        shape = tuple(int(side) for side in read_header(content[:HEAD]).get_data_shape())
    else:
        return  # its reader reports what it is
    if len(shape) < 3:
        raise MedFLError(f"has {len(shape)} dimensions, but a scan has three; choose another file")
    volumes = math.prod(shape[3:])
    if volumes not in (1, 3):
        raise MedFLError(
            f"holds {volumes} volumes, but a case has one, or three (pre-contrast, FLAIR and "
            "post-contrast); choose another file"
        )
    if not fits(shape[2::-1], MAX_PIXELS):
        raise MedFLError(
            f"asks for {'×'.join(map(str, shape))} values, which this page can't hold; prepare it with "
            "data/prepare_hospital.py and open the slices"
        )


def size(slices: np.ndarray) -> str:
    return f"{slices.shape[0]} slices of {slices.shape[2]}×{slices.shape[1]} pixels"


def short(name: str) -> str:
    return name.rsplit("/", 1)[-1]
