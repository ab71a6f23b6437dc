"""Of how many models a hospital tells scores and losses.

A score answers whatever question the weights ask of the patients: with weights that outline one place in a certain
kind of scan and nothing else, whether one of them has a tumour there. The loss of a training does so for those who
train, and one model has as many losses as there are rounds, rates and settings to train it by, and moments that other
models left. So a hospital tells scores of as many models a day, and as many losses, as two runs need, and no others;
its training goes on. It counts over restarts: a server can end a run, and a service starts again by itself.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import TypedDict

import torch

from common import MedFLError
from storage.files import atomic_write

BESIDE = 8  # models of a run besides each round's: of the end, of the test, of rounds that are taken back
RUNS = 2  # the coordinator may have to begin again
DAY = 86_400.0  # seconds


class Told(TypedDict):
    """What was told, by a hash of what it is of: when (UTC, in seconds), and the losses."""

    models: dict[str, float]
    losses: dict[str, tuple[float, float]]


class ScoredModels:
    """What was told within a day. file: keeps that. Each function raises MedFLError where it is damaged."""

    def __init__(self, file: Path):
        self.file = file

    def admits(self, weights: torch.Tensor, rounds: int) -> bool:
        """Whether scores of these weights, (n,) float32, may be told in a run of so many rounds; noted then. The same
        ones tell nothing new."""
        this, told = _hash(weights), self._told()
        if this not in told["models"]:
            if len(told["models"]) >= RUNS * (rounds + BESIDE):
                return False
            told["models"][this] = time.time()
            self._keep(told)
        return True

    def loss(self, weights: torch.Tensor, way: str, loss: float, rounds: int) -> float | None:
        """What may be told of the loss of a training of these weights, (n,) float32, in a run of so many rounds; of a
        training that was told of before the same again. way: all else that the server chose of it."""
        if not self.admits(weights, rounds):
            return None
        this, told = hashlib.sha256(f"{_hash(weights)} {way}".encode()).hexdigest(), self._told()
        if this not in told["losses"]:
            if len(told["losses"]) >= RUNS * (rounds + BESIDE):
                return None
            told["losses"][this] = time.time(), loss
            self._keep(told)
        return told["losses"][this][1]

    def _told(self) -> Told:
        if not self.file.exists():
            return Told(models={}, losses={})
        try:
            kept, now = json.loads(self.file.read_text(encoding="utf-8")), time.time()
            return Told(
                models={this: when for this, when in kept["models"].items() if now - when < DAY},
                losses={this: (w, loss) for this, (w, loss) in kept["losses"].items() if now - w < DAY},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MedFLError(
                f"{self.file} is damaged, so it is not known what was told of the patients; put back a copy, or "
                "move it away a day after the last round"
            ) from error

    def _keep(self, told: Told) -> None:
        with atomic_write(self.file, "w", private=True) as file:
            json.dump({"version": 1, **told}, file)


def _hash(weights: torch.Tensor) -> str:
    return hashlib.sha256(weights.contiguous().numpy().data).hexdigest()
