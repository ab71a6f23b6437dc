"""Normalisation layers that stay at the hospital (FedBN): kept on its own disk from round to round."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from storage.files import atomic_write
from training import averaging_weight


@dataclass(frozen=True)
class Layers:
    """The layers' values after some rounds, each (values,) float32: of the
    last round, and averaged over all."""

    rounds: int
    last: torch.Tensor
    average: torch.Tensor


class Entry(TypedDict):
    """`Layers` as they lie in the file."""

    rounds: int
    last: torch.Tensor
    average: torch.Tensor


class Kept(Entry):
    """The file: the layers after round `round` of a run, whether every gradient behind them was noised, and
    the layers before that round, None before the first."""

    run: str
    round: int
    private: bool
    before: Entry | None


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
        if not self._path.exists():
            return None
        kept: Kept = torch.load(self._path, weights_only=True)
        if kept["run"] != self._run or self._private and not kept["private"]:
            return None
        entry = kept["before"] if kept["round"] == number else kept
        return None if entry is None else Layers(entry["rounds"], entry["last"], entry["average"])

    def keep(self, number: int, last: torch.Tensor, ema_decay: float) -> None:
        """Keep the layers that a round gave, (values,) float32, and those before it. They are averaged over
        rounds as the server averages the other weights."""
        before = self.before(number)
        rounds, average, former = 0, last, None
        if before:
            rounds, average = before.rounds, before.average
            former = Entry(rounds=rounds, last=before.last, average=average)
        past = averaging_weight(ema_decay, rounds) if before and ema_decay else 0.0
        kept: Kept = {
            "run": self._run,
            "round": number,
            "private": self._private,
            "rounds": rounds + 1,
            "last": last,
            "average": average.lerp(last, 1 - past),
            "before": former,
        }
        with atomic_write(self._path, private=True) as file:
            torch.save(kept, file)
