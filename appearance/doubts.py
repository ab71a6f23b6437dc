"""Does a picture look like those that a model was trained on? The differences that are reported, and their limits.

A network answers every picture with a mask, even a photograph. Some rules know the MRI of a brain that the default
task's models see. A model of other images is compared with its training images alone.
"""

from collections.abc import Sequence

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
    "unlike": "This does not look like the {images} that the model was trained on ({names}). Its mask means "
    "nothing unless it is one.",
    "brightness": "Brightness or contrast of {names} lies outside of the training images' range.",
}


def of_brain(channels: Sequence[str]) -> bool:
    """Whether images of these channels are the MRI of a brain, of the default task's sequences."""
    return tuple(channels) == CHANNELS


def three(channels: Sequence[str]) -> list[str]:
    """The names of the network's three inputs; a single channel fills all of them."""
    return [*channels, *[channels[-1]] * 3][:3]


def images_of(channels: Sequence[str]) -> str:
    """Those images in a sentence."""
    return "brain scans" if of_brain(channels) else "images"


def doubts(volume: np.ndarray, training_images: dict | None, channels: Sequence[str] = CHANNELS) -> list[str]:
    """The reasons why the model may not be able to judge a volume (S, H, W, 3) uint8, a sentence for each; empty if
    the volume looks fine.

    training_images: `image_statistics` of the model's training images, or None if the model has none; channels: of
    the model's task.
    """
    pixels, names = torch.from_numpy(np.array(volume)), three(channels)
    flat = [name for name, is_blank in zip(names, blank(pixels)) if is_blank]
    measured = describe_volume(pixels)
    brain = of_brain(channels)
    found = _shape(volume) if brain else []
    if flat:
        return [*found, SENTENCES["blank"].format(names=_listed(flat))]
    same = [name for name, is_copy in zip(names, copies(pixels)) if is_copy and name != "FLAIR"]
    if same and brain:
        found.append(SENTENCES["copies"].format(names=_listed([*same, "FLAIR"])))
    if brain and measured["appearance"][APPEARANCE.index("frame")] > 1:
        return [*found, SENTENCES["inverted"]]
    if not training_images or not MEASURES.keys() <= training_images.keys():
        return [*found, SENTENCES["silent"]]
    limit = LIMIT if len(volume) > 1 else LIMIT_ALONE
    unlike = _far(measured, training_images, "appearance", limit)
    if unlike:
        told = _listed([APPEARANCE[k] for k in unlike])
        found.append(SENTENCES["unlike"].format(images=images_of(channels), names=told))
    odd = {
        k
        for name in ("foreground_mean", "foreground_deviation")
        for k in _far(measured, training_images, name, limit)
    }
    if odd and brain:  # else the files of a task may have any scale, which the network does not see
        found.append(SENTENCES["brightness"].format(names=_listed([names[k] for k in sorted(odd)])))
    return found


def _shape(volume: np.ndarray) -> list[str]:
    """What is odd about the size of the slices."""
    _, rows, columns, _ = volume.shape
    found = []
    if not SIDES[0] <= min(rows, columns) <= max(rows, columns) <= SIDES[1]:
        found.append(SENTENCES["size"].format(columns=columns, rows=rows))
    if max(rows, columns) > ASPECT * min(rows, columns):
        found.append(SENTENCES["shape"].format(columns=columns, rows=rows))
    return found


def _far(measured: dict, training_images: dict, name: str, limit: float) -> list[int]:
    """The indices of a feature's values that lie more than `limit` deviations from the training images' mean."""
    mean, deviation = (np.array(training_images[name][key]) for key in ("mean", "deviation"))
    return np.flatnonzero(np.abs(np.array(measured[name]) - mean) > limit * (deviation + EPSILON)).tolist()


def _listed(named: list[str]) -> str:
    names = list(dict.fromkeys(named))  # one channel may fill all three
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
