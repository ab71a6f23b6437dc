"""Masked autoencoding: an encoder learns from slices without masks by reconstructing hidden patches.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

import torchvision_operators  # noqa: F401  must come before timm

# isort: split
import torch
from safetensors.torch import save
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from batches import augment
from common import MedFLError
from preprocessing import network_input, volume_statistics
from scans.cohort import UNMASKED
from scans.folders import walk
from scans.naming import MASK_SUFFIX, group_volumes
from scans.pairing import pair
from scans.pictures import read_volume
from split import Split
from storage.files import atomic_write
from training import EpochResult
from transunet import ARCHITECTURES, PATCH, TransUNet

STUDY = re.compile(r"(p[0-9a-f]{12})_s[0-9a-f]{8}")  # the pseudonyms of a patient and a study
HIDDEN = 0.75  # share of the patches, as in the paper
BETAS = (0.9, 0.95)  # of AdamW, as in the paper
WIDTH, DEPTH, HEADS = 96, 2, 3  # of the decoder, which is thrown away
FLAT = 1e-2  # added to a patch's variance, so that the empty background is not stretched to noise


class MaskedAutoencoder(nn.Module):
    """A named model's encoder, and a small decoder that paints the patches which the encoder did not see.

    name, image_side: as for `TransUNet`. encoder: the encoder of such a model, or None for a new one. Raises
    MedFLError for a model whose encoder is not a plain ViT.
    """

    def __init__(self, name: str, image_side: int, encoder: VisionTransformer | None = None):
        super().__init__()
        check_name(name)
        self.encoder = TransUNet(name, image_side).encoder if encoder is None else encoder
        places = (image_side // PATCH) ** 2
        self.project = nn.Linear(self.encoder.embed_dim, WIDTH)
        self.hidden = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, places, WIDTH))
        self.decoder = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(DEPTH)), nn.LayerNorm(WIDTH))
        self.paint = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, images: Tensor, order: Tensor, visible: int) -> Tensor:
        """The loss, a scalar: the mean squared error over the hidden patches, each normalised by its own mean
        and deviation.

        images: (B, 3, side, side) float32, normalised; order: (B, n) int64, the patches' numbers, shuffled; the
        encoder sees the first `visible` of them.
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

    def painter(self) -> dict[str, Tensor]:
        """The state of everything except the encoder."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}

    def load_painter(self, state: dict[str, Tensor]) -> None:
        """Load the state that `painter` returned."""
        self.load_state_dict({**self.state_dict(), **state})


def check_name(name: str) -> None:
    """Raises MedFLError for a model whose encoder is not a plain ViT."""
    if name in ARCHITECTURES and ARCHITECTURES[name].pyramid is None:
        raise MedFLError(
            f"{name} sees slices through a ResNet, which can't hide patches; choose mini, tiny or small"
        )


def patches(images: Tensor) -> Tensor:
    """Images (B, 3, side, side) as their patches (B, n, 3 * 16 * 16), each normalised by its own mean and
    deviation."""
    count, _, side, _ = images.shape
    grid = images.reshape(count, 3, side // PATCH, PATCH, side // PATCH, PATCH)
    flat = grid.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 3 * PATCH**2)
    return (flat - flat.mean(dim=2, keepdim=True)) / (flat.var(dim=2, keepdim=True) + FLAT).sqrt()


class EncoderLearner:
    """An encoder in training. Hospitals use it instead of `training.Learner`."""

    def __init__(self, model: MaskedAutoencoder, lr: float, weight_decay: float, hidden: float = HIDDEN):
        self.model, self.lr, self.step_count = model, lr, 0
        self.visible = max(1, round((1 - hidden) * model.places.shape[1]))
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr, weight_decay=weight_decay, betas=BETAS, fused=True
        )
        self.after_step: Callable[[], None] = lambda: None

    def set_rate(self, scale: float) -> None:
        """Set the learning rate to this share of `lr`."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * scale

    def train_epoch(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        before_step: Callable[[int], bool] = lambda _: True,
        progress: tqdm | None = None,
    ) -> EpochResult:
        """One pass over batches of `UnlabelledBatches`. `before_step` gets the number of the step and ends the pass by
        returning False. Raises MedFLError on a loss that is not finite."""
        self.model.train()
        device, losses = next(self.model.parameters()).device, []
        for images, order in batches:
            if not before_step(self.step_count):
                break
            loss = self.model(images.to(device), order.to(device), self.visible)
            if not math.isfinite(loss.item()):
                raise MedFLError(f"the loss is {loss.item()}; lower --lr (now {self.lr}) and start again")
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.after_step()
            self.step_count += 1
            losses.append(loss.item())
            if progress is not None:
                progress.update()
        return EpochResult(sum(losses) / max(len(losses), 1), math.nan, len(losses))


Reads = Callable[[str, Path], bool]  # whether a volume of this name, in this folder, is read


def of_training(split: Split, unmasked: bool = True) -> Reads:
    """The rule for the volumes of a split that an encoder may read: those of the training patients and, if `unmasked`,
    scans in without_masks/. It excludes validation and test patients, and other studies of such patients."""
    others = (*split.val, *split.test)
    people = {_person(patient) for patient in others} - {None}

    def reads(volume: str, folder: Path) -> bool:
        if unmasked and UNMASKED in folder.parts:
            same = people & {_person(volume), _person(folder.name)}
            return not (same or any(_is_of(volume, folder, patient) for patient in others))
        theirs = [patient for patient in split.part("all") if _is_of(volume, folder, patient)]
        # site/anna also ends with the name of another patient, anna
        return max(theirs, key=len, default=None) in split.train

    return reads


def unlabelled_volumes(
    folder: Path, mask_suffix: str = MASK_SUFFIX, reads: Reads = lambda *_: True
) -> list[list[Path]]:
    """The slices of each volume below a folder, without masks, which are known by their names or their tree. Raises
    MedFLError if there is no slice."""
    inside = dict(walk(folder))
    files = pair((file for found in inside.values() for file in found), mask_suffix).images
    volumes = [slices for name, slices in group_volumes(files, inside) if reads(name, slices[0].parent)]
    if not volumes:
        raise MedFLError(f"there are no slices in {folder} to learn from; name another --data-dir")
    return volumes


class UnlabelledBatches:
    """An epoch's batches of slices without masks: images (B, 3, side, side) float32, augmented as in training, and
    (B, n) int64, each image's patches in a random order.

    All slices are in memory, as float16. All randomness comes from (seed, epoch).
    """

    def __init__(self, volumes: list[list[Path]], side: int, batch_size: int, seed: int):
        self.side, self.batch_size, self.seed = side, batch_size, seed
        prepared = []
        for slices in volumes:
            pixels = torch.from_numpy(read_volume(slices).copy())
            prepared.append(network_input(pixels, *volume_statistics(pixels), side).half())
        self._images = torch.cat(prepared)

    @property
    def slices(self) -> int:
        """Number of slices that the batches are drawn from."""
        return len(self._images)

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-self.slices // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches, with every slice once."""
        draw = np.random.default_rng([self.seed, epoch])
        random = torch.Generator().manual_seed(int(draw.integers(2**62)))
        for numbers in np.array_split(draw.permutation(self.slices), len(self)):
            images = self._images[torch.from_numpy(numbers)].float()
            images = augment(images, torch.zeros(len(images), 1, *images.shape[2:]), random)[0]
            yield (
                images,
                torch.rand(len(images), (self.side // PATCH) ** 2, generator=random).argsort(dim=1),
            )


def write_encoder(encoder: nn.Module, about: dict, path: Path) -> None:
    """Write an encoder's weights under timm's names, with `about` as the file's metadata; whole or not at all."""
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    with atomic_write(path) as file:
        file.write(save(state, {"medfl": json.dumps(about, allow_nan=False)}))


def _person(name: str) -> str | None:
    """The patient's pseudonym in the name of a prepared study (radiology/pseudonyms.py); None for other names."""
    found = STUDY.fullmatch(Path(name).name)
    return found[1] if found else None


def _is_of(volume: str, folder: Path, patient: str) -> bool:
    """Whether a volume belongs to a patient. The patient's name in a split is the end of the folder's path, or the
    volume's name in a flat tree."""
    names = Path(patient).parts
    return folder.parts[-len(names) :] == names or volume == patient
