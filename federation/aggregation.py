"""From the hospitals' updates to one model, by Flower's strategies."""

import numpy as np
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedProx
from flwr.serverapp.strategy.strategy import Strategy

from federation.messages import WEIGHTS, to_record
from federation.screening import Update
from federation.settings import FederationSettings


def make_strategy(settings: FederationSettings) -> Strategy:
    """Flower's strategy of that name. Both are weighted by training slices; FedProx differs at the hospitals alone."""
    if settings.strategy == "fedprox":
        return FedProx(proximal_mu=settings.proximal_mu)
    return FedAvg()


def aggregate(strategy: Strategy, number: int, updates: list[Update]) -> torch.Tensor:
    """The weights, (n,) float32, that the strategy makes of checked updates, weighted by their examples."""
    replies = []
    for update in sorted(updates, key=lambda u: u.label):
        metrics = MetricRecord({"num-examples": update.examples})
        replies.append(Message(RecordDict({"arrays": to_record(update.weights), "metrics": metrics}), 0, "train"))
    arrays, _ = strategy.aggregate_train(number, replies)
    return torch.from_numpy(np.asarray(arrays[WEIGHTS].numpy(), np.float32))
