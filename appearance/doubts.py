"""Does a picture look like those that a model was trained on? The differences that are reported, and their limits.

A network answers every picture with a mask, even a photograph.
"""

import numpy as np
import torch

from appearance.features import APPEARANCE, MEASURES, blank, copies, describe_volume
from preprocessing import CHANNELS, EPSILON

LIMIT = 4.0  # deviations between patients; docs/apps.md gives the rates of false alarms and of misses
LIMIT_ALONE = 6.0  # for a single slice: at the top of a head, slices differ more than patients do
SIDES = (64, 1024)  # pixels; the training slices have 256
ASPECT = 1.3  # longer to shorter side
# the sentences of both pages
SENTENCES = {
    "size": "The slices are {columns}×{rows} pixels; the model was made for about 256×256.",
    "shape": "The slices are {columns}×{rows} pixels, and the model knows square ones: the shape is distorted "
    "for it.",
    "blank": "Nothing is to be seen in {names}: every pixel has the same value.",
    "copies": "{names} are identical. The model expects three sequences; with copies in the place of missing "
    "ones it is less reliable.",
    "inverted": "The frame is brighter than the middle. If the intensities are inverted, invert them back.",
    "silent": "The model does not say what its training images look like, so this picture is not compared "
    "with them.",
    "unlike": "This does not look like the brain scans that the model was trained on ({names}). Its mask means "
    "nothing unless it is one.",
    "brightness": "Brightness or contrast of {names} lies outside of the training images' range.",
}


def doubts(volume: np.ndarray, training_images: dict | None) -> list[str]:
    """The reasons why the model may not be able to judge a volume (S, H, W, 3) uint8, a sentence for each; empty if
    the volume looks fine.

    training_images: `image_statistics` of the model's training images, or None if the model has none.
    """
    slices, rows, columns, _ = volume.shape
    pixels = torch.from_numpy(np.array(volume))
    found = []
    if not SIDES[0] <= min(rows, columns) <= max(rows, columns) <= SIDES[1]:
        found.append(SENTENCES["size"].format(columns=columns, rows=rows))
    if max(rows, columns) > ASPECT * min(rows, columns):
        found.append(SENTENCES["shape"].format(columns=columns, rows=rows))
    flat = [name for name, is_blank in zip(CHANNELS, blank(pixels)) if is_blank]
    if flat:
        return [*found, SENTENCES["blank"].format(names=_listed(flat))]
    same = [name for name, is_copy in zip(CHANNELS, copies(pixels)) if is_copy and name != "FLAIR"]
    if same:
        found.append(SENTENCES["copies"].format(names=_listed([*same, "FLAIR"])))
    measured = describe_volume(pixels)
    if measured["appearance"][APPEARANCE.index("frame")] > 1:
        return [*found, SENTENCES["inverted"]]
    if not training_images or not MEASURES.keys() <= training_images.keys():
        return [*found, SENTENCES["silent"]]
    limit = LIMIT if slices > 1 else LIMIT_ALONE
    unlike = _far(measured, training_images, "appearance", limit)
    if unlike:
        found.append(SENTENCES["unlike"].format(names=_listed([APPEARANCE[k] for k in unlike])))
    odd = {
        k
        for name in ("foreground_mean", "foreground_deviation")
        for k in _far(measured, training_images, name, limit)
    }
    if odd:
        found.append(SENTENCES["brightness"].format(names=_listed([CHANNELS[k] for k in sorted(odd)])))
    return found


def _far(measured: dict, training_images: dict, name: str, limit: float) -> list[int]:
    """The indices of a feature's values that lie more than `limit` deviations from the training images' mean."""
    mean, deviation = (np.array(training_images[name][key]) for key in ("mean", "deviation"))
    return np.flatnonzero(np.abs(np.array(measured[name]) - mean) > limit * (deviation + EPSILON)).tolist()


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
