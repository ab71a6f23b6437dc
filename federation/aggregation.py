"""From the hospitals' updates to one model, by Flower's strategies.

A strategy is given changes (a hospital's weights less those that were sent) in float64, and what it makes of them is added to
the weights that were sent. Krum's distances would drown in the rounding of the weights themselves otherwise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, FedTrimmedAvg, FedYogi, Krum
from flwr.serverapp.strategy.strategy import Strategy

from federation.screening import Update
from federation.settings import FederationSettings
from federation.weights import WEIGHTS

SERVER_OPTIMISERS = (FedAvgM, FedAdam, FedYogi)


def make_strategy(settings: FederationSettings) -> Strategy:
    """Flower's strategy of that name.

    Weighted by training slices: fedavg (McMahan et al. 2017), fedprox (Li et al. 2020; differs at the hospitals alone),
    fedavgm (Hsu et al. 2019), fedadam and fedyogi (Reddi et al. 2021; Flower's Adam corrects the bias of its moments). Not
    weighted: fedmedian and fedtrimmedavg (Yin et al. 2018), value by value, and krum (Blanchard et al. 2017), which takes the
    one update that lies nearest to the others.
    """
    moments = {"eta": settings.server_rate, "beta_1": settings.beta_1, "beta_2": settings.beta_2, "tau": settings.tau}
    match settings.strategy:
        case "fedprox":
            return FedProx(proximal_mu=settings.proximal_mu)
        case "fedavgm":
            return FedAvgM(server_learning_rate=settings.server_rate, server_momentum=settings.server_momentum)
        case "fedadam":
            return FedAdam(**moments)
        case "fedyogi":
            return FedYogi(**moments)
        case "fedmedian":
            return FedMedian()
        case "fedtrimmedavg":
            return FedTrimmedAvg(beta=settings.trim)
        case "krum":
            return Krum(num_malicious_nodes=settings.malicious)
    return FedAvg()


@dataclass
class Aggregator:
    """Makes one model of each round's updates, and keeps what its strategy remembers.

    statistics: which weights nobody trains, (n,) bool. They are averaged; a server's optimiser, which goes further than any
    hospital went, would make negative variances of them.
    """

    settings: FederationSettings
    statistics: torch.Tensor

    def __post_init__(self) -> None:
        self.strategy = make_strategy(self.settings)

    def __call__(self, number: int, updates: list[Update], sent: torch.Tensor) -> torch.Tensor:
        """The weights, (n,) float32, after round `number`, of checked updates to the weights `sent`, (n,) float32."""
        everything = slice(None)
        if not isinstance(self.strategy, SERVER_OPTIMISERS):
            return (sent.double() + _apply(self.strategy, number, updates, sent, everything)).float()
        trained = ~self.statistics
        start = np.zeros(int(trained.sum()))
        self.strategy.current_arrays = (ArrayRecord({WEIGHTS: Array(start)}) if isinstance(self.strategy, FedAvgM)
                                        else {WEIGHTS: start})
        step = _apply(FedAvg(), number, updates, sent, everything)
        step[trained] = _apply(self.strategy, number, updates, sent, trained)
        return (sent.double() + step).float()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the strategy remembers, by name, (trained weights,) float64; empty for those without a memory."""
        if isinstance(self.strategy, FedAvgM):
            kept = {"momentum": self.strategy.momentum_vector and self.strategy.momentum_vector[0]}
        elif isinstance(self.strategy, SERVER_OPTIMISERS):
            kept = {name: (getattr(self.strategy, f"{name}_t") or {}).get(WEIGHTS) for name in ("m", "v")}
        else:
            kept = {}
        return {name: torch.from_numpy(values) for name, values in kept.items() if values is not None}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `state_dict` gave."""
        for name, values in state.items():
            if name == "momentum":
                self.strategy.momentum_vector = [values.numpy()]
            else:
                setattr(self.strategy, f"{name}_t", {WEIGHTS: values.numpy()})


def _apply(strategy: Strategy, number: int, updates: list[Update], sent: torch.Tensor,
           part: torch.Tensor | slice) -> torch.Tensor:
    """The strategy's answer to what hospitals changed in this part of the weights, float64. Hospitals go by their labels."""
    replies = []
    for update in sorted(updates, key=lambda u: u.label):
        change = update.weights[part].double() - sent[part].double()
        contents = {"arrays": ArrayRecord({WEIGHTS: Array(change.numpy())}),
                    "metrics": MetricRecord({"num-examples": update.examples})}
        replies.append(Message(RecordDict(contents), 0, "train"))
    arrays, _ = strategy.aggregate_train(number, replies)
    return torch.from_numpy(np.array(arrays[WEIGHTS].numpy(), np.float64))
