"""The one training loop: the settings, the loss, what a step and an epoch do, and how a model is scored."""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torchvision_operators  # noqa: F401  must come before timm

# isort: split
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from common import MedFLError, setting
from tasks import MOST_CLASSES
from transunet import ARCHITECTURES, TransUNet

FINAL_RATE = 0.01  # of the learning rate, at the end of the cosine


@dataclass(frozen=True)
class TrainingSettings:
    """All settings that decide how a model is trained. The defaults are defined only here."""

    model: str = setting("tiny", "network: mini (for first tries), tiny, small or base", tuple(ARCHITECTURES))
    image_size: int = setting(128, "side of the network's input in pixels, a multiple of 16")
    norm: str = setting("batch", "normalisation of the convolutions", ("batch", "group"))
    classes: int = setting(
        1, "classes of the task that are outlined, each by itself; 1 outlines its region as a whole"
    )
    encoder: str = setting(
        "pretrained",
        "what the encoder starts with: pretrained (timm's ImageNet weights, from the cache or the network; random "
        "weights where neither has them), random, or a file with weights under timm's names",
    )
    epochs: int = setting(30, "passes over the training slices")
    minutes: float | None = setting(
        None,
        "train for this many minutes of wall clock instead of --epochs, with a fitted schedule",
        kind=float,
    )
    steps: int | None = setting(
        None, "train for this many steps instead of --epochs, with a fitted schedule", kind=int
    )
    batch_size: int = setting(16, "slices per step")
    lr: float = setting(1e-3, "learning rate of decoder and pyramid")
    encoder_lr_factor: float | None = setting(
        None,
        "learning rate of the encoder, as a factor of --lr; none means 0.1 for loaded weights, 1 for random ones",
        kind=float,
    )
    weight_decay: float = setting(0.05, "AdamW's weight decay")
    schedule: str = setting(
        "cosine", "warm-up and cosine, or halving on a plateau of the validation Dice", ("cosine", "plateau")
    )
    warmup: float = setting(0.05, "share of the run in which the learning rate rises to --lr, 0 to 0.5")
    freeze_encoder_epochs: int | None = setting(
        None,
        "number of first epochs with a frozen encoder; none means 3 for loaded weights, 0 for random ones",
        kind=int,
    )
    clip: float = setting(1.0, "largest norm of a step's gradient")
    ema_decay: float = setting(
        0.999, "weight of the past in the averaged weights, ramped up; 0 turns averaging off"
    )
    patience: int = setting(0, "stop after this many epochs without a better validation Dice; 0 never stops")
    precision: str = setting(
        "auto", "auto uses bfloat16 where the chip is faster with it", ("auto", "float32", "bfloat16")
    )
    seed: int = setting(0, "seed of weights, order and augmentation")

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "lr", "clip") + tuple(
            name for name in ("minutes", "steps", "encoder_lr_factor") if getattr(self, name) is not None
        )
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise MedFLError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; choose a number above 0"
                )
        for name in ("weight_decay", "freeze_encoder_epochs", "patience", "seed"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise MedFLError(f"--{name.replace('_', '-')} is {getattr(self, name)}; choose 0 or more")
        if not 1 <= self.classes <= MOST_CLASSES:
            raise MedFLError(f"--classes is {self.classes}; choose a number from 1 to {MOST_CLASSES}")
        if self.seed >= 2**63:
            raise MedFLError(f"--seed is {self.seed}; choose a number below 2**63, the limit of torch")
        if self.minutes is not None and self.steps is not None:
            raise MedFLError("--minutes and --steps both say how long to train; give one of them")
        if self.norm == "batch" and self.batch_size == 1 and self.image_size == 16:
            raise MedFLError(
                "--norm batch needs more than one value per channel, but one slice of 16 pixels leaves one; take "
                "--batch-size 2, --image-size 32 or --norm group"
            )
        if not 0 <= self.warmup <= 0.5:  # above, the run would end before it reached its learning rate
            raise MedFLError(f"--warmup is {self.warmup}; choose a share of the run from 0 to 0.5")
        if not 0 <= self.ema_decay < 1:
            raise MedFLError(f"--ema-decay is {self.ema_decay}; choose a number from 0 to below 1")

    def network(self, encoder_weights: Path | None = None) -> TransUNet:
        """A new network of this kind, from random weights but for those of an encoder's file."""
        return TransUNet(self.model, self.image_size, self.norm, encoder_weights, self.classes)

    @property
    def encoder_rate(self) -> float:
        """Learning rate of the encoder."""
        return self.lr * (1.0 if self.encoder_lr_factor is None else self.encoder_lr_factor)

    @property
    def frozen_epochs(self) -> int:
        """First epochs, or rounds, in which the encoder keeps its weights."""
        return self.freeze_encoder_epochs or 0


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products. "auto": bfloat16 on a GPU or a CPU with matrix units for it (AMX),
    else float32.

    torch is asked what the processor reports. Measured for `tiny` at 128 pixels: with AVX512-BF16 but no AMX,
    bfloat16 trains at 0.6 times the speed of float32; with neither, a matrix product takes 170 times as long.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return (
        torch.bfloat16
        if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
        else torch.float32
    )


def rate_scale(progress: float, warmup: float) -> float:
    """Share of the learning rate when a share `progress` of the run is over, 0 to 1: a cosine from 1 to
    FINAL_RATE, times a linear rise from FINAL_RATE to 1 over the first `warmup` of the run.

    It depends on nothing but how far the run is, so in a federation it is the same at every hospital.
    """
    progress = min(progress, 1.0)
    cosine = FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2
    rise = min(1.0, progress / warmup) if warmup else 1.0
    return cosine * (FINAL_RATE + (1 - FINAL_RATE) * rise)


def plateau(optimiser: torch.optim.Optimizer) -> ReduceLROnPlateau:
    """The scheduler that halves an optimiser's learning rates when the validation Dice stops rising."""
    return ReduceLROnPlateau(optimiser, mode="max", factor=0.5, patience=3)


def parameter_groups(model: TransUNet, settings: TrainingSettings) -> list[dict]:
    """AdamW's groups, each with its learning rate: decoder and pyramid, then encoder, each split into weights
    with and without decay. As in timm, biases, normalisation layers, position embeddings and the class token
    don't decay."""
    encoder = {id(weight) for weight in model.encoder.parameters()}
    still = {f"encoder.{name}" for name in model.encoder.no_weight_decay()}
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=still)
    return [
        {
            "params": [weight for weight in group["params"] if (id(weight) in encoder) == inside],
            "weight_decay": group["weight_decay"],
            "lr": settings.encoder_rate if inside else settings.lr,
        }
        for inside in (False, True)
        for group in groups
    ]


def averaging_weight(decay: float, count: float) -> float:
    """Weight of the past in averaged weights after `count` updates. It is ramped up to `decay`, so that the first
    weights are forgotten."""
    return min(decay, (1 + count) / (10 + count))


def shares_and_entropy(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of each class, (B, classes, h, w), and the cross-entropy summed over all pixels, a scalar, of
    logits and masks (B, classes, h, w). What the masks leave is background."""
    if logits.shape[1] == 1:
        return logits.sigmoid(), F.binary_cross_entropy_with_logits(logits, masks, reduction="sum")
    logs = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1).log_softmax(dim=1)
    targets = torch.cat([1 - masks.sum(dim=1, keepdim=True), masks], dim=1)
    return logs[:, 1:].exp(), -(targets * logs).sum()


def segmentation_loss(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (cross-entropy + 1 - soft Dice) and soft Dice, scalars, of logits and masks (B, classes, h, w).

    The soft Dice of a class pools over the batch (Milletari et al. 2016, arXiv:1606.04797), because an empty slice has
    no Dice of its own; the mean over the classes counts.
    """
    shares, entropy = shares_and_entropy(logits, masks)
    over = (0, 2, 3)
    dice = ((2 * (shares * masks).sum(over) + 1) / (shares.sum(over) + masks.sum(over) + 1)).mean()
    return entropy / masks[:, 0].numel() + 1 - dice, dice


@dataclass
class EpochResult:
    """Means over the epoch's steps."""

    loss: float
    dice: float
    steps: int


class Learner:
    """A model in training: weights, averaged weights, optimiser, and the step. The federation's hospitals use
    it as well."""

    def __init__(self, model: TransUNet, settings: TrainingSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.precision = choose_precision(settings.precision, device)
        self.model: TransUNet = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave memory_format out
        # several processes replace the network and the loss by their own (runs/data_parallel.py)
        self.network: nn.Module = self.model
        self.loss = segmentation_loss
        self.average = (
            AveragedModel(self.model, multi_avg_fn=self._average, use_buffers=True)
            if settings.ema_decay
            else None
        )
        groups = parameter_groups(model, settings)
        self.rates = [group["lr"] for group in groups]
        self.optimiser = torch.optim.AdamW(groups, fused=True)
        self.step_count = 0
        self.after_step: Callable[[], None] = lambda: None

    @property
    def weights_model(self) -> TransUNet:
        """The model that is scored and saved: with averaged weights, if there are any."""
        return cast(TransUNet, self.average.module) if self.average else self.model

    def _average(
        self,
        averaged: tuple[Tensor, ...] | list[Tensor],
        current: tuple[Tensor, ...] | list[Tensor],
        count: Tensor | int,
    ) -> None:
        """Exponential moving average whose memory grows with the steps; torch calls this for the tensors of
        each dtype. One call updates all of them: one by one, they would take a good part of a step on a GPU."""
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(
                averaged, current, 1 - averaging_weight(self.settings.ema_decay, float(count))
            )
        else:
            torch._foreach_copy_(averaged, current)  # BatchNorm's counter

    def set_rate(self, scale: float) -> None:
        """Set the learning rates to this share of those in the settings."""
        for group, rate in zip(self.optimiser.param_groups, self.rates):
            group["lr"] = rate * scale

    def train_epoch(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        before_step: Callable[[int], bool] = lambda _: True,
        progress: tqdm | None = None,
    ) -> EpochResult:
        """One pass over batches of (images, masks). `before_step` gets the number of the step and ends the pass by
        returning False.

        Raises MedFLError on a loss that is not finite.
        """
        self.model.train()
        loss_sum = dice_sum = 0.0
        steps = 0
        for images, masks in batches:
            if not before_step(self.step_count):
                break
            loss, dice = self._step(images, masks)
            loss_sum, dice_sum, steps = loss_sum + loss, dice_sum + dice, steps + 1
            if progress is not None:
                progress.update()
                progress.set_postfix(
                    loss=f"{loss_sum / steps:.3f}", dice=f"{dice_sum / steps:.3f}", refresh=False
                )
        return EpochResult(loss_sum / max(steps, 1), dice_sum / max(steps, 1), steps)

    def loss_of(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and soft Dice, scalars, of a batch as it comes from `TrainingBatches`."""
        images = images.to(self.device, memory_format=torch.channels_last)
        mixed: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.precision != torch.float32:
            mixed = torch.autocast(self.device.type, self.precision)
        with mixed:
            logits = self.network(images)
        return self.loss(logits.float(), masks.to(self.device))

    def set_gradients(self, images: Tensor, masks: Tensor) -> tuple[float, float]:
        """Set every weight's gradient. Returns loss and soft Dice of the batch."""
        loss, dice = self.loss_of(images, masks)
        if not math.isfinite(loss.item()):
            raise MedFLError(
                f"the loss is {loss.item()} at step {self.step_count + 1}, which would make the weights "
                f"worthless; lower --lr (now {self.settings.lr}) and start again"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        return loss.item(), dice.item()

    def _step(self, images: Tensor, masks: Tensor) -> tuple[float, float]:
        loss, dice = self.set_gradients(images, masks)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimiser.step()
        self.after_step()
        self.step_count += 1
        if self.average:
            self.average.update_parameters(self.model)
        return loss, dice

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs to continue bit for bit."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimiser": self.optimiser.state_dict(),
            "step_count": self.step_count,
            "precision": str(self.precision),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"])
        try:
            self.optimiser.load_state_dict(state["optimiser"])
        except ValueError as error:
            raise MedFLError(
                "the run was begun by an earlier MedFL, whose optimiser had other groups of weights, and "
                "can't continue bit for bit; start a new run, with --init to begin with its weights"
            ) from error
        self.step_count = state["step_count"]
        self.precision = getattr(torch, state["precision"].removeprefix("torch."))
