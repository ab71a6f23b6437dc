"""What a reader sees of a slice: channels, window, mask as fill or outline, probability, comparison with the
truth.

Pure functions of numpy arrays. Colours are told apart by colour-blind readers (Okabe and Ito), and lines
differ in style.
"""

import io

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from preprocessing import CHANNELS
from scans.orientation import EDGES, UNKNOWN

VIEWS = {
    "pre": CHANNELS.index("pre-contrast"),
    "FLAIR": CHANNELS.index("FLAIR"),
    "post": CHANNELS.index("post-contrast"),
    "composite": None,
}
ORANGE, BLUE, YELLOW = (230, 159, 0), (86, 180, 233), (240, 228, 66)  # prediction, truth, agreement
SHOWN = 640  # pixels that the shorter side of a picture has at least
DASH = 8  # pixels of the shown picture
LINE = 2
LETTER = 30  # the part of a picture's shorter side that a letter is high, as a divisor
PLACES = {
    "left": (0.01, 0.5, "lm"),
    "right": (0.99, 0.5, "rm"),
    "top": (0.5, 0.01, "mt"),
    "bottom": (0.5, 0.99, "mb"),
}


def enlargement(shape: tuple[int, int]) -> int:
    """By how much a slice (H, W) is enlarged, a whole number, so that
    lines are fine and pixels stay square."""
    return max(1, -(-SHOWN // min(shape)))


def windowed(pixels: np.ndarray, level: float, width: float) -> np.ndarray:
    """uint8 pixels of any shape, so that level - width / 2 becomes 0 and level + width / 2 becomes 255."""
    return (
        ((pixels.astype(np.float32) - level) * (255 / max(width, 1)) + 127.5)
        .clip(0, 255)
        .round()
        .astype(np.uint8)
    )


def base_picture(
    slice_pixels: np.ndarray, view: str, level: float = 127.5, width: float = 255.0
) -> np.ndarray:
    """A slice (H, W, 3) uint8 in one of `VIEWS`, enlarged, (h, w, 3) uint8. The composite is the three as
    red, green, blue."""
    channel = VIEWS[view]
    chosen = (
        slice_pixels if channel is None else np.repeat(slice_pixels[..., channel : channel + 1], 3, axis=2)
    )
    times = enlargement(chosen.shape[:2])
    picture = Image.fromarray(windowed(chosen, level, width))
    return np.asarray(
        picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)
    )


def enlarged(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) as the shown picture's pixels, (h, w) bool."""
    times = enlargement(mask.shape)
    return np.repeat(np.repeat(mask > 0, times, axis=0), times, axis=1)


def fill(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], opacity: float) -> np.ndarray:
    """A picture (h, w, 3) with a mask (H, W) laid over it in this colour; opacity 0 to 1."""
    inside, out = enlarged(mask), picture.astype(np.float32)
    out[inside] = (1 - opacity) * out[inside] + opacity * np.array(colour, np.float32)
    return out.round().astype(np.uint8)


def outline(
    picture: np.ndarray,
    mask: np.ndarray,
    colour: tuple[int, int, int],
    dashed: bool = False,
    opacity: float = 1.0,
) -> np.ndarray:
    """A picture (h, w, 3) with the edge of a mask (H, W) drawn just inside of it, solid or dashed; opacity 0
    to 1."""
    inside, out = enlarged(mask), picture.astype(np.float32)
    line = inside & ~binary_erosion(inside, iterations=LINE, border_value=1)
    if dashed:
        rows, columns = np.indices(line.shape)
        line &= (rows + columns) // DASH % 2 == 0
    out[line] = (1 - opacity) * out[line] + opacity * np.array(colour, np.float32)
    return out.round().astype(np.uint8)


def blended(picture: np.ndarray, over: np.ndarray, opacity: float) -> np.ndarray:
    """A picture (h, w, 3) uint8 under another of its size; opacity of the upper one, 0 to 1."""
    return ((1 - opacity) * picture.astype(np.float32) + opacity * over).round().astype(np.uint8)


def probability_picture(probability: np.ndarray) -> np.ndarray:
    """Probabilities (H, W) 0 to 1, enlarged, in the colours of cividis: dark blue 0, yellow 1. (h, w, 3)
    uint8."""
    times = enlargement(probability.shape)
    coloured = colormaps["cividis"](
        np.repeat(np.repeat(probability, times, axis=0), times, axis=1), bytes=True
    )
    return np.ascontiguousarray(coloured[..., :3])


def comparison(picture: np.ndarray, prediction: np.ndarray, truth: np.ndarray, opacity: float) -> np.ndarray:
    """Agreement filled in yellow, false tumour in orange with a solid edge, missed tumour in blue with a
    dashed edge.

    picture: (h, w, 3); prediction, truth: (H, W), above 0 is tumour.
    """
    agreed = np.logical_and(prediction > 0, truth > 0)
    false, missed = np.logical_and(prediction > 0, ~agreed), np.logical_and(truth > 0, ~agreed)
    for mask, colour in ((agreed, YELLOW), (false, ORANGE), (missed, BLUE)):
        picture = fill(picture, mask, colour, opacity)
    return outline(outline(picture, false, ORANGE), missed, BLUE, dashed=True)


def marked(picture: np.ndarray, oriented: bool) -> np.ndarray:
    """A picture (h, w, 3) with R, L, A and P at its edges, or the words that the orientation is not known."""
    image = Image.fromarray(picture)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(max(10, min(image.size) // LETTER))
    texts = (
        {PLACES[edge]: letter for edge, letter in EDGES.items()} if oriented else {PLACES["bottom"]: UNKNOWN}
    )
    for (across, down, anchor), text in texts.items():
        place = (across * image.width, down * image.height)
        pen.text(place, text, (255, 255, 255), font, anchor, stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(image)


def icon() -> Image.Image:
    """The page's icon: an orange outline on dark grey. Streamlit would fetch
    a named one from another server."""
    rows, columns = np.indices((32, 32)) - 15.5
    inside = (np.hypot(rows, columns) < 12).astype(np.uint8)
    pixels = np.full((32, 32, 3), 60, np.uint8)
    pixels[(inside > 0) & ~binary_erosion(inside, iterations=4)] = ORANGE
    return Image.fromarray(pixels)


def png(pixels: np.ndarray) -> bytes:
    """Pixels (H, W) or (H, W, 3) uint8 as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=4)
    return file.getvalue()
