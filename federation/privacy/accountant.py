"""What noise spends of a promise: epsilon of differential privacy, by Google's accountant (dp-accounting), as Flower uses.

Renyi differential privacy of the Gaussian mechanism (Mironov 2017, arXiv:1702.07476), also where those who are protected are
drawn by chance (Mironov, Talwar and Zhang 2019, arXiv:1908.10530).
"""

import contextlib
import importlib.util
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from common import MedFLError, write_json

# of Renyi's divergence; each gives a bound that holds, and the tightest is taken. Fewer than the accountant's own 160, because
# those that are no whole numbers take most of its time; epsilon is at most 1 % larger for it.
ORDERS = (*(1 + k / 10 for k in range(1, 10)), *(k / 4 for k in range(8, 40)), *range(10, 64), 80, 96, 128, 192, 256, 512, 1024)
FINE = 1e-4  # of a multiplier
LEAST = 1e-3  # multiplier
NEXT_TO_NOTHING = 0.01  # of a promise: with less than this left no run begins
LOUDER = 4.0  # times a run's first noise: more, for rounds that are repeated, would do harm alone
LOUDEST = 1e3  # multiplier that a run may begin with


def check_accountant() -> None:
    """Raises MedFLError where the accountant is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise MedFLError("differential privacy needs an accountant, which is not installed; run `pip install -r requirements.txt "
                         "-r requirements-privacy.txt`")


@dataclass(frozen=True)
class Noisy:
    """Sums to which noise was added. multiplier: its deviation in clips; times: how often; chance: of one whom it protects to be
    in such a sum."""

    multiplier: float
    times: int
    chance: float = 1.0


def spent(sums: Iterable[Noisy], delta: float) -> float:
    """Epsilon after these."""
    with _quietly():
        accountant = _accountant()
        for one in sums:
            accountant.compose(_event(one))
        return float(accountant.get_epsilon(delta))


def multiplier_for(epsilon: float, times: int, delta: float, chance: float = 1.0, before: tuple[Noisy, ...] = ()) -> float:
    """The least noise multiplier, within FINE, with which so many more sums, after those `before`, spend no more than epsilon."""
    from dp_accounting import ComposedDpEvent
    from dp_accounting.mechanism_calibration import calibrate_dp_mechanism

    def all_sums(multiplier: float) -> ComposedDpEvent:
        return ComposedDpEvent([_event(one) for one in (*before, Noisy(multiplier, times, chance))])

    with _quietly():
        return float(calibrate_dp_mechanism(_accountant, all_sums, epsilon, delta, tol=FINE))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without its warnings of each bound that is looser than it could be, for which absl would give all loggers a handler that
    prints what Flower's says."""
    import absl.logging

    nothing = logging.NullHandler()
    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger().addHandler(nothing)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(nothing)


def _accountant():
    from dp_accounting import rdp

    return rdp.RdpAccountant(ORDERS)


def _event(one: Noisy):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    event = GaussianDpEvent(one.multiplier)
    return SelfComposedDpEvent(PoissonSampledDpEvent(one.chance, event) if one.chance < 1 else event, one.times)


class Promise:
    """What a hospital promises its training patients, and what of it is spent.

    epsilon, delta: the bound, over all federations together. ledger: the file that keeps what was done, an entry for each round
    that was begun. Raises MedFLError for a bound that is none, a ledger that can't be read, and where the accountant is not
    installed.
    """

    def __init__(self, epsilon: float, delta: float, ledger: Path):
        self.epsilon, self.delta, self.ledger = epsilon, delta, ledger
        if not (0 < epsilon < math.inf and 0 < delta < 1):
            raise MedFLError(f"--dp-sgd-epsilon is {epsilon:g} and --dp-sgd-delta {delta:g}; choose an epsilon above 0 and a delta "
                             "between 0 and 1, far below 1 / patients")
        check_accountant()
        self.rounds = self._read()

    def _read(self) -> list[dict]:
        try:
            rounds = json.loads(self.ledger.read_text(encoding="utf-8")) if self.ledger.exists() else []
            if not isinstance(rounds, list) or not all(
                    LEAST <= entry["multiplier"] < math.inf and type(entry["times"]) is int and entry["times"] > 0
                    and 0 < entry["chance"] <= 1 and isinstance(entry["run"], str) for entry in rounds):
                raise ValueError
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise MedFLError(f"{self.ledger} can't be read, and it says what of the patients' privacy is spent; put it back from a "
                             "backup") from error
        return rounds

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

    def multiplier(self, run: str, steps: int, chance: float) -> float:
        """The noise, in clips, with which so many more steps of a run keep the promise. Raises MedFLError where nothing is left."""
        before, already = [entry["multiplier"] for entry in self.rounds if entry["run"] == run], self.spent
        loudest = Noisy(LOUDER * before[0] if before else LOUDEST, steps, chance)
        begins = before or already <= self.epsilon * (1 - NEXT_TO_NOTHING)  # a run may have planned less for its last rounds
        if not begins or spent((*self.done, loudest), self.delta) > self.epsilon:
            raise MedFLError(f"too little is left of the patients' privacy: epsilon {already:.3g} of {self.epsilon:g} is spent, in "
                             f"{len(self.rounds)} rounds ({self.ledger}); take no part, or promise less with a larger "
                             "--dp-sgd-epsilon")
        least = multiplier_for(self.epsilon, steps, self.delta, chance, self.done)
        return max(LEAST, math.ceil(least * 1_000) / 1_000)  # upwards; so that rounds of a run share a few values

    def reserve(self, run: str, number: int, steps: int, left: int, chance: float) -> float:
        """Write down a round's steps before they are done, for whatever comes of them may tell something; the noise for them, in
        clips, if the run has so many steps left. Raises MedFLError where nothing is left, or the ledger can't be written."""
        try:
            self.ledger.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.ledger}.lock"):  # another process may have the same label
                self.rounds = self._read()
                noise = Noisy(self.multiplier(run, left, chance), steps, chance)
                self.rounds.append({"run": run, "round": number, **asdict(noise)})
                write_json(self.ledger, self.rounds)
        except OSError as error:
            raise MedFLError(f"{self.ledger} can't be written ({error.strerror or error}), and without it no round may begin; "
                             "free the space or mend its folder") from error
        return noise.multiplier
