"""The network: a TransUNet (Chen et al. 2021, arXiv:2102.04306), a ViT encoder and a CNN decoder with skip
connections.

image (B, 3, h, w) -> skips at 1/2, 1/4, 1/8 and ViT tokens at 1/16 -> decoder -> logits (B, classes, h, w)

The background's logit is always 0, so one class is a sigmoid, and several are a softmax in which each pixel has one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torchvision_operators  # noqa: F401  must come before timm

# isort: split
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from borders.limits import MAX_NETWORK_SIDE
from common import MedFLError
from storage.torch_file import read_torch_file, refuse_pointer

GROUPS = 8  # of a GroupNorm; every width below is divisible by it
UPSCALE = 2  # from the decoder's last block to the logits
PATCH = 16  # pixels, side of the encoder's patches; an image side is a multiple of it


@dataclass(frozen=True)
class Architecture:
    """The parts of a named model.

    pyramid: widths of the convolution pyramid at 1/2, 1/4, 1/8, 1/16, or None where the encoder's own ResNet gives
    the skips. decoder: widths at 1/8, 1/4, 1/2. size: the encoder's size where it differs from timm's; there are no
    pretrained weights for it.
    """

    encoder: str
    pyramid: tuple[int, int, int, int] | None
    decoder: tuple[int, int, int]
    size: dict[str, Any] | None = None


ARCHITECTURES = {
    "mini": Architecture(
        "vit_tiny_patch16_224", (8, 16, 24, 48), (48, 24, 16), {"embed_dim": 96, "depth": 4, "num_heads": 3}
    ),
    "tiny": Architecture("vit_tiny_patch16_224", (16, 32, 64, 128), (96, 48, 24)),
    "small": Architecture("vit_small_patch16_224", (24, 48, 96, 192), (128, 64, 32)),
    "base": Architecture("vit_base_r50_s16_224", None, (256, 128, 64)),
}
RESNET_SKIPS = (64, 256, 512, 1024)  # channels of R50's stem and first three stages, at 1/2, 1/4, 1/8, 1/16


def normalisation(kind: str, channels: int) -> nn.Module:
    """The layer that "batch" or "group" names. GroupNorm keeps no statistics of the data, BatchNorm does."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(GROUPS, channels)


def convolution(inputs: int, outputs: int, norm: str, stride: int = 1) -> nn.Sequential:
    """3×3 convolution, normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), normalisation(norm, outputs), nn.ReLU()
    )


class Pyramid(nn.Module):
    """The light convolution path beside the ViT: (B, 3, h, w) to features at 1/2, 1/4, 1/8 and 1/16."""

    def __init__(self, widths: tuple[int, int, int, int], norm: str):
        super().__init__()
        inputs = (3, *widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(convolution(i, o, norm, stride=2), convolution(o, o, norm))
            for i, o in zip(inputs, widths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)  # half the side each time
            features.append(x)
        return features


class DecoderBlock(nn.Module):
    """Doubles the side and joins the skip of that side: (B, inputs, h, w) to (B, outputs, 2h, 2w)."""

    def __init__(self, inputs: int, skip: int, outputs: int, norm: str):
        super().__init__()
        self.convolutions = nn.Sequential(
            convolution(inputs + skip, outputs, norm), convolution(outputs, outputs, norm)
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)  # (B, inputs, 2h, 2w)
        return self.convolutions(torch.cat([x, skip], dim=1))  # (B, outputs, 2h, 2w)


class TransUNet(nn.Module):
    """A named model for square images of one side.

    name: "mini" (for phantoms and first tries), "tiny" (ViT-Ti/16), "small" (ViT-S/16), "base" (R50 + ViT-B/16,
    the paper's); image_side: pixels, a multiple of 16; norm: "batch" or "group", of pyramid and decoder;
    encoder_weights: a file with the encoder's weights under timm's names; random weights if None; classes: that are
    outlined, each by itself. Raises MedFLError for an unknown name, side or weights file.
    """

    def __init__(
        self,
        name: str = "tiny",
        image_side: int = 128,
        norm: str = "batch",
        encoder_weights: Path | str | None = None,
        classes: int = 1,
    ):
        super().__init__()
        self.temperature = 1.0  # logits are divided by it before they become probabilities
        if name not in ARCHITECTURES:
            raise MedFLError(f"there is no model {name}; choose one of {', '.join(ARCHITECTURES)}")
        if not PATCH <= image_side <= MAX_NETWORK_SIDE or image_side % PATCH:
            raise MedFLError(
                f"an image side of {image_side} can't be cut into patches of {PATCH}; choose a multiple of "
                f"{PATCH} up to {MAX_NETWORK_SIDE}"
            )
        if norm not in ("batch", "group"):
            raise MedFLError(f"there is no normalisation {norm}; choose batch or group")
        plan = ARCHITECTURES[name]
        self.name, self.image_side, self.norm, self.classes = name, image_side, norm, classes
        self.encoder = _encoder(plan, image_side)
        if encoder_weights is not None:
            _load_encoder(self.encoder, Path(encoder_weights))
        self.pyramid = Pyramid(plan.pyramid, norm) if plan.pyramid else None
        *skips, deepest = plan.pyramid or RESNET_SKIPS
        inputs = (self.encoder.embed_dim + deepest, *plan.decoder[:-1])
        self.decoder = nn.ModuleList(
            DecoderBlock(i, s, o, norm) for i, s, o in zip(inputs, reversed(skips), plan.decoder)
        )
        self.head = nn.Conv2d(plan.decoder[-1], classes * UPSCALE**2, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, side, side) float32, normalised, to logits (B, classes, side, side)."""
        if self.pyramid:
            features = self.pyramid(images)
            tokens = self.encoder.forward_features(images)  # (B, 1 + n, d)
        else:
            features, tokens = self._hybrid(images)
        *skips, deepest = features
        x = torch.cat([self._as_map(tokens, deepest), deepest], dim=1)  # (B, d + c, side/16, side/16)
        for block, skip in zip(self.decoder, reversed(skips)):
            x = block(x, skip)  # side/8, side/4, side/2
        # Each position gives its own 2×2 logits (Shi et al. 2016, arXiv:1609.05158). This is finer than
        # stretching one logit, and costs nothing
        return F.pixel_shuffle(
            self.head(x), UPSCALE
        )  # (B, 4 classes, side/2, side/2) to (B, classes, side, side)

    def _as_map(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Tokens (B, 1 + n, d) as a map (B, d, h, w), the class token left out."""
        patches = tokens[:, self.encoder.num_prefix_tokens :]  # (B, n, d)
        return patches.transpose(1, 2).reshape(len(patches), -1, *like.shape[-2:])

    def _hybrid(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The R50's features at 1/2, 1/4, 1/8, 1/16 and the tokens (B, 1 + n, d) that the ViT makes from the
        last."""
        vit = self.encoder
        resnet = cast(ResNetV2, vit.patch_embed.backbone)
        x = resnet.stem[:-1](images)  # (B, 64, side/2, side/2), before the stem's pooling
        features = [x]
        x = resnet.stem[-1](x)  # (B, 64, side/4, side/4)
        for stage in resnet.stages:
            x = stage(x)  # side/4, side/8, side/16
            features.append(x)
        tokens = vit.patch_embed.proj(resnet.norm(x)).flatten(2).transpose(1, 2)  # (B, n, d)
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(tokens)))  # (B, 1 + n, d)
        return features, vit.norm(vit.blocks(tokens))

    def set_encoder_trainable(self, trainable: bool) -> None:
        """Freeze or unfreeze the ViT (and its ResNet)."""
        self.encoder.requires_grad_(trainable)


def _encoder(plan: Architecture, side: int) -> VisionTransformer:
    """timm's ViT without its classifier, with random weights."""
    return cast(
        VisionTransformer,
        timm.create_model(plan.encoder, pretrained=False, img_size=side, num_classes=0, **(plan.size or {})),
    )


def _load_encoder(encoder: VisionTransformer, path: Path) -> None:
    """Load weights under timm's names (.safetensors or .pth). Position embeddings are resampled to the encoder's
    side."""
    try:
        refuse_pointer(path)
        state = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
        state = checkpoint_filter_fn(state, encoder)
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        encoder.load_state_dict(state)
    except FileNotFoundError as error:
        raise MedFLError(f"there is no weights file {path}; check --encoder") from error
    except MedFLError:
        raise
    except Exception as error:  # pickle, safetensors and timm each raise their own kinds for a foreign file
        raise MedFLError(
            f"{path} does not hold this encoder's weights; take the file of the same timm model"
        ) from error
