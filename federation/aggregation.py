"""From the hospitals' updates to one model: what is fit to be aggregated, and Flower's strategies that do it."""

from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedProx
from flwr.serverapp.strategy.strategy import Strategy

from common import MedFLError
from federation.messages import WEIGHTS, to_record
from federation.settings import FederationSettings


@dataclass
class Update:
    """A hospital's weights after training, (n,) float32, and the training slices behind them."""

    label: str
    weights: torch.Tensor
    examples: int


def make_strategy(settings: FederationSettings) -> Strategy:
    """Flower's strategy of that name. Both are weighted by training slices; FedProx differs at the hospitals alone."""
    if settings.strategy == "fedprox":
        return FedProx(proximal_mu=settings.proximal_mu)
    return FedAvg()


def check_update(update: Update, length: int) -> None:
    """Raises MedFLError where an update can't be averaged: another length, values that are not finite, no examples."""
    if update.examples <= 0:
        raise MedFLError(f"its update counts {update.examples} slices; it is left out")
    if len(update.weights) != length:
        raise MedFLError(f"its update has {len(update.weights)} weights and the model {length}; it is left out")
    if not bool(torch.isfinite(update.weights).all()):
        raise MedFLError("its update holds values that are not finite; it is left out")


def aggregate(strategy: Strategy, number: int, updates: list[Update]) -> torch.Tensor:
    """The weights, (n,) float32, that the strategy makes of checked updates, weighted by their examples."""
    replies = []
    for update in sorted(updates, key=lambda u: u.label):
        metrics = MetricRecord({"num-examples": update.examples})
        replies.append(Message(RecordDict({"arrays": to_record(update.weights), "metrics": metrics}), 0, "train"))
    arrays, _ = strategy.aggregate_train(number, replies)
    return torch.from_numpy(np.asarray(arrays[WEIGHTS].numpy(), np.float32))
