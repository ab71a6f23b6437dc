"""How far apart the surfaces of two masks lie: HD95 and surface Dice."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import distance_transform_edt

from common import MedFLError

SURFACE_TOLERANCE = 2.0  # mm, of the surface Dice


def hd95(
    prediction: ArrayLike, truth: ArrayLike, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> float | None:
    """The 95th percentile of the distances between two volumes' surfaces, in three dimensions; None where a
    mask is empty.

    Both masks: (S, H, W), any dtype, non-zero is tumour. spacing: the distance between slices, rows and columns; the
    result has its unit, which is voxels by default. Distances are Euclidean, from every surface voxel of one mask to
    the nearest surface voxel of the other. Both directions are pooled before the percentile is taken (linear
    interpolation). Other definitions take the larger of two directed percentiles, or weigh by area, and give
    other numbers. Raises MedFLError if the shapes differ or aren't (S, H, W).
    """
    distances = _surface_distances(*two_masks(prediction, truth, dimensions=3), spacing)
    return None if distances is None else float(np.percentile(distances, 95))


def surface_dice(
    prediction: ArrayLike,
    truth: ArrayLike,
    spacing: tuple[float, float, float],
    tolerance: float = SURFACE_TOLERANCE,
) -> float | None:
    """Share of both masks' surface voxels that lie within `tolerance` of the other's surface, 0 to 1; 0 where
    one mask is empty, None where both are.

    Both masks: (S, H, W), any dtype, non-zero is tumour; spacing and tolerance: mm. Nikolov et al. 2018
    (arXiv:1809.04430), counted in voxels. Raises MedFLError if the shapes differ or aren't (S, H, W).
    """
    predicted, actual = two_masks(prediction, truth, dimensions=3)
    if not predicted.any() and not actual.any():
        return None
    distances = _surface_distances(predicted, actual, spacing)
    return 0.0 if distances is None else float(np.mean(distances <= tolerance))


def hd95_in_plane(prediction: ArrayLike, truth: ArrayLike) -> tuple[float | None, int]:
    """Like `hd95`, but within slices and in pixels, for volumes of unknown spacing; and the number of slices in which
    only one of the masks has any pixel.

    The first figure pools the slices in which both masks have pixels, and is None without such a slice. A large false
    tumour on other slices leaves it at 0, so it is never shown without the second. Raises MedFLError if the shapes
    differ or aren't (S, H, W).
    """
    predicted, actual = two_masks(prediction, truth, dimensions=3)
    there = predicted.any(axis=(1, 2)), actual.any(axis=(1, 2))
    lonely = int(np.count_nonzero(there[0] ^ there[1]))
    # a slice is a volume of one slice, whose surface is the outline in the plane
    distances = [
        _surface_distances(predicted[i : i + 1], actual[i : i + 1], (1.0, 1.0, 1.0), in_plane=True)
        for i in np.flatnonzero(there[0] & there[1])
    ]
    known = [of_slice for of_slice in distances if of_slice is not None]
    return (float(np.percentile(np.concatenate(known), 95)) if known else None), lonely


def two_masks(
    prediction: ArrayLike, truth: ArrayLike, dimensions: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth as bool: True where they are not 0. dimensions: how many they must have. Raises MedFLError
    if their shapes differ or have another number of dimensions."""
    predicted, actual = np.asarray(prediction) != 0, np.asarray(truth) != 0
    if predicted.shape != actual.shape:
        raise MedFLError(
            f"prediction {predicted.shape} and truth {actual.shape} differ in shape; "
            "resize the prediction's logits to the truth's pixel grid"
        )
    if dimensions is not None and actual.ndim != dimensions:
        raise MedFLError(
            f"a patient's masks must be (slices, height, width), not {actual.shape}; stack the slices"
        )
    return predicted, actual


def _surface(mask: np.ndarray, in_plane: bool) -> np.ndarray:
    """The voxels of a mask (S, H, W) that have a neighbour outside it; only neighbours in the slice if `in_plane`."""
    padded = np.pad(mask, 1)  # a tumour that the volume's edge cuts off has its surface there
    inside = padded.copy()
    for axis in (1, 2) if in_plane else (0, 1, 2):
        inside &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return mask & ~inside[1:-1, 1:-1, 1:-1]


def _surface_distances(
    predicted: np.ndarray, actual: np.ndarray, spacing: tuple[float, float, float], in_plane: bool = False
) -> np.ndarray | None:
    """Distances from each surface voxel of one mask to the other's surface, both directions, (n,) float64;
    None where a mask is empty."""
    if not predicted.any() or not actual.any():
        return None
    either = predicted | actual
    # Both surfaces lie inside the crop, so the distances stay exact while the transforms see far fewer voxels.
    places = [np.flatnonzero(either.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    crop: tuple[slice, ...] = tuple(slice(where[0], where[-1] + 1) for where in places)
    first, second = (_surface(mask[crop], in_plane) for mask in (predicted, actual))
    return np.concatenate(
        [
            distance_transform_edt(~second, sampling=spacing)[first],
            distance_transform_edt(~first, sampling=spacing)[second],
        ]
    )
