"""Pictures of masks over scans: truth and prediction as outlines on FLAIR."""

from pathlib import Path

import numpy as np

from borders import escaping
from evaluation.curves import new_figure
from scans.orientation import EDGES, UNKNOWN
from storage.files import atomic_write

BLUE, ORANGE = (
    "#56B4E9",
    "#E69F00",
)  # told apart by colour-blind readers (Okabe and Ito), bright enough for dark scans
PLACES = {"left": (0.03, 0.5), "right": (0.97, 0.5), "top": (0.5, 0.97), "bottom": (0.5, 0.03)}
LETTER = {"color": "white", "fontsize": 8, "ha": "center", "va": "center"}
COLUMNS = 4
MAX_SLICES = 8


def draw_outlines(
    volume: np.ndarray, truth: np.ndarray, prediction: np.ndarray, title: str, path: Path, oriented: bool
) -> None:
    """Write a PNG of up to 8 slices with the truth dashed in blue and the prediction solid in orange, on
    FLAIR.

    volume: (S, H, W, 3) uint8; truth, prediction: (S, H, W), non-zero is tumour. The slices are spread evenly
    over those in which either mask has pixels. oriented: whether the patient's left is known to be on the right of
    each slice. If so, R, L, A and P stand at the edges, and the title gives the order of the slices from I (feet) to
    S (head). If not, the picture says that the orientation is unknown.
    """
    marked = np.flatnonzero((truth > 0).any(axis=(1, 2)) | (prediction > 0).any(axis=(1, 2)))
    marked = marked if len(marked) else np.arange(len(volume))
    shown = marked[
        np.unique(np.linspace(0, len(marked) - 1, min(MAX_SLICES, len(marked))).round().astype(int))
    ]
    from matplotlib.lines import Line2D  # imported here as in new_figure

    rows = -(-len(shown) // COLUMNS)
    figure = new_figure((3 * COLUMNS, 3.2 * rows + 0.8), dpi=100, facecolor="white")
    for axes, number in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, shown):
        axes.imshow(volume[number, :, :, 1], cmap="gray", vmin=0, vmax=255)
        _outline(axes, truth[number], BLUE, "dashed")
        _outline(axes, prediction[number], ORANGE, "solid")
        axes.set_title(f"slice {number + 1}", fontsize=10)
        for edge, letter in EDGES.items() if oriented else [("bottom", UNKNOWN)]:
            axes.text(*PLACES[edge], letter, transform=axes.transAxes, **LETTER)
    for axes in figure.axes:
        axes.set_axis_off()
    order = "; slices go from I (feet) to S (head)" if oriented else ""
    figure.suptitle(escaping.drawn(title) + order)
    figure.legend(
        handles=[
            Line2D([], [], color=BLUE, linestyle="dashed", label="truth"),
            Line2D([], [], color=ORANGE, label="prediction"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _outline(axes, mask: np.ndarray, colour: str, style: str) -> None:
    if mask.any():  # a contour of nothing warns
        axes.contour(mask > 0, levels=[0.5], colors=colour, linestyles=style, linewidths=1.4)
