"""Masked autoencoding: an encoder learns from slices without masks by painting what is hidden from it.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

import torchvision_operators  # noqa: F401  must come before timm

# isort: split
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from batches import augment
from common import MedFLError
from preprocessing import MASK_SUFFIX, group_volumes, network_input, read_volume, volume_statistics
from scans.folders import walk
from scans.pairing import pair
from transunet import ARCHITECTURES, PATCH, TransUNet

WIDTH, DEPTH, HEADS = 96, 2, 3  # of the decoder, which is thrown away
FLAT = 1e-2  # added to a patch's variance, so that the empty background is not stretched to noise


class MaskedAutoencoder(nn.Module):
    """A named model's encoder, and a small decoder that paints the patches which the encoder did not see.

    name, image_side: as for `TransUNet`. Raises MedFLError for a model whose encoder is no plain ViT.
    """

    def __init__(self, name: str, image_side: int):
        super().__init__()
        if name in ARCHITECTURES and ARCHITECTURES[name].pyramid is None:
            raise MedFLError(
                f"{name} sees slices through a ResNet, which hides no patches; choose mini, tiny or small"
            )
        self.encoder = TransUNet(name, image_side).encoder
        places = (image_side // PATCH) ** 2
        self.project = nn.Linear(self.encoder.embed_dim, WIDTH)
        self.hidden = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, places, WIDTH))
        self.decoder = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(DEPTH)), nn.LayerNorm(WIDTH))
        self.paint = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, images: Tensor, order: Tensor, visible: int) -> Tensor:
        """The loss, a scalar: the mean squared error over the hidden patches, each normalised by its own mean
        and deviation.

        images: (B, 3, side, side) float32, normalised; order: (B, n) int64, the patches' numbers shuffled, of
        which the first `visible` are shown.
        """
        vit = self.encoder
        assert vit.pos_embed is not None and vit.cls_token is not None  # our encoders have both
        tokens = vit.patch_embed(images) + vit.pos_embed[:, vit.num_prefix_tokens :]  # (B, n, d)
        shown = tokens.gather(1, order[:, :visible, None].expand(-1, -1, tokens.shape[2]))
        first = (vit.cls_token + vit.pos_embed[:, : vit.num_prefix_tokens]).expand(len(images), -1, -1)
        seen = vit.norm(vit.blocks(vit.norm_pre(torch.cat([first, shown], dim=1))))
        known = self.project(seen[:, vit.num_prefix_tokens :])  # (B, visible, WIDTH)
        hidden = self.hidden.expand(len(images), order.shape[1] - visible, -1)
        back = order.argsort(dim=1)[:, :, None].expand(-1, -1, WIDTH)
        whole = torch.cat([known, hidden], dim=1).gather(1, back) + self.places  # (B, n, WIDTH), in place
        errors = (self.paint(self.decoder(whole)) - patches(images)).square().mean(dim=2)  # (B, n)
        return errors.gather(1, order[:, visible:]).mean()


def patches(images: Tensor) -> Tensor:
    """Images (B, 3, side, side) as their patches (B, n, 3 * 16 * 16), each less its mean and over its
    deviation."""
    count, _, side, _ = images.shape
    grid = images.reshape(count, 3, side // PATCH, PATCH, side // PATCH, PATCH)
    flat = grid.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 3 * PATCH**2)
    return (flat - flat.mean(dim=2, keepdim=True)) / (flat.var(dim=2, keepdim=True) + FLAT).sqrt()


class UnlabelledSlices:
    """The slices below a folder, prepared as for a training, in memory: (n, 3, side, side) float16.

    patients: those that are read, by their names in a split; all where None. Masks, as their names or their
    tree tell them, are not opened. Raises MedFLError where there is no slice.
    """

    def __init__(
        self,
        folder: Path,
        side: int,
        patients: set[str] | None = None,
        mask_suffix: str = MASK_SUFFIX,
    ):
        inside = dict(walk(folder))
        files = pair((file for found in inside.values() for file in found), mask_suffix).images
        volumes = [
            (name, slices)
            for name, slices in group_volumes(files, inside)
            if patients is None or any(_is_of(name, slices[0].parent, patient) for patient in patients)
        ]
        if not volumes:
            raise MedFLError(f"there are no slices in {folder} to learn from; name another --data-dir")
        prepared = []
        for _, slices in volumes:
            pixels = torch.from_numpy(read_volume(slices).copy())
            prepared.append(network_input(pixels, *volume_statistics(pixels), side).half())
        self.volumes, self.images = len(volumes), torch.cat(prepared)

    def __len__(self) -> int:
        return len(self.images)

    def epoch(self, epoch: int, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Every slice once, varied as in a training: (B, 3, side, side) float32. All randomness comes from
        (seed, epoch)."""
        draw = np.random.default_rng([seed, epoch])
        random = torch.Generator().manual_seed(int(draw.integers(2**62)))
        for numbers in np.array_split(draw.permutation(len(self)), -(-len(self) // batch_size)):
            images = self.images[torch.from_numpy(numbers)].float()
            yield augment(images, torch.zeros(len(images), 1, *images.shape[2:]), random)[0]


def _is_of(volume: str, folder: Path, patient: str) -> bool:
    """Whether a volume is a patient's, whose name in a split is the end of the folder's path, or the volume's
    own in a flat tree."""
    names = Path(patient).parts
    return folder.parts[-len(names) :] == names or volume == patient
