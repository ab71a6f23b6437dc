"""The benefit of pretraining on scans without masks, with all, half and a quarter of the training patients' masks.

    python benchmarks/pretraining.py --data-dir data --seeds 0 1 2 --steps 2000 --pretrain-epochs 200

For each seed, an encoder is pretrained on the slices of all training patients. Then, on each share of the patients, one
model is trained from this encoder and one from random weights. Both are tested on the same patients; differences are
paired, and a patient of several seeds counts once, with the mean. An interrupted run continues. Writes table.json.
"""

import argparse
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import run_script
from cross_validate import fold_rows
from dataset import load_dataset
from encoders.autoencoder import (
    MaskedAutoencoder,
    UnlabelledBatches,
    of_training,
    unlabelled_volumes,
    write_encoder,
)
from evaluation.metrics import mean_interval, paired_difference
from pretrain import PretrainingSettings, pretrained_by_epochs
from runs.usage import choose_device
from split import Split, make_split
from storage.files import write_json
from training import TrainingSettings

RANDOM, PRETRAINED = "random", "pretrained here"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder with the scans")
    parser.add_argument(
        "--out", type=Path, default=Path("models/pretraining"), help="folder for the output files"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of split and weights")
    parser.add_argument("--steps", type=int, default=2_000, help="steps of each training (default 2000)")
    parser.add_argument("--pretrain-epochs", type=int, default=200, help="passes without masks (default 200)")
    parser.add_argument("--model", default="tiny", choices=("mini", "tiny", "small"), help="(default tiny)")
    parser.add_argument("--image-size", type=int, default=128, help="pixels (default 128)")
    parser.add_argument(
        "--test-fraction", type=float, default=0.4, help="share of the patients (default 0.4)"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[1.0, 0.5, 0.25],
        help="shares of the training patients whose masks are used (default 1 0.5 0.25)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    return parser.parse_args()


def with_masks(split: Split, share: float) -> Split:
    """The split with a share of its training patients: the first ones after a shuffle by its seed."""
    shuffled = np.random.default_rng(split.seed).permutation(list(split.train))
    kept = max(1, round(share * len(shuffled)))
    return replace(split, train=tuple(sorted(str(name) for name in shuffled[:kept])))


def pretrained(arguments: argparse.Namespace, root: Path, split: Split, device: torch.device) -> Path:
    """The file of an encoder that learnt from all training patients' slices; made if it does not exist."""
    path = arguments.out / f"encoder_{split.seed}.safetensors"
    if path.exists():
        return path
    settings = PretrainingSettings(
        arguments.model, arguments.image_size, arguments.pretrain_epochs, seed=split.seed
    )
    torch.manual_seed(split.seed)
    model = MaskedAutoencoder(settings.model, settings.image_size).to(device)
    volumes = unlabelled_volumes(root, reads=of_training(split, unmasked=False))
    batches = UnlabelledBatches(volumes, settings.image_size, settings.batch_size, settings.seed)
    loss = math.nan
    for epoch, loss in enumerate(pretrained_by_epochs(model, batches, settings), 1):
        print(f"pretraining, seed {split.seed}, epoch {epoch}: loss {loss:.4f}", flush=True)
    write_encoder(model.encoder, {"loss": loss, "split_sha256": split.sha256()}, path)
    return path


def by_patient(runs: list[list[dict]]) -> list[dict]:
    """Each patient once, with the mean Dice over the runs."""
    dice: defaultdict[str, list[float]] = defaultdict(list)
    for row in (row for rows in runs for row in rows):
        dice[row["patient"]].append(row["dice"])
    return [{"patient": name, "dice": float(np.mean(values))} for name, values in sorted(dice.items())]


def main() -> None:
    arguments = parse()
    dataset, device = load_dataset(arguments.data_dir), choose_device(arguments.device)
    sites = {patient.name: patient.site for patient in dataset.patients}
    runs: defaultdict[tuple[float, str], list[list[dict]]] = defaultdict(list)
    for seed in arguments.seeds:
        split = make_split(sites, seed, test_fraction=arguments.test_fraction)
        encoder = pretrained(arguments, dataset.root, split, device)
        for share in arguments.shares:
            for start, source in ((RANDOM, "random"), (PRETRAINED, str(encoder))):
                settings = TrainingSettings(
                    model=arguments.model,
                    image_size=arguments.image_size,
                    steps=arguments.steps,
                    encoder=source,
                    seed=seed,
                )
                out = arguments.out / f"seed_{seed}_{share:g}_{start.split()[0]}"
                print(f"seed {seed}, {share:.0%} of the masks, {start}", flush=True)
                runs[share, start].append(fold_rows(dataset, with_masks(split, share), settings, device, out))
    table: list[dict] = []
    for share in arguments.shares:
        rows = {start: by_patient(runs[share, start]) for start in (RANDOM, PRETRAINED)}
        for start, of in rows.items():
            dice = [row["dice"] for row in of]
            table.append(
                {
                    "masks": share,
                    "start": start,
                    "mean": float(np.mean(dice)),
                    "median": float(np.median(dice)),
                    "ci95": mean_interval(dice),
                    "patients": len(dice),
                    "difference": paired_difference(rows[RANDOM], of),
                }
            )
    write_json(arguments.out / "table.json", table)
    for row in table:
        difference, interval = row["difference"], row["difference"]["ci95"]
        between = f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else ""
        print(
            f"{row['masks']:>5.0%} of the masks, {row['start']:16} mean {row['mean']:.3f} median {row['median']:.3f}  "
            f"to random {difference['mean']:+.3f}{between}, {row['patients']} patients"
        )


if __name__ == "__main__":
    run_script(main)
