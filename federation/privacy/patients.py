"""Differential privacy of a hospital's patients: a bound on what its updates can reveal about any one patient.

This is DP-SGD (Abadi et al. 2016, arXiv:1607.00133) with the patient, not the slice, as its unit. In each step every
training patient takes part with probability CHANCE. The gradient over SLICES of its slices is cut to the length CLIP.
Gaussian noise is added to the sum over patients, which is divided by the expected number of patients. Two datasets are
neighbours if one has one patient more.

Only TRAINED is trained, because noise grows with the number of weights and training all of them learns less
(SECURITY.md). Therefore a federation starts from a model (run_server.py --init). BatchNorm is excluded, because with it
a patient would change the gradients of the others.
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

CHANCE = 0.2  # probability that a patient takes part in a step
SLICES = 8  # of a patient in a step; half of them show a tumour, if the patient has one
STEPS = round(1 / CHANCE)  # of a pass, in which each patient takes part once on average
CLIP = 0.5  # longest gradient of a patient
TRAINED: tuple[str, ...] = ("head.", "decoder.2.")  # the last layers


class PatientBatches:
    """Like TrainingBatches, but with batches for DP-SGD: images (patients, SLICES, 3, side, side) and masks
    (patients, SLICES, classes, side, side) of the patients that take part, (0,) if none does. Nobody may know who takes
    part, so the choice does not depend on the seed."""

    def __init__(self, dataset: Dataset, patients: tuple[str, ...], side: int, seed: int, classes: int = 1):
        self.patients = [
            TrainingBatches(dataset, (patient,), side, SLICES, seed, classes) for patient in patients
        ]

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
    """A Learner that trains only TRAINED, with the gradients of DP-SGD. multiplier: the noise in clips; patients: the
    number of training patients."""

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
        """Set the gradients of TRAINED, and no others. Returns loss and soft Dice, mean over the patients (0 without
        any). Each item of images and of masks belongs to one patient."""
        total = [torch.zeros(weight.shape, dtype=torch.float64) for weight in self.trained]
        losses, dices = [], []
        for loss, dice in map(self.loss_of, images, masks):
            gradients = [gradient.double().cpu() for gradient in torch.autograd.grad(loss, self.trained)]
            length = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
            if math.isfinite(
                length
            ):  # a patient without a usable gradient is skipped: an error would reveal it
                for one, gradient in zip(total, gradients):
                    one.add_(gradient, alpha=CLIP / max(length, CLIP))
                losses.append(loss.item())
                dices.append(dice.item())
        self.optimiser.zero_grad(set_to_none=True)
        for weight, one in zip(self.trained, total):
            weight.grad = noised(one, self.deviation).div_(self.expected).to(weight)
        return sum(losses) / max(len(losses), 1), sum(dices) / max(len(dices), 1)
