"""What a scan looks like: a few features of each volume, and their mean and deviation over patients.

A checkpoint carries the mean and the deviation of its training images, so that a page can doubt a picture
that is unlike them (appearance/doubts.py). No patient's own values are kept.
"""

import numpy as np
import torch

from common import SMALLEST_GROUP
from preprocessing import CHANNELS, EPSILON, volume_statistics

FLAIR = CHANNELS.index("FLAIR")
FRAME = 0.05  # of the side: the outer frame, which is dark around a head
APPEARANCE = ("frame", "foreground", "roughness", "symmetry", "height", "width")
# what is measured of a volume, and how many values it has
MEASURES = {
    "foreground_mean": len(CHANNELS),
    "foreground_deviation": len(CHANNELS),
    "appearance": len(APPEARANCE),
}


def appearance(volume: torch.Tensor) -> torch.Tensor:
    """Six features of the FLAIR channel of a volume (S, H, W, 3) uint8, (6,) float32, in the order of
    `APPEARANCE`.

    frame: brightness of the outer frame, and foreground: share of the pixels above the mean, which is the
    foreground; roughness: difference of neighbours over the deviation; symmetry: correlation with the mirror
    image; height and width: spread of the brightness along each axis, as a share of the side.
    """
    flair = volume[..., FLAIR].float()
    _, rows, columns = flair.shape
    foreground = (flair > flair.mean()).float()
    level = (flair * foreground).sum() / foreground.sum().clamp(min=1.0)
    high, wide = max(1, round(FRAME * rows)), max(1, round(FRAME * columns))
    inner = flair[:, high : rows - high, wide : columns - wide]
    frame = (flair.sum() - inner.sum()) / max(flair.numel() - inner.numel(), 1)
    centred = flair - flair.mean()
    variance = centred.square().mean() + EPSILON
    roughness = (flair[:, :, 1:] - flair[:, :, :-1]).abs().mean() / variance.sqrt()
    symmetry = (centred * centred.flip(2)).mean() / variance
    outline = flair.mean(dim=0)
    outline = (outline > outline.mean()).float()
    return torch.stack(
        [
            frame / (level + EPSILON),
            foreground.mean(),
            roughness,
            symmetry,
            _spread(outline.sum(dim=1)),
            _spread(outline.sum(dim=0)),
        ]
    )


def _spread(weights: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the position along an axis, as a share of its length; weights: (n,)."""
    places = torch.arange(len(weights)) / len(weights)
    total = weights.sum().clamp(min=EPSILON)
    mean = (weights * places).sum() / total
    return ((weights * (places - mean).square()).sum() / total).sqrt()


def describe_volume(volume: torch.Tensor) -> dict[str, list[float]]:
    """What is measured of a volume (S, H, W, 3) uint8, by the names of `MEASURES`."""
    mean, deviation = volume_statistics(volume)
    return {
        "foreground_mean": mean.tolist(),
        "foreground_deviation": deviation.tolist(),
        "appearance": appearance(volume).tolist(),
    }


def image_statistics(volumes: list[dict]) -> dict | None:
    """What training images look like: mean and deviation over patients of what `describe_volume` gave for
    each. None below 3 patients, where it would say something of one."""
    if len(volumes) < SMALLEST_GROUP:
        return None
    values = {name: np.array([volume[name] for volume in volumes]) for name in MEASURES}
    return {
        name: {
            "mean": of.mean(axis=0).round(4).tolist(),
            "deviation": of.std(axis=0, ddof=1).round(4).tolist(),
        }
        for name, of in values.items()
    }


def pool_image_statistics(groups: list[tuple[int, dict]]) -> dict | None:
    """`image_statistics` of all patients together, from (patients, statistics) of each group; None without a
    group."""
    if not groups:
        return None
    counts = np.array([[count] for count, _ in groups], float)
    pooled = {}
    for name in MEASURES:
        means, deviations = (
            np.array([statistics[name][key] for _, statistics in groups]) for key in ("mean", "deviation")
        )
        mean = (counts * means).sum(axis=0) / counts.sum()
        squares = ((counts - 1) * deviations**2 + counts * (means - mean) ** 2).sum(axis=0)
        deviation = np.sqrt(squares / (counts.sum() - 1))
        pooled[name] = {"mean": mean.round(4).tolist(), "deviation": deviation.round(4).tolist()}
    return pooled
