"""A head in a field of view of any size, as NIfTI."""

import nibabel
import numpy as np


def head_in(shape, middle, radii, spacing) -> np.ndarray:
    """A head with a bright spot at the patient's left, (columns to the left, rows to the back, slices to the head)."""
    places = np.meshgrid(*(np.arange(n) * mm for n, mm in zip(shape, spacing)), indexing="ij")
    head = sum(((p - m) / r) ** 2 for p, m, r in zip(places, middle, radii)) < 1
    spot = sum((p - m - d) ** 2 for p, m, d in zip(places, middle, (30, 0, 0))) < 15**2
    return (head * 400 + spot * 300).astype(np.int16)


def nifti(volume: np.ndarray, spacing, order=(0, 1, 2), code=1) -> nibabel.Nifti1Image:
    """A volume whose axes lead to left, back and head, stored in another order of axes."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])[:, [*order, 3]]
    image = nibabel.Nifti1Image(volume.transpose(order), affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    return image
