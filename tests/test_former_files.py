"""Files of former versions still load. Their weights are zeros, so that the files are small.

Made with MedFL 0.2.0 on 10 phantoms: one epoch of train_centralized.py at 32 pixels, and two rounds of two
hospitals. A version that can't read one of them says so in the change log and adds its own beside it.
"""

import gzip
from pathlib import Path

import pytest
import torch
from running import run_here

from checkpoint import load_checkpoint
from dataset import load_dataset
from federation.server.state import LAST, RunState, load_run
from phantoms.patients import make_phantoms
from split import load_split

FILES = Path(__file__).parent / "files"
CENTRAL_LAST = "transunet_centralized_last.pth"


def unpacked(name: str, folder: Path, as_name: str) -> Path:
    path = folder / as_name
    path.write_bytes(gzip.decompress((FILES / f"{name}.pth.gz").read_bytes()))
    return path


@pytest.fixture(scope="module")
def ten(home, tmp_path_factory) -> Path:
    """The phantoms that the files were made on."""
    folder = tmp_path_factory.mktemp("ten")
    make_phantoms(folder, patients=10, slices=6, size=32, seed=0)
    return folder


def test_a_checkpoint(tmp_path):
    checkpoint = load_checkpoint(
        unpacked("centralized_best_0.2.0", tmp_path, "transunet_centralized_best.pth")
    )
    assert checkpoint.model.image_side == 32 and checkpoint.threshold == 0.5
    assert checkpoint.metadata["versions"]["medfl"] == "0.2.0"
    assert checkpoint.shrunk_otherwise  # slices of 256 come out otherwise at 32 pixels, and the card says so
    assert checkpoint.metadata["data"]["name"] == "phantoms"
    assert checkpoint.metadata["preprocessing"]["training_images"] is not None


def test_a_split(ten):
    names = {patient.name for patient in load_dataset(ten, progress=False).patients}
    split = load_split(FILES / "split_0.2.0.json", names)
    assert sorted(split.train + split.val + split.test) == sorted(names)


def test_a_federation_goes_on(tmp_path):
    unpacked("federated_last_0.2.0", tmp_path, LAST)
    training, federation, kept, model = load_run(tmp_path)
    state = RunState(model, training, federation, tmp_path, None)
    state.restore(kept)
    assert state.progress.round == 2 and set(state.progress.hospitals) == {"hospital-0", "hospital-1"}
    assert len(state.weights) == len(state.average) and len(state.progress.rows) == 4
    state.take(torch.ones_like(state.weights))
    state.save_last()
    assert load_run(tmp_path)[2]["progress"]["round"] == 3


@pytest.mark.slow
def test_a_training_goes_on(ten, tmp_path):
    unpacked("centralized_last_0.2.0", tmp_path, CENTRAL_LAST)
    (tmp_path / "split.json").write_bytes((FILES / "split_0.2.0.json").read_bytes())
    done = run_here("train_centralized.py", "--data-dir", ten, "--out", tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
