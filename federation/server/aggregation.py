"""From the hospitals' updates to one model.

The strategies and their papers. These weight the hospitals by their training slices, up to a cap (updates.py):

- fedavg (McMahan et al. 2017, arXiv:1602.05629): the mean
- fedprox (Li et al. 2020, arXiv:1812.06127): the mean; only the hospitals' training differs
- fedavgm (Hsu et al. 2019, arXiv:1909.06335): the mean change with momentum
- fedadam, fedyogi (Reddi et al. 2021, arXiv:2003.00295): the mean change as the gradient of an adaptive optimiser

These are not weighted, and one hostile hospital can't move their result far: fedmedian and fedtrimmedavg (Yin et
al. 2018, arXiv:1803.01498), computed value by value, and krum (Blanchard et al. 2017), which takes the one update
that is nearest to the others.

Flower has these strategies too, but its classes need all updates in memory. The tests use them as the reference;
the sums here are computed block by block.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from federation.protocol.settings import FederationSettings
from federation.server.updates import Updates

MEMORY = {
    "fedavgm": ("momentum",),
    "fedadam": ("m", "v"),
    "fedyogi": ("m", "v"),
}  # the state of each server-side optimiser
# how many values a robust mean leaves out at each end; the median keeps only the middle one or two
CUTS = {
    "fedmedian": lambda hospitals, _: (hospitals - 1) // 2,
    "fedtrimmedavg": lambda hospitals, trim: int(trim * hospitals),
}
ROBUST = "fedmedian"  # used instead of the run's strategy after a round's model collapsed


@dataclass
class Aggregator:
    """Combines each round's updates into one model, and keeps the state of its strategy.

    is_statistic: which weights are statistics that nobody trains, (n,) bool. They are averaged, because a
    server-side optimiser can step further than any hospital did and would make variances negative.
    """

    settings: FederationSettings
    is_statistic: torch.Tensor
    memory: dict[str, torch.Tensor] = field(default_factory=dict)  # (trained weights,) float64, by name

    def __call__(self, number: int, updates: Updates, robust: bool = False) -> torch.Tensor:
        """The weights after round `number`, (n,) float32, from screened updates. robust: use the median,
        whatever the strategy is."""
        strategy = ROBUST if robust else self.settings.strategy
        change = self._combined(strategy, updates)
        if strategy in MEMORY:
            trained = ~self.is_statistic
            change[trained] = self._optimised(number, change[trained])
        return (updates.sent.double() + change).float()

    def _combined(self, strategy: str, updates: Updates) -> torch.Tensor:
        """The changes of all hospitals combined into one, (n,) float64."""
        change = np.empty(len(updates.sent))
        if strategy == "krum":
            weights = np.eye(len(updates))[nearest(updates.distances(), self.settings.malicious)]
        else:
            weights = updates.shares(self.settings.max_weight_ratio)
        for columns, block in updates.blocks():
            if strategy in CUTS:
                cut = CUTS[strategy](len(block), self.settings.trim)
                block.sort(axis=0)
                change[columns] = block[cut : len(block) - cut].mean(axis=0)
            else:
                change[columns] = weights @ block
        return torch.from_numpy(change)

    def _optimised(self, number: int, change: torch.Tensor) -> torch.Tensor:
        """The step of the server's optimiser, (trained weights,) float64, for the mean change of round
        `number`."""
        settings, nothing = self.settings, torch.zeros_like(change)
        kept = {name: self.memory.get(name, nothing) for name in MEMORY[settings.strategy]}
        if settings.strategy == "fedavgm":
            self.memory = {"momentum": settings.server_momentum * kept["momentum"] + change}
            return settings.server_rate * self.memory["momentum"]
        square, rate = change.square(), settings.server_rate
        m = settings.beta_1 * kept["m"] + (1 - settings.beta_1) * change
        if settings.strategy == "fedadam":
            v = settings.beta_2 * kept["v"] + (1 - settings.beta_2) * square
            # Kingma and Ba's correction of the moments' bias, with the round's number plus one, as in Flower's
            # FedAdam
            rate *= math.sqrt(1 - settings.beta_2 ** (number + 1)) / (1 - settings.beta_1 ** (number + 1))
        else:
            v = kept["v"] - (1 - settings.beta_2) * square * torch.sign(kept["v"] - square)
        self.memory = {"m": m, "v": v}
        return rate * m / (v.sqrt() + settings.tau)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The strategy's state, by name; empty for strategies without one."""
        return dict(self.memory)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.memory = dict(state)


def nearest(distances: np.ndarray, malicious: int) -> int:
    """Krum's choice: the index of the update whose squared distances to its nearest neighbours have the smallest
    sum. The neighbours are all hospitals but `malicious` + 2.

    distances: (hospitals, hospitals). Among equal sums, the first is taken.
    """
    neighbours = max(1, len(distances) - malicious - 2)
    others = np.sort(distances + np.diag(np.full(len(distances), np.inf)), axis=1)
    return int(others[:, :neighbours].sum(axis=1).argmin())
