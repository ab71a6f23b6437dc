"""Pixels in, mask out: the one way in which every script and the app use a model."""

from collections.abc import Callable
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
    """Probability of tumour in each pixel, (S, H, W) float32, of a volume (S, H, W, 3) uint8.

    The statistics of the normalisation come from all given slices, so pass a patient whole. Runs in float32 on
    the model's own device and leaves the model in evaluation mode. turn: called before each block with the
    number of slices that are done; the block is computed within the context that it returns.
    """
    device = next(model.parameters()).device
    pixels = torch.from_numpy(
        np.array(volume)
    )  # a copy: a cached volume is read-only, and torch wants writable memory
    mean, deviation = (value.to(device) for value in volume_statistics(pixels))
    model.eval()
    blocks = []
    with torch.inference_mode():
        for start in range(0, len(pixels), BLOCK):
            with turn(start):
                slices = pixels[start : start + BLOCK].to(device)
                blocks.append(probability(model, slices, mean, deviation).cpu())
    return torch.cat(blocks).numpy()


def probability(
    model: TransUNet, slices: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
) -> torch.Tensor:
    """Slices (B, H, W, 3) uint8 and their volume's statistics to probabilities (B, H, W) float32, at the
    model's temperature; torch operations only."""
    images = network_input(slices, mean, deviation, model.image_side)  # (B, 3, side, side)
    logits = model(images.contiguous(memory_format=torch.channels_last)).float()  # (B, 1, side, side)
    logits = resize(logits, (slices.shape[1], slices.shape[2])) / model.temperature
    return logits.sigmoid()[:, 0]


def to_mask(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Probabilities of any shape to a mask of that shape, uint8, 255 where the probability reaches the
    threshold."""
    return np.where(probabilities >= np.float32(threshold), np.uint8(255), np.uint8(0))
