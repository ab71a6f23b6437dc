"""Gaussian noise that nobody can predict or separate from the sum.

The noise comes from the system's cryptographic generator; numpy's and torch's generators are not cryptographic. An
attacker who knows all hospitals but one knows a round's noise if that one was absent, and could test whether a
non-cryptographic generator makes such numbers. Noisy sums are rounded to a grid. Floating-point numbers are dense near
0 and sparse far from it, so without the grid the last digits of a sum could show which of two values the noise was
added to (Mironov 2012, doi:10.1145/2382196.2382264; Jin et al. 2022, arXiv:2112.05307).
"""

import os

import numpy as np
import torch

GRID = (
    2.0**-20
)  # of the noise's standard deviation: far above the last digits, far below any useful precision


def secret_normal(count: int) -> np.ndarray:
    """Normally distributed numbers, (count,) float64 (Box and Muller 1958, doi:10.1214/aoms/1177706645)."""
    half = (count + 1) // 2
    whole = np.frombuffer(os.urandom(16 * half), np.uint64) >> 11  # 53 bits
    radius, turn = ((whole + 1.0) * 2.0**-53).reshape(2, half)  # above 0, up to 1
    radius, turn = np.sqrt(-2 * np.log(radius)), 2 * np.pi * turn
    return np.concatenate([radius * np.cos(turn), radius * np.sin(turn)])[:count]


def noised(total: torch.Tensor, deviation: float) -> torch.Tensor:
    """A sum, any shape, float64, with noise of this standard deviation on each value, rounded to the grid."""
    if not deviation:
        return total
    noise = torch.from_numpy(secret_normal(total.numel())).reshape(total.shape)
    grid = GRID * deviation
    return noise.mul_(deviation).add_(total).div_(grid).round_().mul_(grid)
