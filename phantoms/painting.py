"""Paints a synthetic patient's scan and tumour: ellipsoids and smoothed noise, as a site's scanner shows them."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter


@dataclass(frozen=True)
class Scanner:
    """A site's scanner: patients in the real data, range of the FLAIR foreground's mean (grey values up to 255),
    brightness of pre- and post-contrast relative to FLAIR, exponent of the grey scale, strength of the bias field,
    noise."""

    patients: int
    flair: tuple[float, float]
    pre: float
    post: float
    gamma: float
    bias: float
    noise: float


SCANNERS = {
    "DU": Scanner(45, (40, 95), 0.95, 0.85, 1.00, 0.12, 2.5),
    "HT": Scanner(34, (22, 85), 1.35, 1.15, 1.15, 0.08, 1.5),
    "CS": Scanner(16, (53, 83), 0.75, 0.60, 0.90, 0.20, 3.5),
    "FG": Scanner(14, (25, 79), 1.05, 1.55, 1.05, 0.28, 2.0),
}

# Brightness of a tissue in pre-contrast, FLAIR and post-contrast
FAT, BONE, FLUID, MUSCLE, AIR = (
    (0.95, 0.85, 0.95),
    (0.10, 0.08, 0.11),
    (0.12, 0.06, 0.13),
    (0.36, 0.30, 0.42),
    (0.03,) * 3,
)
GREY, WHITE, VESSEL, CHOROID = (0.35, 0.43, 0.37), (0.47, 0.36, 0.48), (0.25, 0.62, 0.95), (0.36, 0.62, 0.85)


@dataclass
class Head:
    """A head's geometry, float32: radius (0 in the middle, 1 on the skin) and brain (0 to 1) are (S, size,
    size); x (right) and y (back), (1, size, size), and z (up), (S, 1, 1), run over about -1 to 1."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    radius: np.ndarray
    brain: np.ndarray


def paint_patient(
    rng: np.random.Generator, scanner: Scanner, slices: int, size: int, missing: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """A volume (S, size, size, 3) uint8 and its mask (S, size, size) uint8 0/255. missing: the channel that FLAIR
    replaces, or None."""
    shape = (slices, size, size)
    head = _head(rng, shape)
    tissue = np.zeros((3, *shape), np.float32)
    _paint_skull(rng, tissue, head)
    _paint_brain(rng, tissue, head)
    _paint_distractors(rng, tissue, head)
    truth = _paint_lesion(rng, tissue, head)
    volume = _scan(rng, tissue, scanner)
    if missing is not None:
        volume[..., missing] = volume[..., 1]
    return volume, truth.astype(np.uint8) * 255


def _noise(rng: np.random.Generator, shape: tuple[int, int, int], grain: float) -> np.ndarray:
    """Smooth noise of mean 0 and deviation 1, `shape` float32. grain: its size as a share of the field of view."""
    side = min(shape[1], max(16, round(2 / grain)))  # made on a coarse grid and interpolated, for speed
    widths = (0.6 * grain * shape[0], grain * side, grain * side)
    field = gaussian_filter(rng.standard_normal((shape[0], side, side), np.float32), widths)
    field = (field - field.mean()) / field.std()
    place = np.clip((np.arange(shape[1], dtype=np.float32) + 0.5) * side / shape[1] - 0.5, 0, side - 1)
    linear = np.maximum(1 - np.abs(place[:, None] - np.arange(side, dtype=np.float32)), 0)
    return linear @ field @ linear.T


def _step(distance: np.ndarray, width: float) -> np.ndarray:
    """0 outside, 1 inside, a ramp of `width` where the distance crosses 0."""
    return np.clip(distance / width + 0.5, 0, 1)


def _bump(*scaled: np.ndarray) -> np.ndarray:
    """A Gaussian of coordinates that are divided by its widths. It goes axis by axis, because an axis has few
    values."""
    return math.prod(np.exp(-s * s) for s in scaled)


def _paint(tissue: np.ndarray, weight: np.ndarray, values: tuple[float, float, float]) -> None:
    """Blend a tissue into the three channels (3, S, H, W), in place. weight: (S, H, W), 0 to 1."""
    for channel, value in zip(tissue, values):
        channel += weight * (value - channel)


def _head(rng: np.random.Generator, shape: tuple[int, int, int]) -> Head:
    """A head with its own size, rotation and position in the picture."""
    line = (np.arange(shape[1], dtype=np.float32) + 0.5) * (2 / shape[1]) - 1
    z = np.linspace(rng.uniform(-0.9, -0.7), 0.93, shape[0], dtype=np.float32)[:, None, None]
    turn, (right, back) = np.float32(rng.normal(0, 0.08)), rng.uniform(-0.06, 0.06, 2).astype(np.float32)
    y, x = line[None, :, None] - back, line[None, None, :] - right
    x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    wide, long = rng.uniform(0.60, 0.74), rng.uniform(0.76, 0.88)
    vault = np.where(z > 0, np.abs(z) ** 2.6, 0.12 * z * z)
    nose = 0.16 * _bump(x / 0.12) * (y < 0) * _bump((z + 0.65) / 0.3)
    radius = (
        np.sqrt((x / (wide * (1 + 0.12 * y))) ** 2 + (y / long) ** 2 + vault)
        - nose
        + 0.012 * _noise(rng, shape, 0.08)
    )
    low = np.clip((-0.2 - z) / 0.5, 0, 1)  # further down, the face takes more of the section
    lobes = 0.3 * _bump(x / 0.12) - 0.2 * _bump((np.abs(x) - 0.3) / 0.12)
    face = -0.95 + 1.1 * low**0.7 + low * lobes + 0.03 * _noise(rng, shape, 0.04)
    brain = _step(0.86 - 0.28 * low - radius, 0.03) * _step(y - face, 0.06)
    return Head(x, y, z, radius.astype(np.float32), brain.astype(np.float32))


def _paint_skull(rng: np.random.Generator, tissue: np.ndarray, head: Head) -> None:
    """Paint scalp fat, bone and fluid; below them, the face with its fat, muscles, air and eyes."""
    shape, low = tissue.shape[1:], np.clip((-0.15 - head.z) / 0.12, 0, 1)
    texture = 0.8 * _noise(rng, shape, 0.012) + 0.6 * _noise(rng, shape, 0.025)
    _paint(tissue, _step(1 - head.radius, 0.03) * np.clip(0.85 + 0.12 * texture, 0.4, 1.1), FAT)
    _paint(tissue, _step(rng.uniform(0.92, 0.95) - head.radius, 0.03), BONE)
    _paint(tissue, _step(0.885 - head.radius, 0.02), FLUID)
    face = low * _step(0.94 - head.radius, 0.04)
    _paint(tissue, face, MUSCLE)
    _paint(tissue, face * _step(texture - 0.5, 0.6) * 0.8, FAT)
    _paint(tissue, face * _step(-0.7 - texture, 0.3), AIR)
    _paint(
        tissue, face * _step(0.14 - np.hypot(head.x, 1.4 * (head.y + 0.42)), 0.08), AIR
    )  # nose and sinuses
    apart = np.abs(head.x) - 0.27
    for reach, values in ((0.19, FAT), (0.125, FLUID)):  # eyes lie in fat
        ball = reach - np.sqrt(apart**2 + (head.y + 0.54) ** 2 + (0.7 * (head.z + 0.42)) ** 2)
        _paint(tissue, _step(ball, 0.03), values)


def _paint_brain(rng: np.random.Generator, tissue: np.ndarray, head: Head) -> None:
    """Paint the folded cortex around white matter, the fissures and the ventricles."""
    shape, x, y, z = tissue.shape[1:], head.x, head.y, head.z
    folds, side = _noise(rng, shape, 0.018), np.abs(head.x)
    outward = head.radius + 0.28 * np.clip(
        (-0.2 - z) / 0.5, 0, 1
    )  # reaches 0.86 on the brain's surface, below too
    _paint(tissue, head.brain, GREY)
    nuclei = _bump((side - 0.2) / 0.09, (y + 0.02) / 0.14, (z - 0.02) / 0.2)
    _paint(tissue, head.brain * _step(0.68 + 0.07 * folds - outward, 0.06) * (1 - nuclei), WHITE)
    rim = _step(outward - rng.uniform(0.50, 0.60), 0.15)
    _paint(tissue, head.brain * rim * _bump(folds / 0.5) * 0.9, GREY)
    _paint(
        tissue, head.brain * rim * _bump(folds / 0.16) * rng.uniform(0.5, 0.95), FLUID
    )  # sulci: where the noise is 0
    leaves = (
        np.sin(75 * np.hypot(0.7 * x, y - 0.1)) * _step(-0.42 - z, 0.1) * _step(y - 0.15, 0.1)
    )  # of the cerebellum
    _paint(tissue, head.brain * np.clip(leaves, 0, 1) * 0.35, FLUID)
    fissure = _bump(x / 0.014) * _step(head.radius + np.clip(z, 0, 1) - 0.5, 0.1) * (z > -0.3)
    sylvian = _bump((side - 0.40 - 0.08 * np.sin(9 * y)) / 0.022, (y + 0.08) / 0.2, (z + 0.05) / 0.16)
    _paint(tissue, head.brain * np.maximum(fissure * 0.8, sylvian), FLUID)
    large = rng.uniform(0.7, 1.35)
    lateral = (
        ((side - 0.05 - 0.75 * (y - 0.04) ** 2) / (0.05 * large)) ** 2
        + ((y - 0.04) / 0.34) ** 2
        + ((z - 0.2) / 0.24) ** 2
    )
    third = (x / (0.018 * large)) ** 2 + ((y - 0.02) / 0.12) ** 2 + ((z + 0.02) / 0.14) ** 2
    fourth = (x / (0.06 * large)) ** 2 + ((y - 0.3) / 0.06) ** 2 + ((z + 0.5) / 0.14) ** 2
    cistern = (x / 0.13) ** 2 + ((y - 0.12 - 0.6 * side) / 0.025) ** 2 + ((z + 0.24) / 0.1) ** 2
    caps = _bump((side - 0.14) / 0.05, (np.abs(y - 0.04) - 0.36) / 0.07, (z - 0.2) / 0.2)
    tissue[1] += (
        head.brain * caps * rng.uniform(0.05, 0.4)
    )  # bright in FLAIR at the horns of many healthy people
    for hollow in (lateral, third, fourth, cistern):
        _paint(tissue, _step(1 - hollow, 0.5), FLUID)
    _paint(
        tissue,
        _bump((side - 0.09) / 0.025, (y - 0.2) / 0.05, (z - 0.15) / 0.1) * rng.uniform(0.3, 1),
        CHOROID,
    )


def _paint_distractors(rng: np.random.Generator, tissue: np.ndarray, head: Head) -> None:
    """Paint what is bright in FLAIR but no tumour, so that a threshold by itself can't find the lesion."""
    shape, x, y, z = tissue.shape[1:], head.x, head.y, head.z
    tissue[1] += head.brain * 0.06 * _noise(rng, shape, 0.06)
    for _ in range(rng.integers(2, 9)):  # small spots in white matter
        right, back, width = rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4), rng.uniform(0.015, 0.04)
        spot = _bump((x - right) / width, (y - back) / width, (z - rng.uniform(-0.1, 0.6)) / 0.06)
        tissue[1] += head.brain * spot * rng.uniform(0.1, 0.35)
    for side in (-1, 1):  # artefact above the air of the ear and the nose
        right, back, up = side * rng.uniform(0.25, 0.4), rng.uniform(-0.3, 0.1), rng.uniform(-0.5, -0.25)
        base = _bump((x - right) / 0.1, (y - back) / 0.1, (z - up) / 0.1)
        tissue[1] += head.brain * base * rng.uniform(0, 0.4)
    inside = _step(0.92 - head.radius, 0.04)
    sinus = _bump(x / 0.05, (head.radius - 0.87) / 0.05) * (y > 0) + _bump(
        x / 0.02, (head.radius - 0.84) / 0.03
    ) * (y < 0)
    _paint(tissue, inside * sinus * rng.uniform(0.4, 1), VESSEL)
    vessels = _step(np.abs(_noise(rng, shape, 0.012)) - 2.9, 0.3) * _step(head.radius - 0.3, 0.1)
    _paint(tissue, head.brain * vessels * 0.8, (0.3, 0.45, 0.9))


def _paint_lesion(rng: np.random.Generator, tissue: np.ndarray, head: Head) -> np.ndarray:
    """Paint the lesion. Returns its true extent, (S, size, size) bool: in at least one slice, never in the first or
    the last."""
    shape = tissue.shape[1:]
    middle = np.clip(np.abs(head.z[:, 0, 0] - rng.uniform(-0.2, 0.5)).argmin(), 1, shape[0] - 2)
    home = np.argwhere((head.brain[middle] > 0.9) & (head.radius[middle] < 0.7) & (tissue[0, middle] > 0.3))
    row, column = home[rng.integers(len(home))]
    x0, y0, z0 = (np.broadcast_to(axis, shape)[middle, row, column] for axis in (head.x, head.y, head.z))
    width = float(np.clip(0.2 * np.exp(rng.normal(0, 0.35)), 0.1, 0.36))
    reach = float(np.clip(width * rng.uniform(1.0, 1.5), 0.18, 0.42))
    long = rng.uniform(0.8, 1.25)
    distance = np.sqrt(
        ((head.x - x0) * long / width) ** 2
        + ((head.y - y0) / long / width) ** 2
        + ((head.z - z0) / reach) ** 2
    )
    distance = (
        distance
        + 0.28 * _noise(rng, shape, 0.05) * np.clip(distance, 0, 1)
        + 0.06 * _noise(rng, shape, 0.015)
    )
    distance[[0, -1]] = 2
    inside = (distance < 1) & (head.brain > 0.5)
    contrast = rng.uniform(0.13, 0.5) * np.clip(1 + 0.3 * _noise(rng, shape, 0.03), 0.3, 1.6)
    soft = _step(1 - distance, rng.uniform(0.15, 0.5)) * head.brain
    for channel, value in zip(tissue, (-0.3 * contrast, contrast, -0.25 * contrast)):
        channel += soft * (0.35 * (0.42 - channel) + value)  # swelling blurs the pattern beneath
    if rng.random() < 0.4:  # contrast agent in a core, or in the rim around a dead one
        core = rng.uniform(0.25, 0.5)
        ring = _step(core - distance, 0.1) if rng.random() < 0.5 else _bump((distance - core) / 0.09)
        tissue[2] += ring * head.brain * rng.uniform(0.2, 0.6)
    return inside


def _scan(rng: np.random.Generator, tissue: np.ndarray, scanner: Scanner) -> np.ndarray:
    """Tissue (3, S, H, W) as this scanner shows it, (S, H, W, 3) uint8."""
    shape = tissue.shape[1:]
    target, bias = rng.uniform(*scanner.flair), np.exp(scanner.bias * _noise(rng, shape, 0.25))
    volume = np.empty((*shape, 3), np.uint8)
    for channel, relative in enumerate((scanner.pre, 1.0, scanner.post)):
        picture = np.clip(tissue[channel], 0, None) ** (scanner.gamma * rng.uniform(0.92, 1.08)) * bias
        mean = picture[picture > picture.mean()].mean()
        picture *= target * relative * (rng.uniform(0.9, 1.1) if channel != 1 else 1) / mean
        real, imaginary = (scanner.noise * rng.standard_normal(shape, np.float32) for _ in range(2))
        volume[..., channel] = np.clip(
            np.hypot(picture + real, imaginary), 0, 255
        )  # a magnitude: noise is Rician
    return volume
