"""The pictures of a report, masks as PNG and the page's icon. The pictures on the page are drawn by the
viewer.

Pure functions of numpy arrays. Colour-blind readers can distinguish the outline's colour (Okabe and Ito).
"""

import io

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from appearance.features import FLAIR
from scans.orientation import EDGES, UNKNOWN

ORANGE = (230, 159, 0)
SHOWN = 640  # least number of pixels of a picture's shorter side
LINE = 2
LETTER = 30  # a picture's shorter side divided by the height of a letter
PLACES = {
    "left": (0.01, 0.5, "lm"),
    "right": (0.99, 0.5, "rm"),
    "top": (0.5, 0.01, "mt"),
    "bottom": (0.5, 0.99, "mb"),
}


def enlargement(shape: tuple[int, int]) -> int:
    """The whole-number factor by which a slice (H, W) is enlarged, so that lines are fine and pixels stay
    square."""
    return max(1, -(-SHOWN // min(shape)))


def flair_picture(slice_pixels: np.ndarray) -> np.ndarray:
    """FLAIR of a slice (H, W, 3) uint8, enlarged, (h, w, 3) uint8 in grey."""
    picture = Image.fromarray(np.ascontiguousarray(slice_pixels[..., FLAIR]))
    times = enlargement((picture.height, picture.width))
    return np.asarray(
        picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC).convert(
            "RGB"
        )
    )


def enlarged(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) in the pixels of the shown picture, (h, w) bool."""
    times = enlargement(mask.shape)
    return np.repeat(np.repeat(mask > 0, times, axis=0), times, axis=1)


def outline(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture (h, w, 3) with the edge of a mask (H, W) drawn just inside of it in orange."""
    inside, out = enlarged(mask), picture.copy()
    out[inside & ~binary_erosion(inside, iterations=LINE, border_value=1)] = ORANGE
    return out


def probability_picture(probability: np.ndarray) -> np.ndarray:
    """Probabilities (H, W) 0 to 1, enlarged, in the colours of cividis: dark blue 0, yellow 1. (h, w, 3)
    uint8."""
    times = enlargement(probability.shape)
    coloured = colormaps["cividis"](
        np.repeat(np.repeat(probability, times, axis=0), times, axis=1), bytes=True
    )
    return np.ascontiguousarray(coloured[..., :3])


def marked(picture: np.ndarray, oriented: bool) -> np.ndarray:
    """A picture (h, w, 3) with R, L, A and P at its edges, or a note that the orientation is not known."""
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
    """The page's icon: an orange outline on dark grey. Streamlit would fetch a named icon from another
    server."""
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
