"""Training on a GPU: its precision, what it learns, and that its files are used on a machine without one.

Skipped aloud where there is no GPU.
"""

import pytest
import torch
from running import run_script

from batches import TrainingBatches
from benchmarks.local_federation import LocalHospital, run
from checkpoint import load_checkpoint
from dataset import load_dataset
from federation.protocol.settings import FederationSettings
from inference import predict_volume
from training import Learner, TrainingSettings, choose_precision
from transunet import TransUNet

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: training on CUDA is not tried"
)


def losses(phantoms, device: str, precision: str, steps: int) -> list[float]:
    """The losses of the first steps from the same weights and slices."""
    torch.manual_seed(0)
    settings = TrainingSettings(image_size=64, precision=precision, lr=1e-4)
    learner = Learner(TransUNet("tiny", 64), settings, torch.device(device))
    dataset = load_dataset(phantoms)
    batches = TrainingBatches(dataset, tuple(p.name for p in dataset.patients), 64, 8, 0)
    found = []
    for images, masks in batches.epoch(1):
        learner.model.train()
        found.append(learner._step(images, masks)[0])
        if len(found) == steps:
            break
    return found


def test_auto_is_bfloat16_where_the_chip_has_it():
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_first_steps_are_those_of_the_cpu(phantoms):
    ours = losses(phantoms, "cpu", "float32", 4)
    assert losses(phantoms, "cuda", "float32", 4) == pytest.approx(ours, abs=5e-3)
    assert losses(phantoms, "cuda", "auto", 4) == pytest.approx(ours, abs=5e-2)


@pytest.mark.slow
def test_a_model_trained_there_is_used_on_the_cpu(phantoms, tmp_path):
    done = run_script(
        "train_centralized.py",
        "--data-dir",
        phantoms,
        "--out",
        tmp_path,
        "--image-size",
        32,
        "--epochs",
        4,
        "--device",
        "cuda",
    )
    assert done.returncode == 0, done.stderr
    assert "cuda, bfloat16" in done.stdout or torch.cuda.get_device_capability() < (8, 0), done.stdout
    path = tmp_path / "transunet_centralized_best.pth"
    dataset = load_dataset(phantoms)
    volume, _ = dataset.volume(dataset.patients[0].name)
    there = predict_volume(load_checkpoint(path, "cuda").model, volume)
    here = predict_volume(load_checkpoint(path, "cpu").model, volume)
    assert abs(there - here).max() < 0.02


@pytest.mark.slow
def test_hospitals_train_there(phantoms, tmp_path):
    hospitals = [LocalHospital(tmp_path, cid, phantoms, device="cuda") for cid in range(2)]
    settings = FederationSettings(clients=2, rounds=2, round_timeout=1e6)
    state, _ = run(hospitals, TrainingSettings(image_size=32), settings, tmp_path)
    assert state.progress.round == 2 and torch.isfinite(state.weights).all()
