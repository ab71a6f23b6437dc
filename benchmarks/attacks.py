"""Attacks of a hostile hospital: updates and slices of known attacks. The attacker knows the rules and all honest
updates of the round."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message
from PIL import Image

from dataset import Dataset
from federation.protocol.messages import message, read
from federation.protocol.weights import from_record, statistics_mask, to_record, variance_mask
from transunet import TransUNet

UNDEFENDED = {
    "max_update_norm_ratio": 1e9,
    "cut_update_norm_ratio": 1e9,
    "min_update_cosine": -1.0,
    "max_weight_ratio": 1e9,
}


@dataclass
class Round:
    """What an attacker knows in a round: the model that was sent, its own honest change, and the changes of all
    others, (n,) float32."""

    own: torch.Tensor
    others: list[torch.Tensor]
    is_statistic: torch.Tensor
    variances: torch.Tensor
    sent: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        return torch.stack(self.others).mean(dim=0)

    def allowed(self, change: torch.Tensor) -> torch.Tensor:
        """The change, with variances kept above 0, so that it is not refused because of them."""
        return torch.where(self.variances, torch.maximum(change, 1e-6 - self.sent), change)

    def long(self, change: torch.Tensor, times: float) -> torch.Tensor:
        """The change, with its trained weights scaled to `times` the median length of the others."""
        trained = ~self.is_statistic
        median = torch.stack([one[trained].norm() for one in self.others]).median()
        change = change.clone()
        change[trained] *= times * median / change[trained].norm().clamp(min=1e-12)
        return change


def turned(now: Round) -> torch.Tensor:
    """Trained weights reversed and five times as long, with honest statistics."""
    return torch.where(now.is_statistic, now.own, -5 * now.own)


def inside_the_length(now: Round) -> torch.Tensor:
    """Against the others, just inside the length at which an update is left out."""
    return torch.where(now.is_statistic, now.own, now.long(-now.mean, 9.5))


def above_the_cosine(now: Round) -> torch.Tensor:
    """As far against the others as the bound on the cosine allows, and short enough not to be cut."""
    trained = ~now.is_statistic
    way = now.mean[trained] / now.mean[trained].norm()
    across = now.own[trained] - (now.own[trained] @ way) * way
    change = now.own.clone()
    change[trained] = -0.45 * way + 0.89 * across / across.norm()
    return now.long(change, 2.0)


def a_little(now: Round) -> torch.Tensor:
    """A little is enough (Baruch et al. 2019, arXiv:1902.06156): the others' mean minus one deviation, value by
    value."""
    others = torch.stack(now.others)
    return torch.where(now.is_statistic, now.own, others.mean(dim=0) - others.std(dim=0))


def replaced(now: Round) -> torch.Tensor:
    """Model replacement (Bagdasaryan et al. 2020, arXiv:1807.00459): so long that the mean of all becomes the
    opposite."""
    return now.allowed(-(len(now.others) + 1) * 2 * now.mean)


def variances(now: Round) -> torch.Tensor:
    """Statistics moved 9.5 times too far, with honest weights; variances stay above 0."""
    return now.allowed(torch.where(now.is_statistic, 9.5 * now.own, now.own))


def below_zero(now: Round) -> torch.Tensor:
    """Three running variances far below 0, and everything else honest."""
    change, places = now.own.clone(), now.variances.nonzero().flatten()
    least = places[now.sent[places].argsort()[:3]]
    change[least] = -9 * now.sent[least] - 0.05
    return change


def times(factor: float) -> Callable[[Round], torch.Tensor]:
    """Its own change, this many times as long."""
    return lambda now: now.allowed(factor * now.own)


def empty(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return image, np.zeros_like(mask)


def flipped(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return image, 255 - mask


def back_door(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A bright square in a corner, and a mask that marks the whole slice as tumour."""
    side = image.shape[0] // 8
    image = image.copy()
    image[:side, :side] = 255
    return image, np.full_like(mask, 255)


@dataclass(frozen=True)
class Attack:
    """An attack. change: how it changes the update. slices: how it changes the hospital's training slices. claims: the
    factor by which the hospital exaggerates the number of its slices."""

    name: str
    change: Callable[[Round], torch.Tensor] | None = None
    slices: Callable | None = None
    claims: int = 1


ATTACKS = {
    "turned": Attack("weights turned round, times 5, honest statistics", turned),
    "length": Attack("against the others, just inside the length", inside_the_length),
    "cosine": Attack("just above the cosine's bound", above_the_cosine),
    "little": Attack("a little is enough", a_little),
    "back-door": Attack("a back door, times 5", times(5), back_door),
    "empty": Attack("empty masks, times 9.5", times(9.5), empty),
    "variances": Attack("statistics times 9.5", variances),
    "below-zero": Attack("three running variances below 0", below_zero),
    "flips": Attack("flipped labels and 100 times the slices", None, flipped, 100),
    "replaced": Attack("model replacement", replaced),
}


class Hostile:
    """Changes the last hospital's answers. others: the honest updates of the round, as they pass."""

    def __init__(self, attack: Attack, model: TransUNet):
        self.attack = attack
        self.others: dict[str, torch.Tensor] = {}
        self.sent: torch.Tensor  # from the first honest answer on
        self.is_statistic, self.variances = statistics_mask(model), variance_mask(model)

    def watch(self, label: str) -> Callable[[Message, Message], Message]:
        """Keep a hospital's honest change."""

        def change(incoming: Message, reply: Message) -> Message:
            if "round" in read(incoming.content) and reply.content.get("arrays") is not None:
                self.sent = from_record(incoming.content["arrays"])
                self.others[label] = from_record(reply.content["arrays"]) - self.sent
            return reply

        return change

    def spoil(self, incoming: Message, reply: Message) -> Message:
        """The answer that the hostile hospital gives instead."""
        told = read(reply.content)
        if "parts" in told:
            told["parts"]["train"]["slices"] *= self.attack.claims
            return Message(message(told), reply_to=incoming)
        if "round" not in told or reply.content.get("arrays") is None:
            return reply
        told["examples"] *= self.attack.claims
        weights = from_record(reply.content["arrays"])
        if self.attack.change:
            now = Round(
                weights - self.sent, list(self.others.values()), self.is_statistic, self.variances, self.sent
            )
            weights = self.sent + self.attack.change(now)
        return Message(message(told, to_record(weights)), reply_to=incoming)


def spoiled_copy(dataset: Dataset, how: Callable, out: Path) -> Path:
    """The folder of a copy of the dataset whose slices and masks are changed by `how`."""
    for patient in dataset.patients:
        (out / patient.name).mkdir(parents=True)
        for number, (image, mask) in enumerate(zip(*dataset.volume(patient.name)), 1):
            for name, pixels in zip(
                (f"{patient.name}_{number}.png", f"{patient.name}_{number}_mask.png"), how(image, mask)
            ):
                Image.fromarray(pixels).save(out / patient.name / name)
    return out
