"""What is looked at before a hospital's update may count: its form, its numbers, its length and direction
beside the others'.

Form and numbers are checked for each by itself. Length and direction are compared with the other updates of
the round, and for what is trained and for BatchNorm's statistics separately: in the first rounds statistics
are 99 % of an update's squared length, so together they would hide whatever was done to the weights. A change
(a hospital's weights less those that were sent) of the weights that points against all the others' is left out;
statistics that do so don't count; what is long is cut to the bound, because a hospital with many slices makes
long changes; and a change beyond all measure is left out. The bounds leave room for honest hospitals
(SECURITY.md has the figures of the real sites).
"""

import numpy as np
import torch

from common import MedFLError
from federation.protocol.settings import FederationSettings
from federation.server.updates import Updates

TINY = 1e-12  # a change that is none
COMPARED = 3  # updates from which on they can be compared: of two that differ none is the odd one
PARTS = ("trained weights", "statistics")  # in the order of Updates.products


def check_update(
    weights: torch.Tensor, examples: int, length: int, announced: int, variances: torch.Tensor
) -> None:
    """Raises MedFLError where an update, (n,) float32, can't be averaged: another length, values that are not
    finite, running variances below 0, no examples, or more than the hospital `announced` when it joined.
    variances: where they are, (n,) bool."""
    if examples <= 0:
        raise MedFLError(f"its update counts {examples} slices")
    if examples > announced:
        raise MedFLError(f"its update counts {examples} slices, and it joined with {announced}")
    if len(weights) != length:
        raise MedFLError(f"its update has {len(weights)} weights and the model {length}")
    if not bool(torch.isfinite(weights).all()):
        raise MedFLError("its update holds values that are not finite")
    if bool((weights[variances] < 0).any()):
        raise MedFLError("its update holds running variances below 0")


def lengths(products: np.ndarray) -> np.ndarray:
    """The length of each change in medians of all, (hospitals,), from the
    products of each with each other."""
    norms = np.sqrt(products.diagonal().clip(min=0))
    return norms / max(float(np.median(norms)), TINY)


def cosines(products: np.ndarray) -> np.ndarray:
    """The cosine between each change and the mean of the others, (hospitals,), each scaled to length 1 so
    that none outweighs; from the products of each with each other."""
    norms = np.sqrt(products.diagonal().clip(min=TINY**2))
    unit = products / np.outer(norms, norms)
    with_all = unit.sum(axis=1)
    rest = np.sqrt(
        (unit.sum() - 2 * with_all + unit.diagonal()).clip(min=TINY**2)
    )  # lengths of the sums of the others
    return (with_all - unit.diagonal()) / rest


def screen(updates: Updates, settings: FederationSettings) -> dict[str, str]:
    """Drop the updates that are unlike the round's others, set statistics aside, and cut what is long.

    Of each part: longer than `max_update_norm_ratio` medians, the update is dropped; longer than
    `cut_update_norm_ratio` medians, the part is cut to that. Trained weights whose cosine is below
    `min_update_cosine`: the update is dropped, the worst first, and the rest is compared again. Statistics below it
    are set aside and the weights count: late in a training statistics move little and to either side, so those of
    an honest hospital can point against the others by chance.

    Returns:
        Why updates were dropped, by label.
    """
    found: dict[str, str] = {}

    def drop(label: str, reason: str) -> None:
        found[label] = reason
        updates.drop(label)

    if len(updates) >= COMPARED:
        too_long = {}
        for part, products in zip(PARTS, updates.products()):
            for label, length in zip(updates.labels, lengths(products)):
                if length > settings.max_update_norm_ratio:
                    too_long[label] = (
                        f"its change of the {part} is {length:.1f} times as long as the median of the round"
                    )
        for label, reason in too_long.items():
            drop(label, reason)
    while len(updates) >= COMPARED:
        against = cosines(updates.products()[0])
        worst = int(against.argmin())
        if against[worst] >= settings.min_update_cosine:
            break
        drop(updates.labels[worst], f"its change of the {PARTS[0]} {_against(against[worst])}")
    _set_statistics_aside(updates, settings.min_update_cosine)
    if len(updates) >= COMPARED:
        of_parts = [
            settings.cut_update_norm_ratio / lengths(products).clip(min=TINY)
            for products in updates.products()
        ]
        for label, *factors in zip(updates.labels, *of_parts):
            updates.cut(label, *(min(1.0, float(factor)) for factor in factors))
    return found


def _set_statistics_aside(updates: Updates, bound: float) -> None:
    """Set aside the statistics that point against the others', the worst first."""
    labels, products = updates.labels, updates.products()[1]
    while len(labels) >= COMPARED:
        against = cosines(products)
        worst = int(against.argmin())
        if against[worst] >= bound:
            break
        updates.set_aside(labels[worst], _against(against[worst]))
        kept = [place for place in range(len(labels)) if place != worst]
        labels, products = [labels[place] for place in kept], products[np.ix_(kept, kept)]


def _against(cosine: float) -> str:
    return f"points against the others' (cosine {cosine:.2f})"
