"""A hospital's privacy budget for its patients, and a ledger on its disk of how much is spent."""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from common import MedFLError, counted
from federation.privacy.accountant import Noisy, check_accountant, multiplier_for, spent
from storage.files import write_json

LEAST = 1e-3  # multiplier
NEXT_TO_NOTHING = 0.01  # of a budget: no run begins with less than this left
LOUDER = 4.0  # times a run's first noise: more noise, after repeated rounds, would only do harm
LOUDEST = 1e3  # multiplier that a run may begin with


class PatientBudget:
    """A hospital's privacy budget for its training patients.

    Args:
        epsilon: the bound, over all federations together.
        delta: the probability with which the bound may fail.
        ledger: the file that keeps what was done, an entry for each round that was begun.

    Raises:
        MedFLError: epsilon or delta is out of range, the ledger can't be read, or no accountant is installed.
    """

    def __init__(self, epsilon: float, delta: float, ledger: Path):
        self.epsilon, self.delta, self.ledger = epsilon, delta, ledger
        if not (0 < epsilon < math.inf and 0 < delta < 1):
            raise MedFLError(
                f"--dp-sgd-epsilon is {epsilon:g} and --dp-sgd-delta {delta:g}; choose an epsilon above 0 "
                "and a delta between 0 and 1, far below 1 / patients"
            )
        check_accountant()
        self.rounds = self._read()

    def _read(self) -> list[dict]:
        try:
            rounds = json.loads(self.ledger.read_text(encoding="utf-8")) if self.ledger.exists() else []
            if not isinstance(rounds, list) or not all(_is_entry(entry) for entry in rounds):
                raise ValueError
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise MedFLError(
                f"{self.ledger} can't be read, and it says how much of the patients' privacy is spent; "
                "put it back from a backup"
            ) from error
        return rounds

    @property
    def done(self) -> tuple[Noisy, ...]:
        """All noisy sums so far; those with the same noise and chance are counted together."""
        times: Counter = Counter()
        for entry in self.rounds:
            times[entry["multiplier"], entry["chance"]] += entry["times"]
        return tuple(Noisy(multiplier, number, chance) for (multiplier, chance), number in times.items())

    @property
    def spent(self) -> float:
        """Epsilon so far."""
        return spent(self.done, self.delta) if self.rounds else 0.0

    def has_begun(self, run: str) -> bool:
        """Whether a round of this run has begun."""
        return any(entry["run"] == run for entry in self.rounds)

    def multiplier(self, run: str, steps: int, chance: float) -> float:
        """The noise, in clips, with which `steps` more steps of a run stay within the budget. Raises MedFLError if
        too little is left."""
        before = [entry["multiplier"] for entry in self.rounds if entry["run"] == run]
        already = self.spent
        loudest = Noisy(LOUDER * before[0] if before else LOUDEST, steps, chance)
        # a run that has begun may have planned less than NEXT_TO_NOTHING for its last rounds
        begins = before or already <= self.epsilon * (1 - NEXT_TO_NOTHING)
        if not begins or spent((*self.done, loudest), self.delta) > self.epsilon:
            raise MedFLError(
                f"too little is left of the patients' privacy: epsilon {already:.3g} of {self.epsilon:g} "
                f"is spent, in {counted(len(self.rounds), 'round')} ({self.ledger}); take no part, or promise less "
                "with a larger --dp-sgd-epsilon"
            )
        least = multiplier_for(self.epsilon, steps, self.delta, chance, self.done)
        return max(
            LEAST, math.ceil(least * 1_000) / 1_000
        )  # rounded up, so that rounds of a run share a few values

    def reserve(self, run: str, number: int, steps: int, left: int, chance: float) -> float:
        """Write a round's steps down before they are done, because even an interrupted round may reveal something.

        Args:
            run: the run's random name; number: the round, from 1; steps: of this round.
            left: steps that the run has left, this round's included.
            chance: the probability that a patient takes part in a step.

        Returns:
            The noise for these steps, in clips.

        Raises:
            MedFLError: too little is left, or the ledger can't be written.
        """
        try:
            self.ledger.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.ledger}.lock"):  # another process may have the same label
                self.rounds = self._read()
                noise = Noisy(self.multiplier(run, left, chance), steps, chance)
                self.rounds.append({"run": run, "round": number, **asdict(noise)})
                write_json(self.ledger, self.rounds)
        except OSError as error:
            raise MedFLError(
                f"{self.ledger} can't be written ({error.strerror or error}), and without it no round may "
                "begin; free the space or mend its folder"
            ) from error
        return noise.multiplier


def _is_entry(entry: dict) -> bool:
    return (
        LEAST <= entry["multiplier"] < math.inf
        and type(entry["times"]) is int
        and entry["times"] > 0
        and 0 < entry["chance"] <= 1
        and isinstance(entry["run"], str)
    )
