"""Differential privacy of a hospital's patients: what its updates may tell of any one of them is bounded.

DP-SGD (Abadi et al. 2016, arXiv:1607.00133) whose unit is the patient, and not the slice: in each step every training patient
takes part with the chance CHANCE; the gradient over SLICES of its slices is cut to the length CLIP; Gaussian noise is added to
the sum over patients, which is divided by how many were to be expected. Two datasets are neighbours if one has a patient more.

Only TRAINED is trained: noise grows with the number of weights, and over all of them it left nothing (SECURITY.md), so a
federation begins with a model (run_server.py --init). With BatchNorm a patient would change the gradients of the others.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from batches import TrainingBatches
from common import MedFLError, write_json
from dataset import Dataset
from federation.privacy import Noisy, check_accountant, multiplier_for, secret_random, spent
from training import Learner, TrainingSettings
from transunet import TransUNet

CHANCE = 0.2  # of a patient to take part in a step
SLICES = 8  # of a patient in a step; half of them show a tumour, where there is one
STEPS = round(1 / CHANCE)  # of a pass over the patients, in which each takes part once on average
CLIP = 0.5  # longest gradient of a patient
TRAINED = ("head.", "decoder.2.")  # the last layers
NEXT_TO_NOTHING = 0.01  # of the budget: less than this left is none


class Promise:
    """What a hospital promises its training patients, and what of it is spent.

    epsilon, delta: the bound, over all federations together. ledger: the file that keeps what was done, an entry a round.
    Raises MedFLError for a bound that is none, a ledger that can't be read, and where the accountant is not installed.
    """

    def __init__(self, epsilon: float, delta: float, ledger: Path):
        self.epsilon, self.delta, self.ledger = epsilon, delta, ledger
        if not (0 < epsilon < math.inf and 0 < delta < 1):
            raise MedFLError(f"--dp-sgd-epsilon is {epsilon:g} and --dp-sgd-delta {delta:g}; choose an epsilon above 0 and a delta "
                             "between 0 and 1, far below 1 / patients")
        check_accountant()
        try:
            self.rounds = json.loads(ledger.read_text(encoding="utf-8")) if ledger.exists() else []
            if not all(entry["multiplier"] > 0 and entry["times"] > 0 and 0 < entry["chance"] <= 1 for entry in self.rounds):
                raise ValueError
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise MedFLError(f"{ledger} can't be read, and it says what of the patients' privacy is spent; put it back from a "
                             "backup") from error

    @property
    def done(self) -> tuple[Noisy, ...]:
        """All noisy sums so far, alike ones together."""
        times: Counter = Counter()
        for entry in self.rounds:
            times[entry["multiplier"], entry["chance"]] += entry["times"]
        return tuple(Noisy(multiplier, number, chance) for (multiplier, chance), number in times.items())

    @property
    def spent(self) -> float:
        """Epsilon so far."""
        return spent(self.done, self.delta) if self.rounds else 0.0

    def multiplier(self, steps: int) -> float:
        """The noise, in clips, with which so many more steps keep the promise. Raises MedFLError where nothing is left."""
        already = self.spent
        if already > self.epsilon * (1 - NEXT_TO_NOTHING):
            raise MedFLError(f"the patients' privacy is spent: epsilon {already:.3g} of {self.epsilon:g}, in {len(self.rounds)} "
                             f"rounds ({self.ledger}); train on other patients, or promise less with a larger --dp-sgd-epsilon")
        least = multiplier_for(self.epsilon, steps, self.delta, CHANCE, self.done)
        return math.ceil(least * 1_000) / 1_000  # upwards; so that rounds of a run share a few values

    def spend(self, run: str, number: int, noise: Noisy) -> None:
        """Write down a round's steps, which must be done before its update leaves."""
        self.rounds.append({"run": run, "round": number, **asdict(noise)})
        write_json(self.ledger, self.rounds)


class PatientBatches:
    """As TrainingBatches, but a batch is one of DP-SGD: for each patient that takes part, images (SLICES, 3, side, side) and
    masks (SLICES, 1, side, side). Who takes part is nobody's to know, so it does not come from the seed."""

    def __init__(self, dataset: Dataset, patients: tuple[str, ...], side: int, seed: int):
        self.patients = [TrainingBatches(dataset, (patient,), side, SLICES, seed) for patient in patients]

    @property
    def slices(self) -> int:
        """Slices that the batches are drawn from."""
        return sum(one.slices for one in self.patients)

    def __len__(self) -> int:
        """Batches an epoch."""
        return STEPS

    def epoch(self, epoch: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The epoch's batches, made as they are asked for."""
        random = secret_random()
        for step in range(len(self)):
            drawn = [next(one.epoch(epoch * len(self) + step)) for one in self.patients if random.random() < CHANCE]
            yield [images for images, _ in drawn], [masks for _, masks in drawn]


class PrivateLearner(Learner):
    """A Learner of TRAINED alone, whose gradients are those of DP-SGD. multiplier: the noise in clips; patients: how many there
    are to train on. Weights and rates are as its settings say."""

    def __init__(self, model: TransUNet, settings: TrainingSettings, device: torch.device, multiplier: float, patients: int):
        super().__init__(model, settings, device)
        self.deviation, self.expected = multiplier * CLIP, CHANCE * patients
        self.trained = [weight for name, weight in model.named_parameters() if name.startswith(TRAINED)]
        self.random = secret_random()

    def set_gradients(self, images: list[Tensor], masks: list[Tensor]) -> tuple[float, float]:
        """Give TRAINED their gradients and the others none; loss and soft Dice, mean over the patients (0 without any)."""
        total = [torch.from_numpy(self.random.standard_normal(tuple(weight.shape))).mul_(self.deviation) for weight in self.trained]
        losses, dices = [], []
        for loss, dice in map(self.loss_of, images, masks):
            gradients = [gradient.double().cpu() for gradient in torch.autograd.grad(loss, self.trained)]
            length = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
            if math.isfinite(length):  # a patient without a usable gradient gives none: an error here would tell of it
                for one, gradient in zip(total, gradients):
                    one.add_(gradient, alpha=CLIP / max(length, CLIP))
                losses.append(loss.item())
                dices.append(dice.item())
        self.optimiser.zero_grad(set_to_none=True)
        for weight, one in zip(self.trained, total):
            weight.grad = one.div_(self.expected).to(weight)
        return sum(losses) / max(len(losses), 1), sum(dices) / max(len(dices), 1)
