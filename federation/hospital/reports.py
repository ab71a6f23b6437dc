"""What the server learns about a hospital's patients by scores and losses: as few figures as a run needs, with few
digits."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from checkpoint import THRESHOLD
from common import SMALLEST_GROUP, counted
from evaluation.scoring import score_patients
from federation.hospital.data import HospitalData
from federation.hospital.identity import Identity
from federation.hospital.scored import ScoredModels
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack
from transunet import TransUNet

# of a Dice or loss, after the point: enough to tell models apart, far from all that 64 bits reveal about patients
TOLD_DIGITS = 4


@dataclass(frozen=True)
class Scored:
    """Mean volume Dice over so many patients (of validation, where nothing else is said), None over none, and
    the seconds that it took."""

    val_dice: float | None = None
    val_patients: int = 0
    seconds: float = 0.0


class Reports:
    """Scores and losses of one hospital in one federation.

    Args:
        private: whether the patients were promised privacy. Then the server gets neither scores nor losses, because
            no noise protects them.
        tell: gets the sentence that no more figures are reported.
    """

    def __init__(
        self,
        identity: Identity,
        federation: FederationSettings,
        data: HospitalData,
        private: bool,
        tell: Callable[[str], None],
    ):
        self.federation, self.data = federation, data
        self.own_data, self.private, self.tell = identity.own_data, private, tell
        self.scored = ScoredModels(identity.file("scored.json"))

    def score(self, model: TransUNet, part: str = "val") -> Scored:
        """The model's mean volume Dice over the patients of a part.

        There is no score without tumour patients, because an empty mask is perfect there. Own data (a share of a
        public dataset has no secret) give no score of fewer than 3 patients, because a mean of one or two is a
        figure of a patient, and none of more models than runs need.
        """
        began, patients = time.monotonic(), self.data.split.part(part)
        if (
            self.federation.pretraining
            or not self.data.dataset.with_tumour(patients)
            or (self.own_data and len(patients) < SMALLEST_GROUP)
        ):
            return Scored()
        if self.own_data and not self.scored.admits(pack(model.state_dict()), self.federation.rounds):
            self._say_that_no_more_is_told()
            return Scored()
        rows = score_patients(model, self.data.dataset, patients, THRESHOLD)
        return Scored(float(np.mean([row["dice"] for row in rows])), len(rows), time.monotonic() - began)

    def told(self, score: Scored) -> Scored:
        """A score as the server gets it: with few digits, and none of it with a promise to the patients."""
        if self.private or score.val_dice is None:
            return Scored(seconds=score.seconds)
        return replace(score, val_dice=round(score.val_dice, TOLD_DIGITS))

    def loss(self, loss: float, before: torch.Tensor, way: str, whole_pass: bool) -> float | None:
        """The mean loss of a training as the server gets it, or None.

        Own data of fewer than 3 patients give none, nor does a part of the slices, which can be one patient's.

        Args:
            before: the weights that the training began with, (n,) float32.
            way: everything else about the training that the server chose.
            whole_pass: whether all training slices were seen.
        """
        few = len(self.data.split.train) < SMALLEST_GROUP or not whole_pass
        if self.private or (self.own_data and few):
            return None
        if not self.own_data:
            return round(loss, TOLD_DIGITS)
        told = self.scored.loss(before, way, round(loss, TOLD_DIGITS), self.federation.rounds)
        if told is None:
            self._say_that_no_more_is_told()
        return told

    def _say_that_no_more_is_told(self) -> None:
        self.tell(
            f"the server asked for more scores or losses than {counted(self.federation.rounds, 'round')} need, and "
            "those of made-up models tell of patients; no more are told before a day has passed"
        )
