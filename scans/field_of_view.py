"""Finds the head in a field of view that is much larger than it, and makes square slices around it, framed
like the slices that the network was trained on.

The page in the browser does the same (deployment/browser/field_of_view.js).
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import label

# A field of view is cropped to the head where it is taller than TALL mm, or wider than WIDE times the head with
# AROUND mm on both sides. HEAD: mm from the crown down that count as the head, as FSL's robustfov has it.
TALL, WIDE, AROUND, HEAD = 190.0, 1.35, 10.0, 170.0
COARSE, LEAST_HEAD = 4.0, 0.01  # mm per coarse voxel of the search; the head's smallest share of them
SMALLEST = 100.0  # mm; a newborn's head has 110. A smaller object may be a tumour: nothing is cropped
BINS = 128  # bins of Otsu's histogram
DISTANCE = 3.0  # mm between slices that are made by averaging; the dataset has about 1.5 to 6

Spacing = tuple[float, float, float]  # mm between slices, rows and columns


@dataclass(frozen=True)
class Box:
    """A part of a volume: its first slice, row and column, and the ones after its last. told: a text about
    it."""

    start: tuple[int, int, int]
    end: tuple[int, int, int]
    told: tuple[str, ...] = ()

    @property
    def inside(self) -> tuple[slice, slice, slice]:
        first, second, third = (slice(low, high) for low, high in zip(self.start, self.end))
        return first, second, third


def find_head(slices: np.ndarray, spacing: Spacing, is_axial: bool) -> Box:
    """The part of slices (S, H, W), from feet to head, that holds the head: all of them if the field of view
    is not much larger. The neck is cut off only if the slices were not acquired axially."""
    size, step = np.array(slices.shape), np.array(spacing)
    everything = Box((0, 0, 0), (slices.shape[0], slices.shape[1], slices.shape[2]))
    factors = [max(1, int(COARSE / mm + 1e-6)) for mm in spacing]
    shown = _foreground(_averaged(slices, factors))
    if shown is None:
        return everything
    coarse = np.array(factors) * step  # mm
    crown = float(np.flatnonzero(shown.any(axis=(1, 2))).max() + 1) * coarse[0]
    low, high, told = np.zeros(3), size.astype(float), []
    if not is_axial and size[0] * step[0] > TALL:
        low[0] = max(0.0, (crown - HEAD) / step[0])
        high[0] = min(size[0], (crown + AROUND) / step[0])
        told.append(f"cropped to {HEAD:.0f} mm from the crown down")
    near = shown[int(max(0.0, (crown - HEAD) / coarse[0])) :]
    box = [np.flatnonzero(near.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in (1, 2)]
    edges = np.array([[first, last + 1] for first, last in box]) * coarse[1:, None]  # mm, of rows and columns
    side = float((edges[:, 1] - edges[:, 0]).max()) + 2 * AROUND
    widest = float(max(size[1:] * step[1:]))
    if side - 2 * AROUND >= SMALLEST and widest > WIDE * side:
        middle = edges.mean(axis=1)
        low[1:] = ((middle - side / 2) / step[1:]).clip(0)
        high[1:] = np.minimum((middle + side / 2) / step[1:], size[1:])
        told.append(f"cropped to the head, {side:.0f} of {widest:.0f} mm")
    (a, b, c), (d, e, f) = np.floor(low).astype(int).tolist(), np.ceil(high).astype(int).tolist()
    return Box((a, b, c), (d, e, f), tuple(told))


def square_margins(rows: int, columns: int, down: float, across: float) -> tuple[int, int, int, int]:
    """The numbers of black rows above, columns left, rows below and columns right that make slices square in
    mm. down, across: mm between rows and columns."""
    side = max(rows * down, columns * across)
    more_rows, more_columns = (
        max(0, int(side / down + 0.5) - rows),
        max(0, int(side / across + 0.5) - columns),
    )
    return more_rows // 2, more_columns // 2, more_rows - more_rows // 2, more_columns - more_columns // 2


def _averaged(slices: np.ndarray, factors: list[int]) -> np.ndarray:
    """The means of blocks of so many slices, rows and columns, float32; incomplete blocks at the ends are
    dropped."""
    first, second, third = (n // factor for n, factor in zip(slices.shape, factors))
    whole = slices[: first * factors[0], : second * factors[1], : third * factors[2]]
    blocks = whole.reshape(first, factors[0], second, factors[1], third, factors[2])
    return blocks.mean(axis=(1, 3, 5), dtype=np.float32)


def _foreground(coarse: np.ndarray) -> np.ndarray | None:
    """The largest connected object brighter than Otsu's threshold; None if it is too small."""
    if not coarse.size or coarse.min() == coarse.max():
        return None
    parts, _ = label(coarse > otsu(coarse))
    sizes = np.bincount(parts.ravel())[1:]
    if not sizes.size or sizes.max() <= LEAST_HEAD * coarse.size:
        return None
    return parts == 1 + sizes.argmax()


def otsu(values: np.ndarray) -> float:
    """The threshold between dark and bright that maximises the variance between the two classes (Otsu
    1979)."""
    counts, edges = np.histogram(values, BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    below, above = counts.cumsum()[:-1], counts.sum() - counts.cumsum()[:-1]
    sums = (counts * middles).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(edges[1 + int(np.nan_to_num(apart).argmax())])
