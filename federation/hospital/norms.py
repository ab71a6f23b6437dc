"""Normalisation layers that stay at the hospital (FedBN): kept on its own disk from round to round."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common import atomic_write
from training import averaging_weight


@dataclass(frozen=True)
class Layers:
    """The layers' values after some rounds, each (values,) float32: of the
    last round, and averaged over all."""

    rounds: int
    last: torch.Tensor
    average: torch.Tensor


class OwnNorms:
    """The layers of one run.

    path: the file. run: the run's random name. private: whether every gradient behind them was noised; layers
    that were trained without noise are not taken up by a hospital that protects its patients.
    """

    def __init__(self, path: Path, run: str, private: bool):
        self._path, self._run, self._private = path, run, private

    def before(self, number: int | None) -> Layers | None:
        """The layers before round `number` (None: after the last round); None at first.

        A round that the server asks for again begins where it began.
        """
        kept = torch.load(self._path, weights_only=True) if self._path.exists() else {"run": None}
        if kept["run"] != self._run or self._private and not kept["private"]:
            return None
        entry = kept["before"] if kept["round"] == number else kept
        return entry and Layers(entry["rounds"], entry["last"], entry["average"])

    def keep(self, number: int, last: torch.Tensor, ema_decay: float) -> None:
        """Keep the layers that a round gave, (values,) float32, and those before it. They are averaged over
        rounds as the server averages the other weights."""
        before = self.before(number)
        rounds, average = (before.rounds, before.average) if before else (0, last)
        past = averaging_weight(ema_decay, rounds) if before and ema_decay else 0.0
        former = before and {"rounds": before.rounds, "last": before.last, "average": before.average}
        with atomic_write(self._path, private=True) as file:
            torch.save(
                {
                    "run": self._run,
                    "round": number,
                    "private": self._private,
                    "rounds": rounds + 1,
                    "last": last,
                    "average": average.lerp(last, 1 - past),
                    "before": former,
                },
                file,
            )
