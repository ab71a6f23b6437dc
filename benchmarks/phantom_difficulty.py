"""How hard a cohort is: a threshold on FLAIR and an untrained model beside a trained one, on the same test patients.

    python benchmarks/phantom_difficulty.py --checkpoint models/demo/transunet_centralized_best.pth --data-dir data/phantoms

The threshold is the best of 30 on normalised FLAIR, chosen on the test patients themselves: flattered, and still worse.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse  # noqa: E402

import torch  # noqa: E402

from checkpoint import load_checkpoint  # noqa: E402
from common import run_script  # noqa: E402
from dataset import Dataset, load_dataset  # noqa: E402
from metrics import counts, dice, summarise  # noqa: E402
from preprocessing import apply_statistics  # noqa: E402
from split import load_split  # noqa: E402
from training import score_patients  # noqa: E402
from transunet import TransUNet  # noqa: E402


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
    best = max(means, key=means.get)
    return best, means[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a trained model, its split.json beside it")
    parser.add_argument("--data-dir", type=Path, default=Path("data/phantoms"), help="the dataset (default data/phantoms)")
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
