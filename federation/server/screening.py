"""The checks that a hospital's update must pass before it counts: its form, its values, and its length and direction
compared with the others'.

Form and values are checked for each update by itself. Length and direction of the change (a hospital's weights minus
the weights that were sent) are compared with the round's other updates, separately for the trained weights and for
BatchNorm's statistics. In the first rounds the statistics are 99 % of an update's squared length; checked together,
they would hide any manipulation of the weights.

An update whose trained weights point against all the others is left out. Statistics that point against the others
don't count. A long change is cut to a bound, because a hospital with many slices makes long changes. An update with
an extremely long change is left out. The bounds leave room for honest hospitals (SECURITY.md has the figures of the
real sites).
"""

import numpy as np
import torch

from common import MedFLError
from federation.protocol.settings import FederationSettings
from federation.server.updates import Updates

TINY = 1e-12  # the smallest length that anything is divided by
COMPARED = 3  # the fewest updates that can be compared: of two that differ, neither is the odd one out
PARTS = ("trained weights", "statistics")  # in the order of Updates.products


def check_update(
    weights: torch.Tensor, examples: int, length: int, announced: int, variances: torch.Tensor
) -> None:
    """Raises MedFLError if an update, (n,) float32, can't be averaged: it has another length, values that are not
    finite, running variances below 0, no examples, or more examples than the hospital `announced` when it joined.
    variances: which values are running variances, (n,) bool."""
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
    """The length of each change, in units of the median length, (hospitals,); from the inner products of all pairs."""
    norms = np.sqrt(products.diagonal().clip(min=0))
    return norms / max(float(np.median(norms)), TINY)


def cosines(products: np.ndarray) -> np.ndarray:
    """The cosine between each change and the mean of the others, (hospitals,), from the inner products of all pairs.
    Each change is scaled to length 1, so that none outweighs the others."""
    norms = np.sqrt(products.diagonal().clip(min=TINY**2))
    unit = products / np.outer(norms, norms)
    with_all = unit.sum(axis=1)
    rest = np.sqrt(
        (unit.sum() - 2 * with_all + unit.diagonal()).clip(min=TINY**2)
    )  # lengths of the sums of the others
    return (with_all - unit.diagonal()) / rest


def screen(updates: Updates, settings: FederationSettings) -> dict[str, str]:
    """Drop the updates that differ too much from the others, set statistics aside, and cut long changes.

    An update is dropped if one of its parts is longer than `max_update_norm_ratio` medians. A part that is longer
    than `cut_update_norm_ratio` medians is cut to that length. An update is also dropped if the cosine of its trained
    weights is below `min_update_cosine`; the worst update goes first, and the rest is compared again. Statistics with
    a cosine below that bound are set aside, and the weights count: late in a training statistics move little and to
    either side, so an honest hospital's statistics can point against the others by chance.

    Returns:
        The reasons why updates were dropped, by label.
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
    """Set aside the statistics that point against the others, the worst first."""
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
