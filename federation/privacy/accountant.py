"""What noise spends of a privacy budget: epsilon of differential privacy, by Google's accountant
(dp-accounting), which Flower uses as well.

Renyi differential privacy of the Gaussian mechanism (Mironov 2017, arXiv:1702.07476), also where those who
are protected are drawn by chance (Mironov, Talwar and Zhang 2019, arXiv:1908.10530).
"""

import contextlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common import MedFLError

# of Renyi's divergence; each gives a bound that holds, and the tightest is taken. Fewer than the accountant's
# own 160, because those that are no whole numbers take most of its time; epsilon is at most 1 % larger for
# it.
ORDERS = (
    *(1 + k / 10 for k in range(1, 10)),
    *(k / 4 for k in range(8, 40)),
    *range(10, 64),
    80,
    96,
    128,
    192,
    256,
    512,
    1024,
)
FINE = 1e-4  # of a multiplier


def check_accountant() -> None:
    """Raises MedFLError where the accountant is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise MedFLError(
            "differential privacy needs an accountant, which is not installed; run `pip install -r "
            "requirements.txt -r requirements-privacy.txt`"
        )


@dataclass(frozen=True)
class Noisy:
    """Sums to which noise was added. multiplier: its deviation in clips; times: how often; chance: of one
    whom it protects to be in such a sum."""

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


def multiplier_for(
    epsilon: float, times: int, delta: float, chance: float = 1.0, before: tuple[Noisy, ...] = ()
) -> float:
    """The least noise multiplier, within FINE, with which so many more sums, after those `before`, spend no
    more than epsilon."""
    from dp_accounting import ComposedDpEvent
    from dp_accounting.mechanism_calibration import calibrate_dp_mechanism

    def all_sums(multiplier: float) -> ComposedDpEvent:
        return ComposedDpEvent([_event(one) for one in (*before, Noisy(multiplier, times, chance))])

    with _quietly():
        return float(calibrate_dp_mechanism(_accountant, all_sums, epsilon, delta, tol=FINE))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the accountant from printing.

    It warns of every bound that is looser than it could be. Its logger, absl's, gives the root logger a
    handler where that has none, and that handler would also print Flower's lines; a handler that does nothing
    keeps absl from doing so.
    """
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
    return SelfComposedDpEvent(
        PoissonSampledDpEvent(one.chance, event) if one.chance < 1 else event, one.times
    )
