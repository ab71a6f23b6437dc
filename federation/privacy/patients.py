"""Differential privacy of a hospital's patients: what its updates may tell of any one of them is bounded.

DP-SGD (Abadi et al. 2016, arXiv:1607.00133) whose unit is the patient, and not the slice: in each step every
training patient takes part with the chance CHANCE; the gradient over SLICES of its slices is cut to the
length CLIP; Gaussian noise is added to the sum over patients, which is divided by how many were to be
expected. Two datasets are neighbours if one has a patient more.

Only TRAINED is trained: noise grows with the number of weights, and over all of them less is learnt
(SECURITY.md). So a federation begins with a model (run_server.py --init). With BatchNorm a patient would
change the gradients of the others.
"""

import math
import secrets
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from batches import TrainingBatches
from dataset import Dataset
from federation.privacy.noise import noised
from training import Learner, TrainingSettings
from transunet import TransUNet

CHANCE = 0.2  # of a patient to take part in a step
SLICES = 8  # of a patient in a step; half of them show a tumour, where there is one
STEPS = round(1 / CHANCE)  # of a pass over the patients, in which each takes part once on average
CLIP = 0.5  # longest gradient of a patient
TRAINED: tuple[str, ...] = ("head.", "decoder.2.")  # the last layers


class PatientBatches:
    """As TrainingBatches, but a batch is one of DP-SGD: images (patients, SLICES, 3, side, side) and masks
    (patients, SLICES, 1, side, side) of those that take part, (0,) of none. Nobody may know who takes
    part, so that does not come from the seed."""

    def __init__(self, dataset: Dataset, patients: tuple[str, ...], side: int, seed: int):
        self.patients = [TrainingBatches(dataset, (patient,), side, SLICES, seed) for patient in patients]

    @property
    def slices(self) -> int:
        """Slices that the batches are drawn from."""
        return sum(one.slices for one in self.patients)

    def __len__(self) -> int:
        """Batches an epoch."""
        return STEPS

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches, made as they are asked for."""
        chances = secrets.SystemRandom()
        for step in range(len(self)):
            drawn = [
                next(one.epoch(epoch * len(self) + step))
                for one in self.patients
                if chances.random() < CHANCE
            ]
            if drawn:
                yield torch.stack([images for images, _ in drawn]), torch.stack([masks for _, masks in drawn])
            else:
                yield torch.empty(0), torch.empty(0)


class PrivateLearner(Learner):
    """A Learner of TRAINED alone, whose gradients are those of DP-SGD. multiplier: the noise in clips;
    patients: how many there are to train on. Weights and rates are as its settings say."""

    def __init__(
        self,
        model: TransUNet,
        settings: TrainingSettings,
        device: torch.device,
        multiplier: float,
        patients: int,
    ):
        super().__init__(model, settings, device)
        self.deviation, self.expected = multiplier * CLIP, CHANCE * patients
        self.trained = [weight for name, weight in model.named_parameters() if name.startswith(TRAINED)]

    def set_gradients(self, images: Iterable[Tensor], masks: Iterable[Tensor]) -> tuple[float, float]:
        """Give TRAINED their gradients and the others none; loss and soft Dice, mean over the patients (0
        without any), of whom each gives images and masks."""
        total = [torch.zeros(weight.shape, dtype=torch.float64) for weight in self.trained]
        losses, dices = [], []
        for loss, dice in map(self.loss_of, images, masks):
            gradients = [gradient.double().cpu() for gradient in torch.autograd.grad(loss, self.trained)]
            length = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
            if math.isfinite(
                length
            ):  # a patient without a usable gradient gives none: an error here would tell of it
                for one, gradient in zip(total, gradients):
                    one.add_(gradient, alpha=CLIP / max(length, CLIP))
                losses.append(loss.item())
                dices.append(dice.item())
        self.optimiser.zero_grad(set_to_none=True)
        for weight, one in zip(self.trained, total):
            weight.grad = noised(one, self.deviation).div_(self.expected).to(weight)
        return sum(losses) / max(len(losses), 1), sum(dices) / max(len(dices), 1)
