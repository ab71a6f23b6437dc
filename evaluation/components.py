"""The connected parts of a mask in three dimensions: their size, its uncertainty, and their diameters in the plane.

Both pages' tables and reports, predict.py and the structured report use these figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects, label

from evaluation.diameters import perpendicular_diameters

NEIGHBOURS = np.ones((3, 3, 3))  # also across a corner: voxels that touch belong to one component
LISTED = 20  # components that are measured separately; all smaller ones together are the last
LOW, HIGH = 0.1, 0.9  # probabilities: voxels from HIGH on give the lower bound, those from LOW on the upper
INTERVAL = (
    f"from the voxels of the component that have a probability of {HIGH:g} or more, to all around it that have {LOW:g} "
    "or more: 80 % where the model's probabilities hold and its doubts go together"
)
COLUMNS = (
    "component", "pieces", "first_slice", "last_slice", "voxels", "volume_cm3", "volume_low_cm3", "volume_high_cm3",
    "diameter_mm", "perpendicular_mm", "diameter_px", "perpendicular_px", "diameter_slice",
)  # fmt: skip


@dataclass(frozen=True)
class Component:
    """A connected part of a mask; voxels that touch at a corner are connected.

    number: from 1, the largest first. pieces: 1, or the number of small ones that are taken together. slices: first
    and last, from 1. voxels: its size. low, high: the bounds of `INTERVAL`, or None without probabilities.
    diameter_slice: the slice in which the two perpendicular diameters are measured, from 1. diameters: their lengths,
    in mm with a spacing, else in pixels. Both are None for small ones together. voxel_cm3: of one voxel, or None.
    """

    number: int
    pieces: int
    slices: tuple[int, int]
    voxels: int
    low: int | None
    high: int | None
    diameter_slice: int | None
    diameters: tuple[float, float] | None
    voxel_cm3: float | None

    def cm3(self, voxels: int | None) -> float | None:
        """The volume of so many voxels in cm³; None if their size is not known."""
        return None if voxels is None or self.voxel_cm3 is None else voxels * self.voxel_cm3

    def row(self) -> dict:
        """The component as a line of a table, by `COLUMNS`; unknown values are None."""
        longest, across = self.diameters or (None, None)
        in_mm = self.voxel_cm3 is not None
        values = (
            self.number, self.pieces, *self.slices, self.voxels, self.cm3(self.voxels), self.cm3(self.low),
            self.cm3(self.high), *((longest, across, None, None) if in_mm else (None, None, longest, across)),
            self.diameter_slice,
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))


@dataclass(frozen=True)
class Components:
    """The components of a mask.

    labels: (S, H, W) uint8, each voxel's component, 0 outside. parts: the components. unmarked: voxels that reach
    `LOW` around no component, or None without probabilities.
    """

    labels: np.ndarray
    parts: list[Component]
    unmarked: int | None


def find_components(
    mask: np.ndarray,
    spacing: tuple[float, float, float] | None = None,
    probability: np.ndarray | None = None,
) -> Components:
    """The components of a mask (S, H, W), non-zero is tumour.

    spacing: mm between rows, columns and slices. probability: (S, H, W) float32 from which the mask was made; None
    if a person drew it.
    """
    labels = np.zeros(mask.shape, np.uint8)
    seen = mask > 0 if probability is None else (mask > 0) | (probability >= LOW)
    boxes = find_objects(seen.astype(np.uint8))
    if not boxes:
        return Components(labels, [], None if probability is None else 0)
    box = boxes[0]
    inside, pieces = _number(mask[box] > 0)
    labels[box] = inside
    least: Sequence[int | None] = [None] * (len(pieces) + 1)
    most = least
    if probability is not None:
        sure = inside[probability[box] >= HIGH]
        least = np.bincount(sure, minlength=len(pieces) + 1).tolist()
        most = _reach(inside, seen[box], len(pieces), spacing)
    around = find_objects(inside, max_label=len(pieces))
    parts = [
        _measure(
            number,
            count,
            inside[own] == number,
            box[0].start + own[0].start,
            spacing,
            least[number],
            most[number],
        )
        for number, (count, own) in enumerate(zip(pieces, around), start=1)
    ]
    return Components(labels, parts, most[0])


def _number(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Each voxel's component as uint8, numbered from 1 by size, with those beyond `LISTED` as one; and each one's
    pieces."""
    found, count = label(mask, NEIGHBOURS)
    order = np.argsort(-np.bincount(found.ravel(), minlength=count + 1)[1:], kind="stable")
    numbers = np.zeros(count + 1, np.uint8)
    numbers[1 + order] = np.minimum(np.arange(count) + 1, LISTED + 1)
    return numbers[found], np.bincount(numbers[1:], minlength=1)[1:].tolist()


def _reach(
    labels: np.ndarray, likely: np.ndarray, count: int, spacing: tuple[float, float, float] | None
) -> list[int]:
    """How many likely voxels belong to no component (first) and to each component. A voxel belongs to the component
    that it is connected with; if there are several, to the nearest."""
    regions, _ = label(likely, NEIGHBOURS)
    sizes = np.bincount(regions.ravel())
    marked = labels > 0
    pairs = np.unique(np.stack([regions[marked], labels[marked]]), axis=1)
    owners = np.bincount(pairs[0], minlength=len(sizes))
    reach = [0] * (count + 1)
    for region, number in pairs.T[owners[pairs[0]] == 1].tolist():
        reach[number] += int(sizes[region])
    reach[0] = int(sizes[1:][owners[1:] == 0].sum())
    boxes = find_objects(regions)
    rows, columns, between = spacing or (1.0, 1.0, 1.0)
    for region in np.flatnonzero(owners > 1).tolist():
        here = regions[boxes[region - 1]] == region
        own = np.where(here, labels[boxes[region - 1]], 0)
        nearest = distance_transform_edt(
            own == 0, (between, rows, columns), return_distances=False, return_indices=True
        )
        for number, voxels in enumerate(np.bincount(own[tuple(nearest)][here]).tolist()):
            reach[number] += voxels
    return reach


def _measure(
    number: int,
    pieces: int,
    mine: np.ndarray,
    start: int,
    spacing: tuple[float, float, float] | None,
    low: int | None,
    high: int | None,
) -> Component:
    """One component's figures. mine: the voxels of the box around it, whose first slice is `start`, from 0."""
    filled = np.flatnonzero(mine.any(axis=(1, 2)))
    where, diameters = None, None
    if pieces == 1:
        plane = spacing[:2] if spacing else (1.0, 1.0)
        each = {int(k): perpendicular_diameters(mine[k], plane) for k in filled}
        best = max(each, key=lambda k: (each[k][0] * each[k][1], each[k][0]))
        where, diameters = start + best + 1, each[best]
    return Component(
        number,
        pieces,
        (start + int(filled[0]) + 1, start + int(filled[-1]) + 1),
        int(np.count_nonzero(mine)),
        low,
        high,
        where,
        diameters,
        float(np.prod(spacing)) / 1_000 if spacing else None,
    )


def volume_interval(found: Components, chosen: set[int]) -> tuple[int, int] | None:
    """The bounds of `INTERVAL` for the chosen components together, in voxels. Likely voxels around no component count
    in the upper bound. None without probabilities."""
    if found.unmarked is None:
        return None
    parts = [part for part in found.parts if part.number in chosen]
    return sum(part.low or 0 for part in parts), sum(part.high or 0 for part in parts) + found.unmarked
