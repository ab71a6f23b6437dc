"""Of how many models a hospital tells scores and losses.

A score answers whatever question the weights ask of the patients: with weights that outline one place in a certain
kind of scan and nothing else, whether one of them has a tumour there. The loss of a training does so for those who
train. So a hospital tells them of as many models as two runs need, for as long as it runs, and of no others after
that; its training goes on.
"""

import hashlib
import json
from pathlib import Path

import torch

from storage.files import write_json

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
        this = hashlib.sha256(weights.contiguous().numpy().data).hexdigest()
        kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        models = kept["models"] if kept.get("session") == self.session else []
        if this in models:
            return True
        if len(models) >= RUNS * (rounds + BESIDE):
            return False
        write_json(self.file, {"session": self.session, "models": [*models, this]})
        return True
