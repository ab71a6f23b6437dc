"""Where a case of DICOM came from."""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from radiology.series import Series


@dataclass
class Source:
    """The series that a case's slices were made of, and how to get back onto its grid.

    series: FLAIR, its files in memory; grid: an empty image on it; margins: black rows above and black
    columns on the left that made the slices square, and the rows and columns in between.
    """

    series: Series
    grid: sitk.Image
    margins: tuple[int, int, int, int]

    def within(self, slices: np.ndarray) -> np.ndarray:
        """A view of slices (S, H, W) without the margins."""
        above, left, below, right = self.margins
        return slices[:, above : slices.shape[1] - below, left : slices.shape[2] - right]
