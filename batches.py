"""Training batches of a dataset: the slices that an epoch draws, and how image and mask are varied together."""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from dataset import Dataset
from preprocessing import CLIP, network_input, resize

ROTATION = 20.0  # degrees, either way
SCALE = 0.15  # share, either way
SHIFT = 0.07  # of the side, either way
CONTRAST = 0.15  # share, either way, for each channel
BRIGHTNESS = 0.15  # deviations, either way, for each channel
GAMMA = 0.2  # of the exponent's logarithm, either way, for each channel
NOISE = 0.1  # deviations, at most
MISSING = 0.15  # how often a pre- or post-contrast sequence is missing; drawn separately for each
TUMOUR_PART = 0.5  # of a batch


class TrainingBatches:
    """An epoch's batches of augmented slices: images (B, 3, side, side) and masks (B, classes, side, side),
    float32.

    Masks hold the share of each class (of the whole region, if classes is 1) in each network pixel, 0 to 1, so that a
    boundary is not rounded away. All
    randomness comes from (seed, epoch), so an epoch is the same even if the run was interrupted before it.
    """

    def __init__(
        self,
        dataset: Dataset,
        patients: tuple[str, ...],
        side: int,
        batch_size: int,
        seed: int,
        classes: int = 1,
    ):
        self.dataset, self.side, self.batch_size, self.seed = dataset, side, batch_size, seed
        self.classes = classes
        slices = [(p, i, n > 0) for p in patients for i, n in enumerate(dataset.tumour_pixels(p))]
        self._slices = [(p, i) for p, i, _ in slices]
        self._tumour = np.array([k for k, (_, _, tumour) in enumerate(slices) if tumour], int)
        self._empty = np.array([k for k, (_, _, tumour) in enumerate(slices) if not tumour], int)

    @property
    def slices(self) -> int:
        """Number of slices that the batches are drawn from."""
        return len(self._slices)

    def __len__(self) -> int:
        """Batches per epoch: enough for all slices, rounded up to whole batches."""
        return math.ceil(len(self._slices) / self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of the slices in each batch, (batches, batch_size) int. Half of a batch shows a tumour, if
        there are both kinds of slices.

        Both kinds are drawn without replacement until all were seen, then again, so no slice is left out for good.
        """
        random = np.random.default_rng([self.seed, epoch])
        kinds = [kind for kind in (self._tumour, self._empty) if len(kind)]
        if self.batch_size == 1:  # there are no halves: every slice once per epoch
            kinds = [np.arange(len(self._slices))]
        first = round(self.batch_size * TUMOUR_PART) if len(kinds) == 2 else self.batch_size
        parts = []
        for kind, places in zip(kinds, (first, self.batch_size - first)):
            needed = len(self) * places
            drawn = np.concatenate([random.permutation(kind) for _ in range(-(-needed // len(kind)))])
            parts.append(drawn[:needed].reshape(len(self), places))
        return np.concatenate(parts, axis=1)

    def epoch(self, epoch: int, share: slice = slice(None)) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The epoch's batches, made when they are asked for. share: the part of each batch to return, varied as in
        the whole batch; the rest is not read."""
        random = torch.Generator().manual_seed(
            int(np.random.default_rng([self.seed, epoch, 1]).integers(2**62))
        )
        for numbers in self.order(epoch):
            side = (self.side, self.side)
            images = torch.zeros(len(numbers), 3, *side)
            masks = torch.zeros(len(numbers), self.classes, *side)
            images[share], masks[share] = map(
                torch.cat, zip(*(self._slice(*self._slices[k]) for k in numbers[share]))
            )
            images, masks = augment(images, masks, random)
            yield images[share], masks[share]

    def _slice(self, patient: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        volume, truth = self.dataset.volume(patient)
        pixels = torch.from_numpy(
            volume[number : number + 1].copy()
        )  # the cache is read-only, and torch wants writable memory
        image = network_input(pixels, *self.dataset.statistics(patient), self.side)
        truth = truth[number]
        masks = [truth == k for k in range(1, self.classes + 1)] if self.classes > 1 else [truth > 0]
        return image, resize(
            torch.from_numpy(np.stack(masks).astype(np.float32))[None], (self.side, self.side)
        )


def augment(
    images: torch.Tensor, masks: torch.Tensor, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch, varied: the geometry of image and mask alike, then the image's intensities. Shapes stay.

    images: (B, 3, h, w) float32, normalised; masks: (B, classes, h, w) float32, 0 to 1; random: a CPU generator.
    """
    grid = F.affine_grid(_affine(len(images), random), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    masks = F.grid_sample(masks, grid, padding_mode="zeros", align_corners=False)
    return _vary_intensity(images, random), masks


def _uniform(shape: tuple[int, ...], reach: float, random: torch.Generator) -> torch.Tensor:
    """Uniform numbers from -reach to reach."""
    return (torch.rand(shape, generator=random) * 2 - 1) * reach


def _affine(count: int, random: torch.Generator) -> torch.Tensor:
    """(count, 2, 3) maps from output to input coordinates: flip, rotation, scale, shift."""
    angle = _uniform((count,), math.radians(ROTATION), random)
    scale = 1 + _uniform((count,), SCALE, random)
    flip = (torch.rand(count, generator=random) < 0.5).float() * 2 - 1
    shift = _uniform((count, 2), 2 * SHIFT, random)  # the grid's side is 2
    rows = [
        torch.stack([flip * angle.cos() * scale, -angle.sin() * scale, shift[:, 0]], dim=1),
        torch.stack([flip * angle.sin() * scale, angle.cos() * scale, shift[:, 1]], dim=1),
    ]
    return torch.stack(rows, dim=1)


def _vary_intensity(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A missing sequence, then contrast, brightness, gamma and noise, separately for each picture and channel.

    Writes into `images`: new memory for each step would take half of the time.
    """
    missing = torch.rand((len(images), 3), generator=random) < MISSING
    missing[:, 1] = False  # FLAIR stands in for the others
    for picture, channel in missing.nonzero():
        images[picture, channel] = images[picture, 1]
    each = (len(images), 3, 1, 1)
    images.mul_(1 + _uniform(each, CONTRAST, random)).add_(_uniform(each, BRIGHTNESS, random))
    unit = images.add_(CLIP).div_(2 * CLIP).clamp_(0, 1)
    unit.pow_(_uniform(each, GAMMA, random).exp()).mul_(2 * CLIP).sub_(CLIP)
    strength = torch.rand((len(images), 1, 1, 1), generator=random) * NOISE
    return images.add_(torch.randn(images.shape, generator=random).mul_(strength))
