"""Of how many models a hospital tells scores and losses.

A score answers whatever question the weights ask of the patients: with weights that outline one place in a certain
kind of scan and nothing else, whether one of them has a tumour there. The loss of a training does so for those who
train, and one model has as many losses as there are rounds, rates and settings to train it by, and moments that other
models left. So a hospital tells scores of as many models, and as many losses, as two runs need, for as long as it
runs, and no others after that; its training goes on.
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
    """What was told since this start of run_client.py. file: keeps that; session: of the start."""

    def __init__(self, file: Path, session: str):
        self.file, self.session = file, session

    def admits(self, weights: torch.Tensor, rounds: int) -> bool:
        """Whether scores of these weights, (n,) float32, may be told in a run of so many rounds; noted then. The same
        ones tell nothing new."""
        this, kept = _hash(weights), self._kept()
        if this not in kept["models"]:
            if len(kept["models"]) >= RUNS * (rounds + BESIDE):
                return False
            kept["models"].append(this)
            write_json(self.file, kept)
        return True

    def loss(self, weights: torch.Tensor, way: str, loss: float, rounds: int) -> float | None:
        """What may be told of the loss of a training of these weights, (n,) float32, in a run of so many rounds; of a
        training that was told of before the same again. way: all else that the server chose of it."""
        if not self.admits(weights, rounds):
            return None
        this, kept = hashlib.sha256(f"{_hash(weights)} {way}".encode()).hexdigest(), self._kept()
        if this not in kept["losses"]:
            if len(kept["losses"]) >= RUNS * (rounds + BESIDE):
                return None
            kept["losses"][this] = loss
            write_json(self.file, kept)
        return kept["losses"][this]

    def _kept(self) -> dict:
        kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        fresh = {"session": self.session, "models": [], "losses": {}}
        return kept if kept.get("session") == self.session else fresh


def _hash(weights: torch.Tensor) -> str:
    return hashlib.sha256(weights.contiguous().numpy().data).hexdigest()
