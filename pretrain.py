"""Train an encoder on slices without masks, and write a file for `--encoder FILE`.

    python pretrain.py --data-dir data --split-file models/split.json --out models/encoder.safetensors
    python train_centralized.py --data-dir data --encoder models/encoder.safetensors

Any folder of slices will do: the download, phantoms, or the output of data/prepare_hospital.py, without_masks/ as well.
With --split-file only its training patients and scans in without_masks/ are read, because an encoder must not learn
from test patients. Hospitals do the same together with `run_server.py --pretraining`. The file holds the encoder's
weights under timm's names; its metadata says how they were made.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common import (
    MedFLError,
    __version__,
    add_settings,
    counted,
    run_script,
    setting,
    settings_from,
    typed,
    utc_now,
)
from dataset import add_mask_option
from encoders.autoencoder import (
    HIDDEN,
    EncoderLearner,
    MaskedAutoencoder,
    UnlabelledBatches,
    of_training,
    unlabelled_volumes,
    write_encoder,
)
from runs.usage import choose_device
from scans.folders import walk
from scans.naming import is_image, volume_name
from split import load_split
from training import rate_scale


@dataclass(frozen=True)
class PretrainingSettings:
    """All settings that decide how an encoder is pretrained. The defaults are defined only here."""

    model: str = setting("tiny", "network whose encoder is trained", ("mini", "tiny", "small"))
    image_size: int = setting(128, "side of the network's input in pixels, a multiple of 16")
    epochs: int = setting(100, "passes over the slices")
    batch_size: int = setting(64, "slices per step")
    lr: float = setting(1e-3, "learning rate")
    weight_decay: float = setting(0.05, "AdamW's weight decay")
    warmup: float = setting(0.1, "share of the run in which the learning rate rises to --lr, 0 to 0.5")
    hidden: float = setting(HIDDEN, "share of the patches that are hidden")
    seed: int = setting(0, "seed of weights, order, augmentation and hidden patches")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise MedFLError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; choose a number above 0"
                )
        if not 0 < self.hidden < 1:
            raise MedFLError(f"--hidden is {self.hidden}; choose a share between 0 and 1")
        if not 0 <= self.warmup <= 0.5:
            raise MedFLError(f"--warmup is {self.warmup}; choose a share of the run from 0 to 0.5")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of slices (default data)")
    parser.add_argument(
        "--split-file",
        type=Path,
        help="read only the training patients of this split.json, and without_masks/",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("models/encoder.safetensors"),
        help="the file to write (default models/encoder.safetensors)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    add_settings(parser, PretrainingSettings)
    add_mask_option(parser)
    return parser.parse_args()


def pretrained_by_epochs(
    model: MaskedAutoencoder, batches: UnlabelledBatches, settings: PretrainingSettings
) -> Iterator[float]:
    """Train a model's encoder with these settings. Yields the mean loss of each pass over the slices."""
    learner = EncoderLearner(model, settings.lr, settings.weight_decay, settings.hidden)
    steps = settings.epochs * len(batches)

    def set_rate(step: int) -> bool:
        learner.set_rate(rate_scale(step / steps, settings.warmup))
        return True

    for epoch in range(1, settings.epochs + 1):
        with tqdm(total=len(batches), leave=False, disable=None) as bar:
            yield learner.train_epoch(batches.epoch(epoch), set_rate, bar).loss


def _names_below(folder: Path, mask_suffix: str) -> set[str]:
    """The names that patients in a folder may have: the end of a path, or the name before the slice number."""
    names: set[str] = set()
    for place, files in walk(folder):
        parts = place.relative_to(folder).parts
        names |= {"/".join(parts[k:]) for k in range(len(parts))}
        names |= {volume_name(file) for file in files if is_image(file, mask_suffix)}
    return names


def main() -> None:
    arguments = parse()
    settings, device = settings_from(arguments, PretrainingSettings), choose_device(arguments.device)
    if arguments.out.suffix != ".safetensors":
        raise MedFLError(f"{arguments.out} is written as .safetensors; choose a name with that ending")
    if not arguments.data_dir.is_dir():
        raise MedFLError(f"there is no folder {arguments.data_dir}; name another --data-dir")
    torch.manual_seed(settings.seed)
    model = MaskedAutoencoder(settings.model, settings.image_size).to(device)
    split = None
    if arguments.split_file:
        split = load_split(arguments.split_file, _names_below(arguments.data_dir, arguments.mask_suffix))
    reads = of_training(split) if split else lambda *_: True
    volumes = unlabelled_volumes(arguments.data_dir, arguments.mask_suffix, reads)
    batches = UnlabelledBatches(volumes, settings.image_size, settings.batch_size, settings.seed)
    print(
        f"{settings.model} at {settings.image_size} pixels, {device.type}: {counted(batches.slices, 'slice')} of "
        f"{counted(len(volumes), 'volume')}, no masks"
    )
    for epoch, loss in enumerate(pretrained_by_epochs(model, batches, settings), 1):
        about = {
            "medfl": __version__,
            "method": "masked autoencoding",
            "settings": asdict(settings),
            "epochs_done": epoch,
            "loss": loss,
            "slices": batches.slices,
            "volumes": len(volumes),
            "split_sha256": split and split.sha256(),
            "created": utc_now(),
        }
        write_encoder(model.encoder, about, arguments.out)
        print(f"epoch {epoch:3d}  loss {loss:.4f}", flush=True)
    print(f"wrote {arguments.out}")
    print(
        f"next: python train_centralized.py --data-dir {typed(arguments.data_dir)} --encoder {typed(arguments.out)} "
        "--out models/pretrained"
    )


if __name__ == "__main__":
    run_script(main)
