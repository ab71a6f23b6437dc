"""The one-page report: picture, figures, areas over the slices, model card and the notice, as a PNG."""

import io
import textwrap

import numpy as np
from matplotlib.figure import Figure

from borders.escaping import drawn
from deployment.app.card import NOTICE

ORANGE = "#C77700"
PAGE = (8.27, 11.69)  # inches, A4
DPI = 150
LETTERS = 75  # letters of the title before it is cut


def draw_report(
    title: str,
    pictures: list[tuple[str, np.ndarray]],
    rows: list[dict],
    figures: list[tuple[str, str]],
    card: list[tuple[str, str]],
    doubts: list[str],
    region: str,
) -> bytes:
    """The report as PNG. pictures: two of (caption, (h, w, 3) uint8); rows: `readout.slice_rows`; figures,
    card: (name, text); region: what is outlined."""
    page = Figure(figsize=PAGE, dpi=DPI, facecolor="white")
    page.text(0.07, 0.955, drawn(f"MedFL: {region} segmentation"), fontsize=17, weight="bold")
    title = title if len(title) <= LETTERS else f"{title[: LETTERS - 20]}…{title[-18:]}"
    page.text(0.07, 0.935, drawn(title), fontsize=10, color="#444444")
    page.text(0.07, 0.912, NOTICE, fontsize=10, weight="bold", color="#8A1C00")
    for place, (caption, pixels) in enumerate(pictures):
        axes = page.add_axes((0.07 + 0.44 * place, 0.58, 0.42, 0.30))
        axes.imshow(pixels)
        axes.set_axis_off()
        axes.set_title(drawn(caption), fontsize=9)
    top = 0.49
    if len(rows) > 1:
        top = 0.37
        chart = page.add_axes((0.12, 0.425, 0.81, 0.09))
        chart.bar(
            [row["slice"] for row in rows], [row["tumour_pixels"] for row in rows], color=ORANGE, width=0.8
        )
        chart.locator_params(axis="x", integer=True)
        chart.set_xlabel("slice", fontsize=8)
        chart.set_ylabel(drawn(f"{region} pixels"), fontsize=8)
        chart.tick_params(labelsize=8)
        chart.spines[["top", "right"]].set_visible(False)
    _table(page, 0.07, top, "Figures", figures, 0.17, width=18)
    _table(page, 0.44, top, "Model", card, 0.09, width=46)
    if doubts:
        mind = textwrap.wrap("Mind: " + " ".join(doubts), 115)[:4]
        page.text(0.07, 0.575, "\n".join(map(drawn, mind)), fontsize=8, va="top", color="#8A1C00")
    file = io.BytesIO()
    page.savefig(file, format="png")
    return file.getvalue()


def _table(
    page: Figure, left: float, top: float, title: str, rows: list[tuple[str, str]], indent: float, width: int
) -> None:
    """Draw subjects and, after `indent`, their texts wrapped to `width` letters, from `top` downwards."""
    page.text(left, top, title, fontsize=11, weight="bold")
    height = top - 0.02
    for subject, text in rows:
        lines = textwrap.wrap(str(text), width) or [""]
        page.text(left, height, drawn(subject), fontsize=8, color="#444444", va="top")
        page.text(left + indent, height, "\n".join(map(drawn, lines)), fontsize=8, va="top")
        height -= 0.0135 * len(lines) + 0.004
