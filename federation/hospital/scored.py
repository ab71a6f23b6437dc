"""Of how many models a hospital tells scores and losses.

A score answers whatever question the weights ask of the patients: with weights that outline one place in a certain
kind of scan and nothing else, whether one of them has a tumour there. The loss of a training does so for those who
train. So a hospital tells them of as many models as two runs need, for as long as it runs, and of no others after
that; its training goes on. Losses are counted by themselves, one for each training that the server asks for: round and
settings choose the slices, and one model's losses over many sets of slices give those of single slices.
"""

import hashlib
import json
from pathlib import Path

import torch

from common import write_json

SCORED = "scored.json"  # beside hospital.json
BESIDE = 8  # models of a run besides each round's: of the end, of the test, of rounds that are taken back
RUNS = 2  # the coordinator may have to begin again


class ScoredModels:
    """The models of which something was told since this start of run_client.py. file: which; session: of the
    start."""

    def __init__(self, file: Path, session: str):
        self.file, self.session = file, session

    def admits(self, weights: torch.Tensor, rounds: int) -> bool:
        """Whether scores of these weights, (n,) float32, may be told in a run of so many rounds; noted then. The same
        ones tell nothing new."""
        return self._told("models", _sha256(weights), True, rounds) is not None

    def loss(self, weights: torch.Tensor, training: str, rounds: int, loss: float) -> float | None:
        """What may be told of the loss of a training (in words, all that the server chose of it) from these weights:
        what was told of it before, if it was; None where no more may be told."""
        return self._told("losses", _sha256(weights, training), loss, rounds)

    def _told(self, kind: str, of: str, value: float, rounds: int) -> float | None:
        kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        if kept.get("session") != self.session:
            kept = {"session": self.session, "models": {}, "losses": {}}
        if of in kept[kind]:
            return kept[kind][of]
        if len(kept[kind]) >= RUNS * (rounds + BESIDE):
            return None
        kept[kind][of] = value
        write_json(self.file, kept)
        return value


def _sha256(weights: torch.Tensor, training: str = "") -> str:
    digest = hashlib.sha256(weights.contiguous().numpy().data)
    digest.update(training.encode())
    return digest.hexdigest()
