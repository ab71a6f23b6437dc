"""How much of a privacy budget noisy sums spend: epsilon of differential privacy, computed by Google's accountant
(dp-accounting), which Flower uses as well.

Renyi differential privacy of the Gaussian mechanism (Mironov 2017, arXiv:1702.07476), also if those who
are protected are sampled at random (Mironov, Talwar and Zhang 2019, arXiv:1908.10530).
"""

import contextlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common import MedFLError

# orders of Renyi's divergence: each gives a valid bound, and the tightest one is used. They are fewer than the
# accountant's own 160, because orders that are not whole numbers take most of its time. Epsilon is at most 1 % larger
# as a result.
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
    """Raises MedFLError if the accountant is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise MedFLError(
            "differential privacy needs an accountant, which is not installed; run `pip install -r "
            "requirements.txt -r requirements-privacy.txt`"
        )


@dataclass(frozen=True)
class Noisy:
    """Sums to which noise was added. multiplier: the noise's standard deviation, in clips; times: the number of
    sums; chance: the probability that a protected hospital or patient is in such a sum."""

    multiplier: float
    times: int
    chance: float = 1.0


def spent(sums: Iterable[Noisy], delta: float) -> float:
    """Epsilon after these sums."""
    with _quietly():
        accountant = _accountant()
        for one in sums:
            accountant.compose(_event(one))
        return float(accountant.get_epsilon(delta))


def multiplier_for(
    epsilon: float, times: int, delta: float, chance: float = 1.0, before: tuple[Noisy, ...] = ()
) -> float:
    """The smallest noise multiplier, within FINE, with which the sums `before` and `times` more sums together spend
    no more than epsilon."""
    from dp_accounting import ComposedDpEvent
    from dp_accounting.mechanism_calibration import calibrate_dp_mechanism

    def all_sums(multiplier: float) -> ComposedDpEvent:
        return ComposedDpEvent([_event(one) for one in (*before, Noisy(multiplier, times, chance))])

    with _quietly():
        return float(calibrate_dp_mechanism(_accountant, all_sums, epsilon, delta, tol=FINE))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the accountant from printing.

    It warns about every bound that could be tighter. Its logger, absl's, adds a handler to a root logger that has
    none, and that handler would also print Flower's lines. A handler that does nothing prevents this.
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
