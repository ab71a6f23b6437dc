"""Does a picture look like those that a model was trained on? What is measured of a volume, and which differences are told.

A network answers every picture with a mask, a photograph as well. So a checkpoint carries what its training images look
like: the mean over patients of a few features of each volume, and their deviation. No patient's own values are kept.
"""

import numpy as np
import torch

from common import SMALLEST_GROUP
from preprocessing import CHANNELS, EPSILON, volume_statistics

FLAIR = CHANNELS.index("FLAIR")
FRAME = 0.05  # of the side: the outer frame, which is dark around a head
APPEARANCE = ("frame", "foreground", "roughness", "symmetry", "height", "width")
# what is measured of a volume, and how many values it has
MEASURES = {"foreground_mean": len(CHANNELS), "foreground_deviation": len(CHANNELS), "appearance": len(APPEARANCE)}
LIMIT = 4.0  # deviations between patients; the README gives the rates of false alarms and of misses
LIMIT_ALONE = 6.0  # of a lone slice: at the top of a head slices differ more than patients do
SIDES = (64, 1024)  # pixels; the training's slices have 256
ASPECT = 1.3  # longer to shorter side


def appearance(volume: torch.Tensor) -> torch.Tensor:
    """Six features of the FLAIR channel of a volume (S, H, W, 3) uint8, (6,) float32, in the order of `APPEARANCE`.

    frame: brightness of the outer frame, and foreground: share of the pixels above the mean, which is the foreground;
    roughness: difference of neighbours over the deviation; symmetry: correlation with the mirror image; height and width:
    spread of the brightness along each axis, as a share of the side.
    """
    flair = volume[..., FLAIR].float()
    _, rows, columns = flair.shape
    foreground = (flair > flair.mean()).float()
    level = (flair * foreground).sum() / foreground.sum().clamp(min=1.0)
    high, wide = max(1, round(FRAME * rows)), max(1, round(FRAME * columns))
    inner = flair[:, high:rows - high, wide:columns - wide]
    frame = (flair.sum() - inner.sum()) / max(flair.numel() - inner.numel(), 1)
    centred = flair - flair.mean()
    variance = centred.square().mean() + EPSILON
    roughness = (flair[:, :, 1:] - flair[:, :, :-1]).abs().mean() / variance.sqrt()
    symmetry = (centred * centred.flip(2)).mean() / variance
    outline = flair.mean(dim=0)
    outline = (outline > outline.mean()).float()
    return torch.stack([frame / (level + EPSILON), foreground.mean(), roughness, symmetry,
                        _spread(outline.sum(dim=1)), _spread(outline.sum(dim=0))])


def _spread(weights: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the position along an axis, as a share of its length; weights: (n,)."""
    places = torch.arange(len(weights)) / len(weights)
    total = weights.sum().clamp(min=EPSILON)
    mean = (weights * places).sum() / total
    return ((weights * (places - mean).square()).sum() / total).sqrt()


def describe_volume(volume: torch.Tensor) -> dict[str, list[float]]:
    """What is measured of a volume (S, H, W, 3) uint8, by the names of `MEASURES`."""
    mean, deviation = volume_statistics(volume)
    return {"foreground_mean": mean.tolist(), "foreground_deviation": deviation.tolist(),
            "appearance": appearance(volume).tolist()}


def image_statistics(volumes: list[dict]) -> dict | None:
    """What training images look like: mean and deviation over patients of what `describe_volume` gave for each. None below
    3 patients, where it would say something of one."""
    if len(volumes) < SMALLEST_GROUP:
        return None
    values = {name: np.array([volume[name] for volume in volumes]) for name in MEASURES}
    return {name: {"mean": of.mean(axis=0).round(4).tolist(), "deviation": of.std(axis=0, ddof=1).round(4).tolist()}
            for name, of in values.items()}


def pool_image_statistics(groups: list[tuple[int, dict]]) -> dict | None:
    """`image_statistics` of all patients together, from (patients, statistics) of each group; None without a group."""
    if not groups:
        return None
    counts = np.array([[count] for count, _ in groups], float)
    pooled = {}
    for name in MEASURES:
        means, deviations = (np.array([statistics[name][key] for _, statistics in groups]) for key in ("mean", "deviation"))
        mean = (counts * means).sum(axis=0) / counts.sum()
        squares = ((counts - 1) * deviations**2 + counts * (means - mean) ** 2).sum(axis=0)
        deviation = np.sqrt(squares / (counts.sum() - 1))
        pooled[name] = {"mean": mean.round(4).tolist(), "deviation": deviation.round(4).tolist()}
    return pooled


def doubts(volume: np.ndarray, training_images: dict | None) -> list[str]:
    """Why a volume (S, H, W, 3) uint8 may be none that the model can judge: a sentence for each reason, none if it looks fine.

    training_images: `image_statistics` of the model's training images, or None if the model doesn't tell.
    """
    slices, rows, columns, _ = volume.shape
    found = []
    if not SIDES[0] <= min(rows, columns) <= max(rows, columns) <= SIDES[1]:
        found.append(f"The slices are {columns}×{rows} pixels; the model was made for about 256×256.")
    if max(rows, columns) > ASPECT * min(rows, columns):
        found.append(f"The slices are {columns}×{rows} pixels, and the model knows square ones: the shape is distorted for it.")
    flat = [name for channel, name in enumerate(CHANNELS) if np.ptp(volume[..., channel]) == 0]
    if flat:
        return [*found, f"Nothing is to be seen in {_listed(flat)}: every pixel has the same value."]
    same = [name for channel, name in enumerate(CHANNELS)
            if channel != FLAIR and np.array_equal(volume[..., channel], volume[..., FLAIR])]
    if same:
        found.append(f"{_listed([*same, 'FLAIR'])} are identical. The model expects three sequences; with copies in the "
                     "place of missing ones it is less reliable.")
    pixels = torch.from_numpy(np.array(volume))
    measured = describe_volume(pixels)
    if measured["appearance"][APPEARANCE.index("frame")] > 1:
        return [*found, "The frame is brighter than the middle. If the intensities are inverted, invert them back."]
    if not training_images or not MEASURES.keys() <= training_images.keys():
        return [*found, "The model does not say what its training images look like, so this picture is not compared with them."]
    limit = LIMIT if slices > 1 else LIMIT_ALONE
    unlike = _far(measured, training_images, "appearance", limit)
    if unlike:
        features = _listed([APPEARANCE[k] for k in unlike])
        found.append(f"This does not look like the brain scans that the model was trained on ({features}). Its mask means nothing "
                     "unless it is one.")
    odd = {k for name in ("foreground_mean", "foreground_deviation") for k in _far(measured, training_images, name, limit)}
    if odd:
        found.append(f"Brightness or contrast of {_listed([CHANNELS[k] for k in sorted(odd)])} lies outside of the training "
                     "images' range.")
    return found


def _far(measured: dict, training_images: dict, name: str, limit: float) -> list[int]:
    """The places in a feature's list that lie more than `limit` deviations from the training images' mean."""
    mean, deviation = (np.array(training_images[name][key]) for key in ("mean", "deviation"))
    return np.flatnonzero(np.abs(np.array(measured[name]) - mean) > limit * (deviation + EPSILON)).tolist()


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
