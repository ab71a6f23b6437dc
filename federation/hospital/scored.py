"""The limit on how many scores and losses a hospital reports.

A score answers whatever question the weights ask about the patients. For example, weights that outline one place in a
certain kind of scan and nothing else ask whether a patient has a tumour there. The loss of a training answers in the
same way for the patients who train. One model can give many losses: one for each round, rate and setting that it is
trained with, and for the moments that other models left. So in a day a hospital reports only as many scored models,
and as many losses, as two runs need. Beyond that its training continues without reports. The count lasts over
restarts, because a server can end a run and a service restarts by itself.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import TypedDict

import torch

from common import MedFLError
from storage.files import alone, atomic_write

BESIDE = (
    8  # models of a run in addition to one a round: for the end, the test, and rounds that are taken back
)
RUNS = 2  # the coordinator may have to begin again
DAY = 86_400.0  # seconds


class Told(TypedDict):
    """What was reported, by a hash of its subject: the time (UTC, in seconds), and for losses their value."""

    models: dict[str, float]
    losses: dict[str, tuple[float, float]]


class ScoredModels:
    """What was reported within a day, kept in `file`. Each function raises MedFLError if the file is damaged."""

    def __init__(self, file: Path):
        self.file = file

    def admits(self, weights: torch.Tensor, rounds: int) -> bool:
        """Whether scores of these weights, (n,) float32, may be reported in a run of `rounds` rounds; if so, they are
        counted. Weights that were counted before are allowed again, because they reveal nothing new."""
        this = _hash(weights)
        with alone(self.file):  # another process may have the same label
            told = self._told()
            if this not in told["models"]:
                if len(told["models"]) >= RUNS * (rounds + BESIDE):
                    return False
                told["models"][this] = time.time()
                self._keep(told)
        return True

    def loss(self, weights: torch.Tensor, way: str, loss: float, rounds: int) -> float | None:
        """The loss to report for a training of these weights, (n,) float32, in a run of `rounds` rounds; None if none
        may be reported. A training that was reported before gives the former loss again. way: everything else about
        the training that the server chose."""
        if not self.admits(weights, rounds):
            return None
        this = hashlib.sha256(f"{_hash(weights)} {way}".encode()).hexdigest()
        with alone(self.file):
            told = self._told()
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
