"""The source of a DICOM case, and the network's input for it."""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from radiology.series import Series


@dataclass
class Source:
    """The series from which a case's slices were made, and the way back onto its grid.

    series: FLAIR, its files in memory; grid: an empty image on it; page: an empty image on the slices that
    are shown, without margins; margins: black rows above and black columns on the left that made the slices
    square, and the rows and columns below and on the right; fed: (s, 256, 256, 3) uint8, the study prepared
    by radiology.preparation, as for training; fixed: an empty image on its grid; refusal: why the series gets
    no DICOM SEG, or None if it gets one.
    """

    series: Series
    grid: sitk.Image
    page: sitk.Image
    margins: tuple[int, int, int, int]
    fed: np.ndarray
    fixed: sitk.Image
    refusal: str | None = None

    def within(self, slices: np.ndarray) -> np.ndarray:
        """A view of slices (S, H, W) without the margins."""
        above, left, below, right = self.margins
        return slices[:, above : slices.shape[1] - below, left : slices.shape[2] - right]

    def framed(self, slices: np.ndarray, fill: float = 0.0) -> np.ndarray:
        """Slices of the page's grid, (S, h, w), with the margins."""
        above, left, below, right = self.margins
        return np.pad(slices, ((0, 0), (above, below), (left, right)), constant_values=fill)

    def onto_page(self, values: np.ndarray) -> np.ndarray:
        """The network's output for `fed`, (s, 256, 256) float32, on the slices that are shown, (S, H, W), 0
        in the margins."""
        return self.framed(_moved(values, self.fixed, self.page))

    def onto_series(self, mask: np.ndarray) -> np.ndarray:
        """A mask (S, H, W) uint8 of the case on the series' own slices, rows and columns, in its order, 1 where
        there is tumour."""
        return _moved(self.within(mask) > 0, self.page, self.grid, sitk.sitkNearestNeighbor)

    def probability_on_series(self, probability: np.ndarray) -> np.ndarray:
        """Probabilities (S, H, W) float32 of the case on the series' own slices, rows and columns, in its order."""
        return _moved(self.within(probability), self.page, self.grid)


def _moved(values: np.ndarray, grid: sitk.Image, onto: sitk.Image, how: int = sitk.sitkLinear) -> np.ndarray:
    """Values on one grid (bool becomes uint8) resampled to another, 0 outside."""
    if values.dtype == bool:
        values = values.astype(np.uint8)
    image = sitk.GetImageFromArray(np.ascontiguousarray(values))
    image.CopyInformation(grid)
    return sitk.GetArrayFromImage(sitk.Resample(image, onto, sitk.Transform(), how, 0.0))
