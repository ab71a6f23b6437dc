"""Pixels in, mask out: the one way in which every script and the app use a model."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from preprocessing import network_input, resize, volume_statistics
from transunet import TransUNet

BLOCK = 8  # slices per forward pass; fixed, because another number can change the last bit of a probability


def predict_volume(
    model: TransUNet,
    volume: np.ndarray,
    turn: Callable[[int], AbstractContextManager] = lambda done: nullcontext(),
) -> np.ndarray:
    """Probability of the region in each pixel, (S, H, W) float32, of a volume (S, H, W, 3) uint8.

    The statistics of the normalisation come from all given slices, so pass a patient whole. Runs in float32 on
    the model's own device and leaves the model in evaluation mode. turn: called before each block with the
    number of slices that are done; the block is computed within the context that it returns.
    """
    return predict_classes(model, volume, turn)[0]


def predict_classes(
    model: TransUNet,
    volume: np.ndarray,
    turn: Callable[[int], AbstractContextManager] = lambda done: nullcontext(),
) -> tuple[np.ndarray, np.ndarray]:
    """As `predict_volume`, and the number of the likeliest class of each pixel, from 1, (S, H, W) uint8: which class
    it is if it belongs to the region."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(
        np.array(volume)
    )  # a copy: a cached volume is read-only, and torch wants writable memory
    mean, deviation = (value.to(device) for value in volume_statistics(pixels))
    model.eval()
    blocks, classes = [], []
    with torch.inference_mode():
        for start in range(0, len(pixels), BLOCK):
            with turn(start):
                slices = pixels[start : start + BLOCK].to(device)
                logits = logits_of(model, slices, mean, deviation)
                blocks.append(region_probability(model, logits).cpu())
                classes.append((logits.argmax(dim=1) + 1).to(torch.uint8).cpu())
    return torch.cat(blocks).numpy(), torch.cat(classes).numpy()


def probability(
    model: TransUNet, slices: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
) -> torch.Tensor:
    """Slices (B, H, W, 3) uint8 and their volume's statistics to probabilities of the region (B, H, W) float32, at
    the model's temperature; torch operations only."""
    return region_probability(model, logits_of(model, slices, mean, deviation))


def logits_of(
    model: TransUNet, slices: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
) -> torch.Tensor:
    """Slices (B, H, W, 3) uint8 and their volume's statistics to logits (B, classes, H, W) float32."""
    images = network_input(slices, mean, deviation, model.image_side)  # (B, 3, side, side)
    logits = model(images.contiguous(memory_format=torch.channels_last)).float()  # (B, classes, side, side)
    return resize(logits, (slices.shape[1], slices.shape[2]))


def region_probability(model: TransUNet, logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, classes, H, W) to the probability (B, H, W) that a pixel is of any class. The background's logit is
    0, so the sigmoid of the classes' log-sum-exp is what a softmax leaves of it."""
    region = logits[:, 0] if model.classes == 1 else logits.logsumexp(dim=1)
    return (region / model.temperature).sigmoid()


def to_mask(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Probabilities of any shape to a mask of that shape, uint8, 255 where the probability reaches the
    threshold."""
    return np.where(probabilities >= np.float32(threshold), np.uint8(255), np.uint8(0))


def labelled(mask: np.ndarray, classes: np.ndarray, labels: Iterable[int]) -> np.ndarray:
    """The region's mask with the label of each pixel's class, uint8 of the mask's shape. classes: from
    `predict_classes`; labels: of the classes in order."""
    return np.where(mask > 0, np.array((0, *labels), np.uint8)[classes], np.uint8(0))
