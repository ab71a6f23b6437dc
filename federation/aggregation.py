"""From the hospitals' updates to one model: what is fit to be aggregated, and Flower's strategies that do it."""

from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedProx
from flwr.serverapp.strategy.strategy import Strategy

from common import MedFLError
from federation.settings import FederationSettings


@dataclass
class Update:
    """A hospital's weights after training, and the training slices behind them."""

    label: str
    arrays: ArrayRecord
    examples: int


def make_strategy(settings: FederationSettings) -> Strategy:
    """Flower's strategy of that name. Both are weighted by training slices; FedProx differs at the hospitals alone."""
    if settings.strategy == "fedprox":
        return FedProx(proximal_mu=settings.proximal_mu)
    return FedAvg()


def check_update(update: Update, reference: ArrayRecord) -> None:
    """Raises MedFLError where an update can't be averaged: other names or shapes, values that are not finite, no examples."""
    if not isinstance(update.examples, int) or update.examples <= 0:
        raise MedFLError(f"its update counts {update.examples} slices; it is left out")
    if not isinstance(update.arrays, ArrayRecord) or list(update.arrays) != list(reference):
        raise MedFLError("its update has other tensors than the model; it is left out")
    for name, array in update.arrays.items():
        try:
            values = array.numpy()
        except Exception as error:  # bytes from elsewhere: numpy and Flower each raise their own kinds
            raise MedFLError("its update can't be decoded; it is left out") from error
        if values.shape != tuple(reference[name].shape) or values.dtype != np.float32:
            raise MedFLError("its update has tensors of another shape or type; it is left out")
        if not np.isfinite(values).all():
            raise MedFLError("its update holds values that are not finite; it is left out")


def aggregate(strategy: Strategy, number: int, updates: list[Update]) -> ArrayRecord:
    """The model that the strategy makes of checked updates, float32, weighted by their examples."""
    replies = []
    for update in sorted(updates, key=lambda u: u.label):
        metrics = MetricRecord({"num-examples": update.examples})
        replies.append(Message(RecordDict({"arrays": update.arrays, "metrics": metrics}), 0, "train"))
    arrays, _ = strategy.aggregate_train(number, replies)
    return ArrayRecord({name: Array(np.asarray(array.numpy(), np.float32)) for name, array in arrays.items()})
