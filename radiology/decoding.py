"""The pixels of one slice of a DICOM file: decoded, without padding, in the values that the file says."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder, pixel_array
from pydicom.pixels.processing import apply_modality_lut
from pydicom.uid import UID, JPEGExtended12Bit

from borders.limits import MAX_LARGE
from common import MedFLError
from radiology.bounds import File, read_with_pixels
from radiology.codestreams import check_frame

END_OF_JPEG = b"\xff\xd9"


def decode_slice(path: File, whole: pydicom.Dataset | None, frame: int) -> np.ndarray:
    """One slice's values, (rows, columns) float32; NaN is padding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about padding, and about errors that the decoder then raises
            content = whole if whole is not None else read_with_pixels(path)
            syntax = content.file_meta.TransferSyntaxUID
            if syntax.is_compressed and not _can_decode(syntax):
                raise MedFLError(
                    f"{path} is compressed ({syntax.name}), and no installed decoder can read it; `pip "
                    "install -r requirements-dicom.txt`, or export without compression"
                )
            check_frame(content, frame)
            try:
                stored = pixel_array(content, index=frame)
            except RuntimeError:
                if syntax != JPEGExtended12Bit or frame:
                    raise
                return _by_gdcm(path, content)
            padding = _padding(content, stored)
            if content.PhotometricInterpretation == "MONOCHROME1":
                stored = (-1 if content.PixelRepresentation else 2**content.BitsStored - 1) - stored.astype(
                    np.int64
                )
            values = _rescaled(content, stored, frame)
            if not (np.abs(values) <= MAX_LARGE).all():
                raise MedFLError(
                    f"{path} has values that are not numbers (check its rescale slope); export it again"
                )
            return np.where(padding, np.float32(np.nan), values.astype(np.float32))
    except MedFLError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds for a damaged file
        raise MedFLError(f"{path} can't be decoded (truncated or damaged); export it again") from error


def _by_gdcm(path: File, content: pydicom.Dataset) -> np.ndarray:
    """One slice's values, read and rescaled by GDCM, (rows, columns) float32: pydicom's decoders can't read some JPEG
    Extended files. Raises ValueError for a stream without an end, of which GDCM would read a part."""
    stream = get_frame(content.PixelData, 0, number_of_frames=1)
    if END_OF_JPEG not in stream[-4:] or content.PhotometricInterpretation != "MONOCHROME2":
        raise ValueError("cut off")
    with _named(path) as name:
        image = sitk.ReadImage(name, sitk.sitkFloat32, imageIO="GDCMImageIO")
    return sitk.GetArrayFromImage(image).reshape(content.Rows, content.Columns)


@contextlib.contextmanager
def _named(path: File) -> Iterator[str]:
    """A name under which GDCM can read a file. A file in memory is not written to the disk. Raises ValueError if the
    system has no names for files in memory (all but Linux)."""
    if isinstance(path, Path):
        yield str(path)
        return
    if not hasattr(os, "memfd_create"):
        raise ValueError("no name for a file in memory")
    with open(os.memfd_create("slice"), "wb") as memory:
        memory.write(path.getvalue())
        memory.flush()
        yield f"/proc/self/fd/{memory.fileno()}"


def _can_decode(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:  # films, for instance
        return False


def _padding(content: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Which stored values are padding, bool: the value or the range that the file names."""
    told = content.get("PixelPaddingValue")
    if told is None or stored.dtype.kind == "f":
        return np.zeros(stored.shape, bool)
    ends = [told, content.get("PixelPaddingRangeLimit", told)]
    first, last = sorted(
        np.array(ends, np.int64).astype(stored.dtype)
    )  # a signed value may be stated as unsigned
    return (stored >= first) & (stored <= last)


def _rescaled(content: pydicom.Dataset, stored: np.ndarray, frame: int) -> np.ndarray:
    """Stored values, converted by the modality transformation of the file, or of the functional groups of its
    frames."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        if index < len(content.get(groups) or ()) and content[groups].value[index].get(
            "PixelValueTransformationSequence"
        ):
            content = content[groups].value[index].PixelValueTransformationSequence[0]
            break
    if content.get("RescaleSlope") == 0:
        raise ValueError("every value would be the same")
    if "RescaleIntercept" not in content and "RescaleSlope" in content:
        content.RescaleIntercept = 0  # else pydicom leaves out the slope, which can differ between slices
    return apply_modality_lut(stored, content)
