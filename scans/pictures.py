"""Reads slices and masks from picture files, and refuses files whose pixels would differ from what was
stored."""

import warnings
from collections.abc import Mapping
from io import SEEK_END, BytesIO
from pathlib import Path, PurePath

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, SAMPLESPERPIXEL, TiffImageFile

from borders.limits import MAX_SIDE, MAX_VOXELS, fits, has_many_scans, tiff_asks_for_more
from common import MedFLError

FORMATS = ("TIFF", "PNG", "JPEG")  # whatever a file is called; no other decoder is started
EIGHT_BIT = ("L", "1", "P", "RGBA", "LA", "RGB")  # Pillow's modes that a slice may have
TURNED, UPRIGHT = ExifTags.Base.Orientation, 1  # the tag in EXIF and TIFF, and its value if nothing is turned
MIN_SIDE = 2  # pixels; a single one has no neighbour to be compared with
POINTER_BYTES = 64  # enough to recognise a pointer of Git LFS or git-annex


def read_slice(path: PurePath, content: bytes | None = None) -> np.ndarray:
    """A slice's pixels, (H, W, 3) uint8: pre-contrast, FLAIR, post-contrast. A grey picture fills all three
    channels.

    content: the file's bytes, if they are in memory and not on disk. Raises MedFLError for a file that is
    unreadable, truncated, animated, huge, or not 8 bits a channel, and for more channels.
    """
    picture = _open(path, content)
    if _holds_more(picture):
        raise MedFLError(
            f"{path} has more channels than a slice, which is grey or RGB; save it with only the three that "
            "MedFL reads"
        )
    if picture.mode in EIGHT_BIT:
        return np.asarray(picture.convert("RGB"))
    raise MedFLError(
        f"{path} has pixels of type {picture.mode}, but a slice is 8-bit grey or RGB; convert it first"
    )


def _holds_more(picture: Image.Image) -> bool:
    """Whether a picture has measurements in a channel beyond grey or RGB, such as a fourth sequence.
    Transparency that is only on or off, or the same everywhere, is not a measurement and is ignored."""
    if isinstance(picture, TiffImageFile) and picture.tag_v2.get(SAMPLESPERPIXEL, 1) > len(
        picture.getbands()
    ):
        return True
    if picture.mode not in ("RGBA", "LA"):
        return False
    alpha = np.asarray(picture.getchannel("A"))
    return bool(np.ptp(alpha)) and not np.isin(alpha, (0, 255)).all()


def read_mask(path: PurePath, content: bytes | None = None) -> np.ndarray:
    """A mask's pixels, (H, W) uint8, 0 or 255, as `read_mask_and_form` reads them."""
    return read_mask_and_form(path, content)[0]


def read_mask_and_form(path: PurePath, content: bytes | None = None) -> tuple[np.ndarray, bool]:
    """A mask's pixels, (H, W) uint8, 0 or 255, and whether it was stored in another plain form: as 0 and 1,
    or with a palette of two. Raises MedFLError for any other value and whatever `read_slice` refuses."""
    picture = _open(path, content)
    if picture.mode not in ("L", "1", "RGB", "P"):
        raise MedFLError(
            f"{path} has pixels of type {picture.mode}, but a mask is 8-bit grey; convert it first"
        )
    colours = np.asarray(picture.convert("RGB"))
    mask, is_grey = colours[..., 0].copy(), not (colours != colours[..., :1]).any()
    if is_grey and np.isin(mask, (0, 255)).all():
        return mask, False
    if picture.mode == "RGB" and not is_grey:
        raise MedFLError(
            f"{path} has colours, but a mask is grey: 255 for what is outlined, 0 elsewhere; save it again"
        )
    numbers = np.asarray(picture) if picture.mode == "P" else mask
    if numbers.max() <= 1:
        return np.where(numbers == _outlined(picture), np.uint8(255), np.uint8(0)), True
    odd = numbers[~np.isin(numbers, (0, 1 if picture.mode == "P" else 255))]
    raise MedFLError(
        f"{path} has the value {odd.max()}, but a mask only holds 0 and 255, or 0 and 1; save it again with 255 "
        "for what is outlined"
    )


def read_classes(path: PurePath, numbers: Mapping[int, int], content: bytes | None = None) -> np.ndarray:
    """The class of each pixel of a mask, (H, W) uint8, 0 outside of the region. numbers: the class of each value that
    the file may hold besides 0; content: as in `read_slice`. Raises MedFLError for another value and whatever
    `read_slice` refuses."""
    picture = _open(path, content)
    if picture.mode != "L":  # a palette's numbers change when a picture is saved again
        raise MedFLError(
            f"{path} has pixels of type {picture.mode}, but a mask of several classes is 8-bit grey; convert it first"
        )
    values = np.asarray(picture)
    classes = np.zeros(256, np.uint8)
    classes[list(numbers)] = list(numbers.values())
    odd = np.setdiff1d(values, (0, *numbers))
    if odd.size:
        raise MedFLError(
            f"{path} has the value {odd[0]}, but the classes of its task are {', '.join(map(str, numbers))}; save it "
            "again with these, and 0 elsewhere"
        )
    return classes[values]


def _outlined(picture: Image.Image) -> int:
    """The one of 0 and 1 that marks the outlined region: 1, unless 1 is black in the picture's palette and 0
    is not."""
    palette = picture.getpalette() if picture.mode == "P" else None
    return 0 if palette and any(palette[:3]) and len(palette) > 3 and not any(palette[3:6]) else 1


def picture_size(path: PurePath, content: bytes | None = None) -> tuple[int, int]:
    """Columns and rows of a picture from its header; nothing is decoded. Raises MedFLError as `read_slice`
    does."""
    return _open(path, content, decode=False).size


def _open(path: PurePath, content: bytes | None, decode: bool = True) -> Image.Image:
    """A single-frame picture of a sensible size, decoded."""
    try:
        with BytesIO(content) if content is not None else open(path, "rb") as file:
            if tiff_asks_for_more(file, file.seek(0, SEEK_END) - file.seek(0)):
                raise MedFLError(
                    f"{path} declares more tags, tiles or pictures than the file or a slice can have; save "
                    "the picture again"
                )
            file.seek(0)
            if has_many_scans(file):
                raise MedFLError(f"{path} is stored in hundreds of refining passes; save the picture again")
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # warnings of huge sides, which are checked below, and of metadata that is not read
            picture = Image.open(path if content is None else BytesIO(content), formats=FORMATS)
        width, height = picture.size
        if max(width, height) > MAX_SIDE:
            raise MedFLError(
                f"{path} is {width}×{height} pixels, but a slice has at most {MAX_SIDE} a side; shrink it "
                "first"
            )
        if min(width, height) < MIN_SIDE:
            raise MedFLError(
                f"{path} is {width}×{height} pixels, too small for a slice; remove it, or choose another file"
            )
        frames = getattr(picture, "n_frames", 1)
        if frames != 1:
            raise MedFLError(
                f"{path} holds {frames} pictures, but a slice is one; save each as a file of its own"
            )
        if picture.mode in EIGHT_BIT and (stored := _stored_otherwise(picture)):
            # Pillow would silently convert it to 8 bits
            raise MedFLError(f"{path} has {stored} a channel, but a slice has 8 bits; convert it first")
        stored_turned = picture.tag_v2.get(TURNED) if isinstance(picture, TiffImageFile) else None
        if decode:
            picture.load()
            if (turned := stored_turned or _exif_orientation(picture)) > UPRIGHT:  # Pillow turns only TIFF
                raise MedFLError(
                    f"{path} is shown turned or mirrored by viewers (its orientation tag is {turned}), so "
                    "the orientation of its mask is ambiguous; save it as it is shown, without the tag"
                )
    except FileNotFoundError as error:
        raise MedFLError(f"{path} does not exist; check the name") from error
    except PermissionError as error:
        raise MedFLError(f"{path} can't be read by this user; check its permissions") from error
    except Image.DecompressionBombError as error:  # raised before anything is decoded
        raise MedFLError(
            f"{path} is far larger than a slice, which has at most {MAX_SIDE} pixels a side; shrink it"
        ) from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        MemoryError,
    ) as error:  # exceptions of Pillow's decoders
        _refuse_pointer(path, content)
        raise MedFLError(
            f"{path} can't be read as a picture (truncated or another format); copy it again, or save it as PNG"
        ) from error
    return picture


def _exif_orientation(picture: Image.Image) -> int:
    """The orientation in which a viewer shows a picture, from its EXIF; damaged EXIF is ignored."""
    try:
        return int(picture.getexif().get(TURNED, UPRIGHT))
    except Exception:  # Pillow's parser raises many kinds of exceptions, for data that nothing else reads
        return UPRIGHT


def _refuse_pointer(path: PurePath, content: bytes | None) -> None:
    """Raises MedFLError if the file is a pointer of Git LFS or git-annex instead of a picture."""
    try:
        if content is None:
            with open(path, "rb") as file:
                content = file.read(POINTER_BYTES)
    except OSError:
        return
    if content.startswith((b"version https://git-lfs", b"/annex/objects/")):
        raise MedFLError(
            f"{path} only points to the picture, which was not fetched; fetch it with `git lfs pull`, `git "
            "annex get` or `datalad get`"
        )


def _stored_otherwise(picture: Image.Image) -> str | None:
    """How the file's samples are stored, if not as unsigned numbers of up to 8 bits, whatever Pillow would
    convert them to."""
    if isinstance(picture, TiffImageFile):
        bits, kind = (picture.tag_v2.get(tag, (1,)) for tag in (BITSPERSAMPLE, SAMPLEFORMAT))
        if max(bits) > 8:
            return f"{max(bits)} bits"
        return None if set(kind) == {1} else "signed or fractional numbers"
    # for PNG, Pillow's name of the samples' layout in the file, such as "RGB;16B"; its JPEG decoder only knows 8 bits
    return "16 bits" if any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ())) else None


def read_volume(paths: list[Path]) -> np.ndarray:
    """The slices in the order given as one volume, (S, H, W, 3) uint8. Raises MedFLError if sizes differ or
    memory does not hold them all."""
    columns, rows = picture_size(paths[0])
    if not fits((len(paths), rows, columns)):
        raise MedFLError(
            f"{len(paths)} slices of {columns}×{rows} pixels (the size of {paths[0].name}) are more than "
            f"can be read at once ({MAX_VOXELS >> 20} million pixels); name fewer of them"
        )
    slices: list[np.ndarray] = []
    for path in paths:
        pixels = read_slice(path)
        slices.append(pixels)
        if pixels.shape != slices[0].shape:
            raise MedFLError(
                f"{path} is {_size(pixels)} and {paths[0].name} is {_size(slices[0])}, but all slices of a "
                "volume must have the same size; put them in separate folders"
            )
    return np.stack(slices)


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}×{pixels.shape[0]}"
