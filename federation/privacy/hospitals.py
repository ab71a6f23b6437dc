"""Differential privacy of hospitals: a bound on what the model can reveal about any one hospital, whatever that
hospital sent.

The Gaussian mechanism (Dwork and Roth 2014, appendix A; for federated training McMahan et al. 2018,
arXiv:1710.06963): each hospital's change is cut to the length --dp-clip, the changes are added up, noise of
standard deviation multiplier x clip is added to each value, and the sum is divided by the expected number of
hospitals. All hospitals count equally, because weights by slices would reveal something about them. A missing hospital
counts as no change. Two runs are neighbours if one has one hospital more.

Flower's own wrapper (DifferentialPrivacyServerSideFixedClipping) is not used: its noise is right only for equal
weights, while its strategies weight by examples, and a change of zero ends it.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from common import counted
from federation.privacy.accountant import Noisy, check_accountant, multiplier_for, spent
from federation.privacy.noise import noised
from federation.protocol.settings import FederationSettings

# a function that yields blocks: columns of the weights, and the hospitals' changes in them, (hospitals, columns)
# float64
Changes = Callable[[], Iterator[tuple[slice, np.ndarray]]]


class HospitalPrivacy:
    """The noise of a federation's rounds, and what it has spent."""

    def __init__(self, settings: FederationSettings):
        check_accountant()
        self.settings = settings
        multiplier, clip = settings.dp_noise_multiplier, settings.dp_clip
        if multiplier is None and settings.dp_epsilon is not None:
            multiplier = multiplier_for(settings.dp_epsilon, settings.rounds, settings.dp_delta)
        if multiplier is None or clip is None:
            raise ValueError("these settings ask for no differential privacy")
        self.multiplier, self.clip = multiplier, clip

    def spent(self, rounds: int) -> float:
        """Epsilon after `rounds` rounds."""
        return spent([Noisy(self.multiplier, rounds)], self.settings.dp_delta) if rounds else 0.0

    def exhausted(self, rounds: int) -> bool:
        """Whether one more round would exceed --dp-epsilon."""
        return self.settings.dp_epsilon is not None and self.spent(rounds + 1) > self.settings.dp_epsilon * (
            1 + 1e-6
        )

    def private_mean(self, sent: torch.Tensor, changes: Changes, travels: torch.Tensor) -> torch.Tensor:
        """The weights, (n,) float32, with the hospitals' clipped, noised mean change.

        sent: the weights that the round began with, (n,) float32; changes: the hospitals' changes of them,
        block by block, as often as it is called; travels: which weights were trained, (n,) bool. The others
        stay as they were.
        """
        total = torch.zeros(len(sent), dtype=torch.float64)
        squares: np.ndarray | float = 0.0
        for columns, block in changes():
            squares = squares + np.square(block[:, travels[columns].numpy()]).sum(axis=1)
        factors = np.minimum(1.0, self.clip / np.sqrt(squares).clip(min=1e-300))
        for columns, block in changes():
            total[columns] += torch.from_numpy(factors @ block)
        total = noised(total, self.multiplier * self.clip)
        return total.mul_(travels).div_(self.settings.clients).add_(sent).float()

    def warning(self, values: int) -> str | None:
        """A note if the noise on `values` trained values is longer than any mean update can be; otherwise None."""
        ratio = self.multiplier * math.sqrt(values) / self.settings.clients
        if ratio <= 1:
            return None
        needed = math.ceil(ratio * self.settings.clients)
        return (
            f"note: with {counted(self.settings.clients, 'hospital')} a round's noise is about {ratio:.0f} times as "
            f"long as the longest mean update, and may drown it; this model needs about {needed:,} hospitals "
            "for as much update as noise, or a larger epsilon, or fewer trained weights "
            "(--freeze-encoder-epochs)"
        )
