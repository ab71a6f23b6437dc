"""What is looked at before a hospital's update may count: its form, its numbers, its size and direction beside the others'.

Form and numbers are checked for each by itself. Size and direction are compared with the other updates of the round (an update is
the hospital's weights minus those that were sent): one that is many times as long as the median, or that points against all
the others, is left out. The bounds leave room for honest hospitals: those of the real sites, 4 to 11 patients each, differ
in length by 8 and after a few rounds point hardly the same way (SECURITY.md).
"""

import statistics
from dataclasses import dataclass

import torch

from common import MedFLError
from federation.settings import FederationSettings

TINY = 1e-12  # a change that is none
COMPARED = 3  # updates from which on they can be compared: of two that differ none is the odd one


@dataclass
class Update:
    """A hospital's weights after training, (n,) float32, and the training slices behind them."""

    label: str
    weights: torch.Tensor
    examples: int


def check_update(update: Update, length: int, announced: int) -> None:
    """Raises MedFLError where an update can't be averaged: another length, values that are not finite, no examples, or more
    than the hospital `announced` when it joined."""
    if update.examples <= 0:
        raise MedFLError(f"its update counts {update.examples} slices")
    if update.examples > announced:
        raise MedFLError(f"its update counts {update.examples} slices, and it joined with {announced}")
    if len(update.weights) != length:
        raise MedFLError(f"its update has {len(update.weights)} weights and the model {length}")
    if not bool(torch.isfinite(update.weights).all()):
        raise MedFLError("its update holds values that are not finite")


def changes(updates: list[Update], sent: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each hospital changed, (n,) float32, by label. sent: the weights, (n,), that the round began with."""
    return {update.label: update.weights - sent for update in updates}


def lengths(changed: dict[str, torch.Tensor]) -> dict[str, float]:
    """The length of each change, in medians of all, by label."""
    norms = {label: float(change.double().norm()) for label, change in changed.items()}
    median = max(statistics.median(norms.values()), TINY)
    return {label: norm / median for label, norm in norms.items()}


def cosines(changed: dict[str, torch.Tensor]) -> dict[str, float]:
    """The cosine between each change and the mean of the others, each scaled to length 1 so that none outweighs, by label."""
    norms = {label: max(float(change.double().norm()), TINY) for label, change in changed.items()}
    whole = torch.zeros_like(next(iter(changed.values())), dtype=torch.float64)  # the sum of all, scaled
    for label, change in changed.items():
        whole += change.double() / norms[label]
    found = {}
    for label, change in changed.items():
        unit = change.double() / norms[label]
        rest = whole - unit
        found[label] = float(unit @ rest / max(float(rest.norm()), TINY))
    return found


def outliers(updates: list[Update], sent: torch.Tensor, settings: FederationSettings) -> dict[str, str]:
    """Why updates are unlike the round's others, by label. sent: the weights, (n,), that the round began with.

    Too long: more than `max_update_norm_ratio` times the median. Against the others: a cosine below `min_update_cosine`; the
    worst is taken out first, and the rest is compared anew.
    """
    left, found = changes(updates, sent), {}
    if len(left) >= COMPARED:
        for label, length in lengths(left).items():
            if length > settings.max_update_norm_ratio:
                found[label] = f"its update is {length:.1f} times as long as the median of the round"
                del left[label]
    while len(left) >= COMPARED:
        against = cosines(left)
        worst = min(against, key=against.get)
        if against[worst] >= settings.min_update_cosine:
            break
        found[worst] = f"its update points against the others' (cosine {against[worst]:.2f})"
        del left[worst]
    return found
