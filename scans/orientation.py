"""The orientation of volumes: the one place that decides how stored voxels become slices, for every kind of
file.

Directions are in mm towards the patient's left, back and head (LPS), as in DICOM. Slices are shown and
prepared as in the training set: the nose up, the patient's left on the picture's right, from feet to head.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import nibabel

SHOWN = "LPS"  # directions of the columns, rows and slices of a shown volume
EDGES = {"left": "R", "right": "L", "top": "A", "bottom": "P"}  # the letters at the edges of a shown slice
UNKNOWN = "orientation unknown"
SHEARED = 0.005  # cosine of the angle between two stored axes; over 200 mm that is 1 mm
OFF_GRID = 0.1  # voxels by which a mask's grid may differ from that of its scan, because programs round
APART = 1.0  # mm between the places of a voxel by the two records of one file

Axes = tuple[tuple[int, ...], tuple[bool, ...]]


def closest_axes(directions: np.ndarray) -> Axes:
    """For each of left, back and head: the nearest stored axis, and whether it runs in the opposite
    direction.

    directions: (3, 3), a column of any length for each stored axis. The best fitting axis is assigned first,
    as in nibabel.
    """
    lengths = np.linalg.norm(directions, axis=0)
    cosines = directions / np.where(lengths > 0, lengths, 1)
    stored = [-1, -1, -1]
    for axis in np.argsort(-np.abs(cosines).max(axis=0), kind="stable"):
        free = [body for body in range(3) if stored[body] < 0]
        stored[max(free, key=lambda body: abs(cosines[body, axis]))] = int(axis)
    return tuple(stored), tuple(bool(cosines[body, axis] < 0) for body, axis in enumerate(stored))


def to_shown(values: np.ndarray, axes: Axes) -> np.ndarray:
    """Stored values (I, J, K, ...) as slices (S, H, W, ...). axes: the result of `closest_axes`."""
    stored, against = axes
    slices = np.moveaxis(values, stored, (2, 1, 0))
    return np.ascontiguousarray(slices[_steps(against)])


def from_shown(slices: np.ndarray, axes: Axes) -> np.ndarray:
    """The inverse of `to_shown`."""
    stored, against = axes
    return np.ascontiguousarray(np.moveaxis(slices[_steps(against)], (2, 1, 0), stored))


def _steps(against: tuple[bool, ...]) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if turned else 1) for turned in against[::-1])


def shown_affine(affine: np.ndarray, shape: tuple[int, ...], axes: Axes) -> np.ndarray:
    """The affine (4, 4) of the volume that `to_shown` gives, for indices (column, row, slice).

    affine: of the stored voxels, (4, 4); shape: of the stored voxels, at least (I, J, K).
    """
    stored, against = axes
    turned = affine.copy()
    for column, (axis, backwards) in enumerate(zip(stored, against)):
        turned[:3, column] = affine[:3, axis] * (-1 if backwards else 1)
        if backwards:
            turned[:3, 3] += affine[:3, axis] * (shape[axis] - 1)
    return turned


def mirrored(affine: np.ndarray) -> np.ndarray:
    """An affine (4, 4) converted from RAS to LPS, or back: NIfTI counts towards the right and front, DICOM
    towards the left and back."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def is_sheared(directions: np.ndarray) -> bool:
    """Whether stored axes (3, 3), a column each, are not at right angles."""
    unit = directions / np.linalg.norm(directions, axis=0)
    return bool(np.abs(unit.T @ unit - np.eye(3)).max() > SHEARED)


def distance_apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest distance in mm between the places that two affines (4, 4) give to a voxel of a volume."""
    corners = np.array(
        [[*(np.array(corner) * (np.array(shape[:3]) - 1)), 1] for corner in np.ndindex(2, 2, 2)]
    )
    return float(np.linalg.norm(((one - other) @ corners.T)[:3], axis=0).max())


def same_place(one: "nibabel.Nifti1Image", other: "nibabel.Nifti1Image") -> bool:
    """Whether two images have the same grid, whatever order their voxels are stored in."""
    sizes, places = [], []
    for image in (one, other):
        affine = mirrored(image.affine)
        axes = closest_axes(affine[:3, :3])
        sizes.append(tuple(image.shape[axis] for axis in axes[0]))
        places.append(shown_affine(affine, image.shape, axes))
    finest = np.linalg.norm(places[0][:3, :3], axis=0).min()
    return sizes[0] == sizes[1] and distance_apart(places[0], places[1], sizes[0]) <= OFF_GRID * finest
