"""What noise spends of a promise: epsilon of differential privacy, by Google's accountant (dp-accounting), as Flower uses.

Renyi differential privacy of the Gaussian mechanism (Mironov 2017, arXiv:1702.07476), also where those who are protected are
drawn by chance (Mironov, Talwar and Zhang 2019, arXiv:1908.10530).
"""

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from common import MedFLError, write_json

FINE = 1e-4  # of a multiplier
NEXT_TO_NOTHING = 0.01  # of a promise: less than this left is none


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

    return float(calibrate_dp_mechanism(_accountant, all_sums, epsilon, delta, tol=FINE))


def _accountant():
    import absl.logging
    from dp_accounting import rdp

    absl.logging.set_verbosity(absl.logging.ERROR)  # it warns of each bound that is looser than it could be
    return rdp.RdpAccountant()


def _event(one: Noisy):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    event = GaussianDpEvent(one.multiplier)
    return SelfComposedDpEvent(PoissonSampledDpEvent(one.chance, event) if one.chance < 1 else event, one.times)


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

    def multiplier(self, steps: int, chance: float) -> float:
        """The noise, in clips, with which so many more steps keep the promise. Raises MedFLError where nothing is left."""
        already = self.spent
        if already > self.epsilon * (1 - NEXT_TO_NOTHING):
            raise MedFLError(f"the patients' privacy is spent: epsilon {already:.3g} of {self.epsilon:g}, in {len(self.rounds)} "
                             f"rounds ({self.ledger}); train on other patients, or promise less with a larger --dp-sgd-epsilon")
        least = multiplier_for(self.epsilon, steps, self.delta, chance, self.done)
        return math.ceil(least * 1_000) / 1_000  # upwards; so that rounds of a run share a few values

    def spend(self, run: str, number: int, noise: Noisy) -> None:
        """Write down a round's steps, which must be done before its update leaves."""
        self.rounds.append({"run": run, "round": number, **asdict(noise)})
        write_json(self.ledger, self.rounds)
