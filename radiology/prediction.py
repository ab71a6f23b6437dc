"""A model's proposal for a study, on the slices of its FLAIR series, after the same preparation as training data."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import SimpleITK as sitk

from checkpoint import Checkpoint
from common import MedFLError
from evaluation.components import Component, find_components
from inference import predict_volume, to_mask
from radiology.preparation import prepare
from radiology.rules import FLAIR, Rules
from radiology.series import Series
from radiology.studies import Study


@dataclass(frozen=True)
class Proposal:
    """mask: (S, H, W) uint8, 0 or 255, on the series' slices in the series' order; all 0 if no tumour was found.
    sources: the series that the model saw. notes: what a reader should know about them. way: how the mask was made, if
    not by `propose`. probability: (S, H, W) float32 from which the mask was made, or None."""

    mask: np.ndarray
    series: Series
    sources: tuple[Series, ...]
    notes: tuple[str, ...]
    way: str = ""
    probability: np.ndarray | None = None

    @cached_property
    def components(self) -> list[Component]:
        """The connected parts of the mask, the largest first."""
        between, row, column = self.series.spacing
        return find_components(self.mask, (row, column, between), self.probability).parts

    @property
    def volume_ml(self) -> float:
        """The volume of the mask, in millilitres."""
        return float(np.count_nonzero(self.mask) * np.prod(self.series.spacing) / 1000)

    @property
    def largest_area_mm2(self) -> float:
        """The largest area of the mask in one slice."""
        return float(np.count_nonzero(self.mask, axis=(1, 2)).max() * np.prod(self.series.spacing[1:]))


def propose(study: Study, checkpoint: Checkpoint, rules: Rules) -> Proposal:
    """Prepare a study as for training, predict, and resample the probabilities to the FLAIR series' voxels.

    Raises MedFLError for a study without a usable FLAIR.
    """
    if not study.channels:
        reasons = "; ".join(dict.fromkeys(line.why for line in study.lines)) or "it has no series"
        raise MedFLError(
            f"the study has no FLAIR that can be used ({reasons}); check the rules, or choose another"
        )
    prepared = prepare(study, rules)
    probabilities = sitk.GetImageFromArray(predict_volume(checkpoint.model, prepared.volume))
    probabilities.CopyInformation(prepared.grid)
    series = study.channels[FLAIR]
    on_series = sitk.Resample(
        probabilities, grid_of(series), sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32
    )
    likely = sitk.GetArrayFromImage(on_series)
    mask = to_mask(likely, checkpoint.threshold)
    return Proposal(mask, series, tuple(study.channels.values()), prepared.notes, probability=likely)


def grid_of(series: Series) -> sitk.Image:
    """An empty image with the geometry of a series."""
    grid = sitk.Image(series.columns, series.rows, series.slices, sitk.sitkUInt8)
    between, row, column = series.spacing
    grid.SetSpacing((column, row, between))
    grid.SetOrigin(series.origin)
    directions = np.stack([series.orientation[:3], series.orientation[3:], series.normal], axis=1)
    grid.SetDirection(directions.ravel().tolist())
    return grid
