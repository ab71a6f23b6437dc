"""Straight lines across a mask in the plane of a slice: the longest, and the longest at a right angle to it."""

import numpy as np
from scipy.ndimage import find_objects, label

CORNERS = np.ones((3, 3))  # pixels that touch at a corner are connected


def largest_diameter(mask: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    """The longest straight line between the centres of two pixels of one connected part of a mask (H, W), in
    pixels, or in mm with the spacing of rows and columns; 0 for an empty mask or single pixels. Pixels that
    touch at a corner are connected."""
    return max((length(*_ends(points)) for points in _parts(mask, spacing)), default=0.0)


def perpendicular_diameters(
    mask: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float]:
    """The two largest perpendicular diameters of a mask (H, W), as RANO measures a tumour in a slice.

    The first is `largest_diameter`; the second is the longest line between the centres of two pixels of the same
    part that lies at a right angle to the first, to the width of a pixel. Of several parts, the one with the largest
    product counts. In pixels, or in mm with the spacing of rows and columns; (0, 0) for an empty mask. Wen et al.
    2010, doi:10.1200/JCO.2009.26.3541; by software: Chang et al. 2019, doi:10.1093/neuonc/noz106.
    """
    both = []
    for points in _parts(mask, spacing):
        one, other = _ends(points)
        longest = length(one, other)
        across = _widest(points, (other - one) / longest, min(spacing)) if longest else 0.0
        both.append((longest, across))
    return max(both, key=lambda pair: (pair[0] * pair[1], pair[0]), default=(0.0, 0.0))


def length(one: np.ndarray, other: np.ndarray) -> float:
    """The distance between two points."""
    return float(np.hypot(*(other - one)))


def _parts(mask: np.ndarray, spacing: tuple[float, float]) -> list[np.ndarray]:
    """The pixels' centres of each connected part, (n, 2)."""
    numbered, _ = label(mask > 0, structure=CORNERS)
    return [
        (np.argwhere(numbered[box] == part) + [side.start for side in box]) * np.array(spacing)
        for part, box in enumerate(find_objects(numbered), start=1)
    ]


def _ends(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two of the points (n, 2) that are farthest apart."""
    from scipy.spatial import ConvexHull, QhullError  # take long to load, and hospitals measure no diameters
    from scipy.spatial.distance import pdist, squareform

    if len(points) > 2:
        try:
            points = points[ConvexHull(points).vertices]
        except QhullError:  # all on a line
            points = np.stack([points[0], points[-1]])
    one, other = np.unravel_index(np.argmax(squareform(pdist(points))), (len(points),) * 2)
    return points[one], points[other]


def _widest(points: np.ndarray, along: np.ndarray, width: float) -> float:
    """How far points (n, 2) reach at a right angle to a direction: the most within any strip of this width."""
    t, s = points @ along, points @ np.array([-along[1], along[0]])
    widest = 0.0
    for offset in (0.0, 0.5):  # strips overlap by half, so that none is cut where it is widest
        strip = np.floor((t - t.min()) / width + offset).astype(int)
        low, high = np.full(strip.max() + 1, np.inf), np.full(strip.max() + 1, -np.inf)
        np.minimum.at(low, strip, s)
        np.maximum.at(high, strip, s)
        widest = max(widest, float((high - low).max()))
    return widest
