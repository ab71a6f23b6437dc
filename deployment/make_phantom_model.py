"""Make the model that a fresh clone shows: `mini`, trained only on phantoms, under 3 MB.

    python deployment/make_phantom_model.py

It takes a few minutes on one core. The model knows painted patients and no real ones: its card says so, and
the first model in models/ replaces it.
"""

import shutil
import tempfile
from pathlib import Path

import torch

from checkpoint import load_checkpoint, update_metadata
from common import run_script
from dataset import load_dataset
from evaluation.failures import failures, without_sizes
from evaluation.metrics import summarise
from evaluation.scoring import score_patients
from phantoms.patients import make_phantoms
from runs.central import CentralTraining
from runs.models import PHANTOM_MODEL
from split import make_split
from training import TrainingSettings

PATIENTS, SLICES, SIZE, SEED = 32, 16, 256, 2027  # seed of phantoms that are not among the samples
SETTINGS = TrainingSettings(model="mini", encoder="random", image_size=96, steps=600, precision="float32")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_phantoms(Path(folder), patients=PATIENTS, slices=SLICES, size=SIZE, seed=SEED)
        dataset = load_dataset(Path(folder))
        split = make_split({p.name: p.site for p in dataset.patients}, SETTINGS.seed)
        training = CentralTraining(dataset, split, SETTINGS, torch.device("cpu"), Path(folder) / "models")
        training.run()
        best = load_checkpoint(training.best)
        rows = score_patients(best.model, dataset, split.test, best.threshold, closely=True)
        test = {**summarise(rows), **without_sizes(failures(rows)), "patients": len(rows), "sites": {}}
        update_metadata(training.best, scores={**best.metadata["scores"], "test": test})
        shutil.copyfile(training.best, PHANTOM_MODEL)
    size = PHANTOM_MODEL.stat().st_size / 1e6
    print(f"wrote {PHANTOM_MODEL}, {size:.1f} MB, test {test['volume_dice']['mean']:.3f}")


if __name__ == "__main__":
    run_script(main)
