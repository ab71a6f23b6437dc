"""From a file's pixels to the network's input: the one way that training, evaluation, prediction and the app
take.

    slice files -> (S, H, W, 3) uint8 in numeric order -> normalised per volume and channel -> (S, 3, side,
    side) float32

From the uint8 volume on, everything is torch operations that export to ONNX: no sorting, no numpy, no branch
on data.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Collection
from io import SEEK_END, BytesIO
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, SAMPLESPERPIXEL, TiffImageFile

from common import MedFLError
from limits import MAX_SIDE, MAX_VOXELS, fits, has_many_scans, tiff_asks_for_more

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MASK_SUFFIX = "_mask"  # ends a mask's name, after its slice's, where nothing else is said
CHANNELS = ("pre-contrast", "FLAIR", "post-contrast")
FORMATS = ("TIFF", "PNG", "JPEG")  # whatever a file is called: no other decoder is started
EIGHT_BIT = ("L", "1", "P", "RGBA", "LA", "RGB")  # Pillow's modes that a slice may have
TURNED, UPRIGHT = ExifTags.Base.Orientation, 1  # EXIF's and TIFF's tag, and its value where nothing is turned
CLIP = 5.0  # deviations; beyond it lie vessels, fat and artefacts
EPSILON = 1e-6
POINTER_BYTES = 64  # enough to know a note of Git LFS or git-annex
NUMBER = re.compile(r"[_\-. (]*(?<!\d)(\d{1,18})\)?$")  # of a slice, at the end of its name
COPY = re.compile(  # what file managers and shares append to a copy's name; of ` (1)` nobody can tell
    r" (?:(?:- )?(?:copy|copie|copia|kopie)(?: ?\(?\d+\)?)?|\(.*(?:conflict|konflikt).*\))$", re.IGNORECASE
)
KIND_OF_SCAN = re.compile(r"(?:^|[^a-z])t[12]$", re.IGNORECASE)

AnyPath = TypeVar("AnyPath", bound=PurePath)  # on disk, or the name of a file in memory

# What a checkpoint stores, so that another version of these functions can tell that it would do something
# else.
DESCRIPTION = {
    "name": "volume-foreground-v1",
    "channels": list(CHANNELS),
    "foreground": "above the channel's mean over the volume",
    "clip": CLIP,
    "resize": "bilinear",
}
SLICE_SIDE = 256  # pixels, of the dataset's and of prepared slices


def description(side: int) -> dict:
    """What a checkpoint of a network with images of `side` pixels stores.

    Averaging over areas gives the figures of former versions where slices of 256 are halved, or not shrunk. At
    other sides it does not, and has a name of its own.
    """
    if side >= SLICE_SIDE or 2 * side == SLICE_SIDE:
        return DESCRIPTION
    return {**DESCRIPTION, "name": "volume-foreground-v2", "resize": "area where it shrinks, else bilinear"}


def is_image(path: PurePath, mask_suffix: str = MASK_SUFFIX) -> bool:
    """Whether a file's name is that of a slice: an image suffix, not a mask, no contact sheet of prepared
    data, not hidden."""
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and not is_mask(path, mask_suffix)
        and not path.name.startswith(".")
        and not path.stem.endswith("_contact_sheet")
    )


def is_mask(path: PurePath, mask_suffix: str = MASK_SUFFIX) -> bool:
    """Whether a file's name is that of a mask: `<name>_mask.<suffix>`, or of its copy."""
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and masked_stem(path, mask_suffix) is not None
        and not path.name.startswith(".")
    )


def masked_stem(path: PurePath, mask_suffix: str = MASK_SUFFIX) -> str | None:
    """What a mask's name says of its slice's name (`p_1` of `p_1_mask.png`), or None where it is no mask's.
    What browsers and file managers append to a copy (` (1)`, ` - Copy`, in any language) is part of no name."""
    found = re.match(rf"(.*){re.escape(mask_suffix)}(?:[ (].*)?$", path.stem, re.IGNORECASE | re.DOTALL)
    return found[1] if found else None


def slice_number(path: PurePath) -> int | None:
    """The number that ends a slice's name (12 of `TCGA_CS_4941_19960909_12.tif`, 7 of `slice007.png` and of
    `scan (7).png`), or None where there is none. `t1` and `t2` are kinds of scans and no numbers."""
    found = NUMBER.search(path.stem)
    return int(found[1]) if found and not KIND_OF_SCAN.search(path.stem) else None


def volume_name(path: PurePath) -> str:
    """The name that the slices of one volume share: the file's name without the slice number."""
    if slice_number(path) is None:
        return path.stem
    return NUMBER.sub("", path.stem) or path.parent.name


def numeric_order(paths: list[AnyPath]) -> list[AnyPath]:
    """Slices of one volume by their number (2 before 10), those without one last, by name."""
    return sorted(paths, key=lambda p: (slice_number(p) is None, slice_number(p) or 0, p.name))


def group_volumes(
    files: list[AnyPath], folders: Collection[PurePath] = ()
) -> list[tuple[str, list[AnyPath]]]:
    """Each volume's name (the patient's, or the file's) and slices in numeric order: what is normalised
    together in training, in prediction and on the pages.

    folders: those that were given as folders. The slices in one of them are one patient's, unless names with
    the same numbers (`a_1`, `b_1`) tell of several. Elsewhere slices of one name in one folder form a volume,
    and a file without a slice number is a volume of its own. Raises MedFLError for one slice that is there
    twice.
    """
    places: defaultdict[PurePath, list[AnyPath]] = defaultdict(list)
    for file in files:
        places[file.parent].append(file)
    volumes: list[tuple[str, list[AnyPath]]] = []
    for folder, inside in places.items():
        _refuse_copies(inside)
        whole = folder in folders and not _share_numbers(inside)
        volumes += [(folder.name or volume_name(inside[0]), inside)] if whole else _by_name(inside)
    for _, slices in volumes:
        _refuse_doubles(slices)
    return [(name, numeric_order(slices)) for name, slices in volumes]


def _share_numbers(files: list[AnyPath]) -> bool:
    """Whether one slice number stands behind several names."""
    names: dict[int | None, str] = {}
    numbered = [file for file in files if slice_number(file) is not None]
    return any(
        names.setdefault(slice_number(file), volume_name(file)) != volume_name(file) for file in numbered
    )


def _by_name(files: list[AnyPath]) -> list[tuple[str, list[AnyPath]]]:
    volumes: defaultdict[tuple, list[AnyPath]] = defaultdict(list)
    for file in files:
        alone = slice_number(file) is None
        volumes[(volume_name(file), alone and file.suffix)].append(file)
    return [(name, slices) for (name, _), slices in volumes.items()]


def _refuse_copies(files: list[AnyPath]) -> None:
    """Raises MedFLError where a file's name is that of another one's copy."""
    by_stem = {file.stem: file for file in files}
    for file in files:
        original = by_stem.get(COPY.sub("", file.stem), file)
        if original is not file and original.stem != file.stem:
            raise MedFLError(f"{original} and {file.name} are the same slice twice; take one of them away")


def _refuse_doubles(slices: list[AnyPath]) -> None:
    """Raises MedFLError where two files are one slice of a volume: one name in two formats, or one number."""
    known: dict[tuple, AnyPath] = {}
    for file in sorted(slices):
        number = slice_number(file)
        slice_ = (volume_name(file), number) if number is not None else (file.stem,)
        if known.setdefault(slice_, file) != file:
            raise MedFLError(
                f"{known[slice_]} and {file.name} are the same slice twice; take one of them away"
            )


def read_slice(path: PurePath, content: bytes | None = None) -> np.ndarray:
    """A slice's pixels, (H, W, 3) uint8: pre-contrast, FLAIR, post-contrast. A grey picture fills all three
    channels.

    content: the file's bytes, if they are in memory and not on disk. Raises MedFLError for a file that is
    unreadable, truncated, animated, huge, or not 8 bits a channel, and for more channels.
    """
    picture = _open(path, content)
    if _holds_more(picture):
        raise MedFLError(
            f"{path} has more channels than a slice, which is grey or RGB; save it with the three that are meant"
        )
    if picture.mode in EIGHT_BIT:
        return np.asarray(picture.convert("RGB"))
    raise MedFLError(
        f"{path} has pixels of type {picture.mode}, and a slice has 8-bit grey or RGB; convert it first"
    )


def _holds_more(picture: Image.Image) -> bool:
    """Whether a picture has measurements in a channel beyond grey or RGB, such as a fourth sequence. Transparency
    that is all or nothing, or the same everywhere, is none, and is left out."""
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
    or with a palette of two. Raises MedFLError for any other value and what `read_slice` refuses."""
    picture = _open(path, content)
    if picture.mode not in ("L", "1", "RGB", "P"):
        raise MedFLError(
            f"{path} has pixels of type {picture.mode}, and a mask is 8-bit grey; convert it first"
        )
    colours = np.asarray(picture.convert("RGB"))
    mask, is_grey = colours[..., 0].copy(), not (colours != colours[..., :1]).any()
    if is_grey and np.isin(mask, (0, 255)).all():
        return mask, False
    if picture.mode == "RGB" and not is_grey:
        raise MedFLError(
            f"{path} has colours, and a mask is grey: 0 (no tumour) and 255 (tumour); write it again"
        )
    numbers = np.asarray(picture) if picture.mode == "P" else mask
    if numbers.max() <= 1:
        return np.where(numbers == _outlined(picture), np.uint8(255), np.uint8(0)), True
    odd = int(numbers[(numbers != 0) & (numbers != (1 if picture.mode == "P" else 255))][0])
    raise MedFLError(
        f"{path} has the value {odd}, and a mask holds 0 (no tumour) and 255 (tumour) only, or 0 and 1; write it "
        "again, with 255 for what is tumour"
    )


def _outlined(picture: Image.Image) -> int:
    """Which of 0 and 1 stands for what is outlined: 1, unless it is black in the picture's palette and 0 is not."""
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
                    f"{path} holds tags, tiles or pictures that are more than the file or a slice can have; save the "
                    f"picture again"
                )
            file.seek(0)
            if has_many_scans(file):
                raise MedFLError(f"{path} is refined in hundreds of passes; save the picture again")
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of huge sides, which are checked below, and of metadata that nobody reads
            picture = Image.open(path if content is None else BytesIO(content), formats=FORMATS)
        width, height = picture.size
        if max(width, height) > MAX_SIDE:
            raise MedFLError(
                f"{path} is {width}×{height} pixels, and a slice has at most {MAX_SIDE} a side; shrink it "
                f"first"
            )
        frames = getattr(picture, "n_frames", 1)
        if frames != 1:
            raise MedFLError(
                f"{path} holds {frames} pictures, and a slice is one; save each as a file of its own"
            )
        if picture.mode in EIGHT_BIT and (stored := _stored_otherwise(picture)):
            # Pillow would make 8 bits of it without a word
            raise MedFLError(f"{path} has {stored} a channel, and a slice has 8; convert it first")
        stored_turned = picture.tag_v2.get(TURNED) if isinstance(picture, TiffImageFile) else None
        if decode:
            picture.load()
            if (
                turned := stored_turned or _exif_orientation(picture)
            ) > UPRIGHT:  # Pillow turns TIFF and nothing else
                raise MedFLError(
                    f"{path} is shown turned or mirrored by viewers (its orientation tag is {turned}), and a mask "
                    "could lie on either; save it as it is shown, without the tag"
                )
    except FileNotFoundError as error:
        raise MedFLError(f"{path} does not exist; check the name") from error
    except PermissionError as error:
        raise MedFLError(f"{path} may not be read by you; check its permissions") from error
    except Image.DecompressionBombError as error:  # told before anything is decoded
        raise MedFLError(
            f"{path} is far larger than a slice, which has at most {MAX_SIDE} pixels a side; shrink it"
        ) from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        MemoryError,
    ) as error:  # what Pillow's decoders raise
        _refuse_pointer(path, content)
        raise MedFLError(
            f"{path} can't be read as a picture (truncated or another format); copy it again, or save it as PNG"
        ) from error
    return picture


def _exif_orientation(picture: Image.Image) -> int:
    """How a viewer turns a picture before it shows it, by its EXIF; a damaged one says nothing."""
    try:
        return int(picture.getexif().get(TURNED, UPRIGHT))
    except Exception:  # Pillow's parser raises many kinds, for what nobody else reads
        return UPRIGHT


def _refuse_pointer(path: PurePath, content: bytes | None) -> None:
    """Raises MedFLError for a note of Git LFS or git-annex in the place of a picture."""
    try:
        if content is None:
            with open(path, "rb") as file:
                content = file.read(POINTER_BYTES)
    except OSError:
        return
    if content.startswith((b"version https://git-lfs", b"/annex/objects/")):
        raise MedFLError(
            f"{path} is a note where the picture would be; fetch it with `git lfs pull`, `git annex get` or "
            "`datalad get`"
        )


def _stored_otherwise(picture: Image.Image) -> str | None:
    """How the file's samples are stored, if not as unsigned numbers of up to 8 bits; whatever Pillow would
    make of them."""
    if isinstance(picture, TiffImageFile):
        bits, kind = (picture.tag_v2.get(tag, (1,)) for tag in (BITSPERSAMPLE, SAMPLEFORMAT))
        if max(bits) > 8:
            return f"{max(bits)} bits"
        return None if set(kind) == {1} else "signed or fractional numbers"
    # of PNG, Pillow's name of how the samples lie in the file, such as "RGB;16B"; its JPEG decoder knows 8 only
    return "16 bits" if any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ())) else None


def read_volume(paths: list[Path]) -> np.ndarray:
    """The slices in the order given as one volume, (S, H, W,
    3) uint8. Raises MedFLError where sizes differ, and where they are too many to hold."""
    columns, rows = picture_size(paths[0])
    if not fits((len(paths), rows, columns)):
        raise MedFLError(
            f"{len(paths)} slices of {columns}×{rows} pixels, as {paths[0].name} is, are more than can be read "
            f"at once ({MAX_VOXELS >> 20} million pixels); name fewer of them"
        )
    slices: list[np.ndarray] = []
    for path in paths:
        pixels = read_slice(path)
        slices.append(pixels)
        if pixels.shape != slices[0].shape:
            raise MedFLError(
                f"{path} is {_size(pixels)} and {paths[0].name} is {_size(slices[0])}, "
                "and the slices of a volume have one size; put them in folders of their own"
            )
    return np.stack(slices)


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}×{pixels.shape[0]}"


def volume_statistics(volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel over the volume's foreground: (3,) and (3,) float32.

    volume: (S, H, W, 3) uint8, a whole patient. Foreground is what lies above the channel's mean, so that the
    black around the head does not count. A blank channel has deviation 0. A lone slice is a volume of one
    slice: the same rule over fewer pixels, so a slice at the top of the head comes out stretched, and its
    mask is less sure.
    """
    means, deviations = zip(
        *(_moments(volume[..., channel].flatten(1).float()) for channel in range(volume.shape[-1]))
    )
    return torch.stack(means), torch.stack(deviations)


def _moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of one channel, (S, n) float32, over what lies above its mean. A channel at a time
    needs a third of the memory. Sums go slice by slice: float32 counts exactly to 16 million only, and a
    runtime that adds one number after the other, such as onnxruntime, would lose digits over a whole
    volume."""
    foreground = (values > values.mean(dim=1).mean()).float()
    count = foreground.sum(dim=1).sum().clamp(min=1.0)
    mean = (values * foreground).sum(dim=1).sum() / count
    variance = ((values - mean).square() * foreground).sum(dim=1).sum() / count
    return mean, variance.sqrt()


def apply_statistics(slices: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """(S, H, W, 3) uint8 slices of a volume, normalised by that volume's statistics: (S, 3, H, W) float32 in
    ±CLIP."""
    planes = (
        slices.permute(0, 3, 1, 2).contiguous().float()
    )  # each channel in one piece: arithmetic is ten times as fast
    mean, deviation = mean.view(3, 1, 1), deviation.view(3, 1, 1)
    there = (deviation > 0).float()  # a blank channel is 0 everywhere, not noise over epsilon
    return ((planes - mean) / (deviation + EPSILON) * there).clamp(-CLIP, CLIP)


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) float32 to (B, C, *size): averaged over the area of each new pixel where it shrinks, so that
    no pixel is skipped, and bilinear where it enlarges.

    From 256 to 128 this is the mean of each 2×2 block. Where sizes are known and bilinear is the same, torch's
    own is taken, which is faster; the products of matrices also export to ONNX with any h and w.
    """
    sides = list(zip(images.shape[2:], size))
    if all(_holds(n <= m) or _holds(n == 2 * m) for n, m in sides):
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    rows, columns = (
        _weights(length, wanted, images.device) for length, wanted in zip(images.shape[2:], size)
    )
    return torch.matmul(rows, torch.matmul(images, columns.T))


def _holds(fact: bool) -> bool:
    """Whether something is true of two sizes: in an exported graph, whatever sizes it will get, and not only of
    those that it is traced with."""
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(fact)
    return fact


def _weights(length: int, size: int, device: torch.device) -> torch.Tensor:
    """How much of each of `length` old pixels goes into each of `size` new ones, (size, length) float32."""
    old = torch.arange(length, device=device, dtype=torch.float32)[None]
    new = torch.arange(size, device=device, dtype=torch.float32)[:, None]
    step = torch.full((), length / size, device=device)  # old pixels a new one; a tensor, as h and w may be
    covered = torch.minimum((new + 1) * step, old + 1) - torch.maximum(new * step, old)
    centre = ((new + 0.5) * step - 0.5).clamp(min=0).minimum(old.max())
    return torch.where(step > 1, covered.clamp(min=0) / step, (1 - (centre - old).abs()).clamp(min=0))


def network_input(
    slices: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, side: int
) -> torch.Tensor:
    """Slices (B, H, W, 3) uint8 and their volume's statistics to the network's input, (B, 3, side, side)
    float32."""
    return resize(apply_statistics(slices, mean, deviation), (side, side))
