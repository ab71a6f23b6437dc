"""Does the federated path lose anything? Compares one hospital that holds everything with the same training without
messages.

    python benchmarks/federated_against_central.py [--data-dir data/phantoms] [--rounds 20] [--image-size 128]

Three trainings run for the same number of epochs from the same weights and are scored on the same test patients: a
federation of real processes with one hospital and one local epoch per round; the centralised loop with the hospital's
order of slices; and train_centralized.py, which has its own order. The first two should agree.
"""

import argparse
import subprocess
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from batches import TrainingBatches
from checkpoint import THRESHOLD, load_checkpoint
from common import ROOT, run_script
from dataset import Dataset, load_dataset
from evaluation.metrics import paired_difference, summarise
from evaluation.scoring import score_patients
from federation.runtime.processes import free_port
from split import Split, make_split
from training import Learner, TrainingSettings, rate_scale
from transunet import TransUNet

LAST = "transunet_{}_last.pth"


def run_federation(data_dir: Path, out: Path, options: list[str]) -> TransUNet:
    """The last model of one hospital and its server."""
    address = f"127.0.0.1:{free_port()}"
    hospital = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "run_client.py"),
            "--cid",
            "0",
            "--data-dir",
            str(data_dir),
            "--server",
            address,
        ],
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "run_server.py"),
            "--overwrite",
            "--clients",
            "1",
            "--address",
            address,
            "--out",
            str(out),
            *options,
        ],
        check=True,
    )
    hospital.wait()
    return load_checkpoint(out / LAST.format("federated")).model


def loop_of_a_hospital(dataset: Dataset, split: Split, settings: TrainingSettings) -> TransUNet:
    """The model after settings.epochs epochs with the hospital's order of slices."""
    torch.manual_seed(settings.seed)
    model = settings.network()
    seed = settings.seed * 1_000 + zlib.crc32(b"hospital-0") % 1_000
    batches = TrainingBatches(dataset, split.train, settings.image_size, settings.batch_size, seed)
    learner = Learner(model, replace(settings, ema_decay=0.0), torch.device("cpu"))

    def before_step(step: int) -> bool:
        learner.set_rate(rate_scale(step / (settings.epochs * len(batches)), settings.warmup))
        return True

    for epoch in range(settings.epochs):
        learner.train_epoch(batches.epoch(epoch + 1), before_step)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/phantoms"), help="a dataset (default data/phantoms)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds, or epochs (default 20)")
    parser.add_argument(
        "--image-size", type=int, default=128, help="side of the network's input in pixels (default 128)"
    )
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data_dir)
    split = make_split({p.name: p.site for p in dataset.patients}, 0)
    settings = TrainingSettings(image_size=arguments.image_size, epochs=arguments.rounds, ema_decay=0.0)
    options = ["--image-size", str(settings.image_size), "--ema-decay", "0", "--encoder", "random"]
    with tempfile.TemporaryDirectory(prefix="medfl-benchmark-") as folder:
        out, rounds = Path(folder), ["--rounds", str(arguments.rounds)]
        models = {
            "federation of one hospital": run_federation(arguments.data_dir, out, [*rounds, *options]),
            "loop with the hospital's order": loop_of_a_hospital(dataset, split, settings),
        }
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "train_centralized.py"),
                "--overwrite",
                "--data-dir",
                str(arguments.data_dir),
                "--out",
                folder,
                "--epochs",
                str(arguments.rounds),
                *options,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        models["train_centralized.py"] = load_checkpoint(out / LAST.format("centralized")).model
    rows = {name: score_patients(model, dataset, split.test, THRESHOLD) for name, model in models.items()}
    first = next(iter(rows))
    print(
        f"{dataset.name}, {arguments.rounds} epochs, {len(split.test)} test patients: mean volume Dice, "
        f"difference to the first"
    )
    for name in models:
        difference = paired_difference(rows[first], rows[name])
        print(f"  {name:30}{summarise(rows[name])['volume_dice']['mean']:.4f}  {difference['mean']:+.4f}")


if __name__ == "__main__":
    run_script(main)
