"""How hard a cohort is: a threshold on FLAIR and an untrained model, compared with a trained one on the same test
patients.

    python benchmarks/phantom_difficulty.py --checkpoint models/demo/transunet_centralized_best.pth [--data-dir DIR]

The threshold is the best of 30 on normalised FLAIR. It is chosen on the test patients themselves, which flatters it,
and is still worse.
"""

import argparse
from pathlib import Path

import torch

from checkpoint import load_checkpoint
from common import run_script
from dataset import Dataset, load_dataset
from evaluation.metrics import counts, dice, summarise
from evaluation.scoring import score_patients
from preprocessing import apply_statistics
from split import load_split
from transunet import TransUNet


def best_threshold(dataset: Dataset, patients: tuple[str, ...]) -> tuple[float, float]:
    """The threshold on normalised FLAIR with the highest mean volume Dice, and that Dice."""
    means = {}
    for threshold in [-1 + 0.15 * step for step in range(30)]:
        scores = []
        for patient in patients:
            volume, truth = dataset.volume(patient)
            flair = apply_statistics(torch.from_numpy(volume.copy()), *dataset.statistics(patient))[:, 1]
            scores.append(dice(*counts(flair.numpy() >= threshold, truth)))
        means[threshold] = sum(scores) / len(scores)
    best = max(means, key=lambda threshold: means[threshold])
    return best, means[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a trained model, its split.json beside it"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/phantoms"), help="the dataset (default data/phantoms)"
    )
    arguments = parser.parse_args()
    dataset, trained = load_dataset(arguments.data_dir), load_checkpoint(arguments.checkpoint)
    patients = load_split(arguments.checkpoint.parent / "split.json", {p.name for p in dataset.patients}).test
    torch.manual_seed(0)
    untrained = TransUNet(trained.model.name, trained.model.image_side, trained.model.norm)
    threshold, score = best_threshold(dataset, patients)
    print(f"{dataset.name}, {len(patients)} test patients, mean volume Dice")
    print(f"  FLAIR at or above {threshold:.2f} deviations  {score:.3f}")
    for name, model in (("untrained model", untrained), ("trained model", trained.model)):
        rows = score_patients(model, dataset, patients, trained.threshold)
        print(f"  {name:32}{summarise(rows)['volume_dice']['mean']:.3f}")


if __name__ == "__main__":
    run_script(main)
