"""What a scan looks like: a few features of each volume, and their mean and deviation over patients.

A checkpoint carries the mean and the deviation of its training images, so that a page can warn about a picture
that differs from them (appearance/doubts.py). No patient's own values are kept.
"""

import numpy as np
import torch

from common import SMALLEST_GROUP
from preprocessing import CHANNELS, EPSILON, volume_statistics

FLAIR = CHANNELS.index("FLAIR")
FRAME = 0.05  # of the side: the outer frame, which is dark around a head
APPEARANCE = ("frame", "foreground", "roughness", "symmetry", "height", "width")
# the measures of a volume, and how many values each has
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

    All are torch operations that export to ONNX: the page in the browser gets the features from the exported graph.
    """
    frame, foreground, height, width = silhouette(volume)
    return torch.stack([frame, foreground, roughness(volume), symmetry(volume), height, width])


def silhouette(volume: torch.Tensor) -> torch.Tensor:
    """Frame, foreground, height and width of `appearance`, (4,) float32."""
    flair = volume[..., FLAIR].float()
    foreground = (flair > _mean(flair)).float()
    level = _mean(flair * foreground) / _mean(foreground).clamp(min=EPSILON)
    outline = flair.mean(dim=0)
    outer = 1 - _inner(outline.shape[0])[:, None] * _inner(outline.shape[1])[None, :]
    frame = (outline * outer).mean() / outer.mean()
    head = (outline > outline.mean()).float()
    return torch.stack(
        [
            frame / (level + EPSILON),
            _mean(foreground),
            _spread(head.sum(dim=1)),
            _spread(head.sum(dim=0)),
        ]
    )


def roughness(volume: torch.Tensor) -> torch.Tensor:
    """The third feature of `appearance`, a float32."""
    flair = volume[..., FLAIR].float()
    return _mean((flair[:, :, 1:] - flair[:, :, :-1]).abs()) / _variance(flair).sqrt()


def symmetry(volume: torch.Tensor) -> torch.Tensor:
    """The fourth feature of `appearance`, a float32."""
    flair = volume[..., FLAIR].float()
    centred = flair - _mean(flair)
    return _mean(centred * centred.flip(2)) / _variance(flair)


def _variance(flair: torch.Tensor) -> torch.Tensor:
    return _mean((flair - _mean(flair)).square()) + EPSILON


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of (S, H, W) float32, slice by slice: float32 counts exactly only to 16 million."""
    return values.mean(dim=(1, 2)).mean()


def _inner(side: int) -> torch.Tensor:
    """Which rows or columns of a slice lie within the outer frame: (side,) float32, 0 or 1."""
    places = torch.arange(side)
    edge = (FRAME * torch.full((), side, dtype=torch.float32)).round().clamp(min=1.0)
    return ((places >= edge) & (places < side - edge)).float()


def _spread(weights: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the position along an axis, as a share of its length; weights: (n,)."""
    places = torch.arange(weights.shape[0]) / weights.shape[0]
    total = weights.sum().clamp(min=EPSILON)
    mean = (weights * places).sum() / total
    return ((weights * (places - mean).square()).sum() / total).sqrt()


def blank(volume: torch.Tensor) -> torch.Tensor:
    """Which channels of a volume (S, H, W, 3) uint8 have one value everywhere, (3,) bool."""
    return volume.amax(dim=(0, 1, 2)) == volume.amin(dim=(0, 1, 2))


def copies(volume: torch.Tensor) -> torch.Tensor:
    """Which channels of a volume (S, H, W, 3) uint8 are identical to FLAIR, including FLAIR itself, (3,) bool."""
    same = (volume == volume[..., FLAIR : FLAIR + 1]).to(torch.uint8)
    return same.amin(dim=(0, 1, 2)) > 0  # `all` would be exported as 8 bytes a value: 300 MB for 200 slices


def describe_volume(volume: torch.Tensor) -> dict[str, list[float]]:
    """The measures of a volume (S, H, W, 3) uint8, by the names of `MEASURES`."""
    mean, deviation = volume_statistics(volume)
    return {
        "foreground_mean": mean.tolist(),
        "foreground_deviation": deviation.tolist(),
        "appearance": appearance(volume).tolist(),
    }


def image_statistics(volumes: list[dict]) -> dict | None:
    """What training images look like: mean and deviation over patients of their `describe_volume`. None below 3
    patients, where it would reveal something about one of them."""
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
