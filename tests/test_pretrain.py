"""Masked autoencoding: what is hidden, what is learnt, and that the file is one for --encoder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from running import run_here
from safetensors import safe_open

from common import MedFLError
from encoders.autoencoder import (
    MaskedAutoencoder,
    UnlabelledBatches,
    of_training,
    patches,
    unlabelled_volumes,
)
from encoders.weights import start_model
from split import Split, make_split, save_split
from training import TrainingSettings


def test_patches_are_normalised_one_by_one():
    images = torch.arange(2 * 3 * 32 * 48, dtype=torch.float32).reshape(2, 3, 32, 48)[:, :, :, :32]
    cut = patches(images)
    assert cut.shape == (2, 4, 768)
    assert torch.allclose(cut.mean(dim=2), torch.zeros(2, 4), atol=1e-4)
    corner = images[0, :, 16:, :16].flatten()  # the third place: second row, first column
    assert torch.allclose(cut[0, 2], (corner - corner.mean()) / corner.std(), atol=1e-3)


def test_hidden_patches_are_not_seen_and_only_they_count():
    torch.manual_seed(0)
    model = MaskedAutoencoder("mini", 32).eval()
    images, order = torch.randn(1, 3, 32, 32), torch.tensor([[2, 0, 3, 1]])
    loss = model(images, order, visible=2)
    loss.backward()
    grid = torch.zeros(4)
    for place in range(
        4
    ):  # the loss changes with a hidden patch by its target only, never through the encoder
        row, column = divmod(place, 2)
        changed = images.clone()
        changed[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] *= 2  # the target stays
        grid[place] = (model(changed, order, visible=2) - loss).abs()
    assert (grid[[2, 0]] > 1e-4).all() and (grid[[3, 1]] < 1e-2).all()
    assert all(p.grad is not None for name, p in model.encoder.named_parameters())


def test_base_is_refused():
    with pytest.raises(MedFLError, match="choose mini, tiny or small"):
        MaskedAutoencoder("base", 32)


def test_masks_are_never_opened_and_other_patients_never_read(tmp_path):
    for patient in ("a", "b"):
        (tmp_path / patient).mkdir()
        for number in (1, 2):
            pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / patient / f"{patient}_{number}.png")
    (tmp_path / "a" / "a_1_mask.png").write_text("no picture")
    assert UnlabelledBatches(unlabelled_volumes(tmp_path), 32, 2, 0).slices == 4
    (tmp_path / "b" / "b_1.png").write_text("no picture")
    some = unlabelled_volumes(tmp_path, reads=of_training(Split(0, ("a",), (), ("b",))))
    assert UnlabelledBatches(some, 32, 2, 0).slices == 2
    with pytest.raises(MedFLError, match="no slices"):
        unlabelled_volumes(tmp_path, reads=of_training(Split(0, ("c",), (), ())))


def test_scans_without_masks_are_read_but_for_those_of_test_patients(tmp_path):
    tested = "p0123456789ab"  # of whom a later study has no mask
    for place in ("a", "b", "without_masks/c", "without_masks/b", f"without_masks/{tested}_s22222222"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / place / "x_1.png")
    split = Split(0, ("a",), (), ("b", f"{tested}_s11111111"))

    def read(unmasked: bool) -> set[str]:
        found = unlabelled_volumes(tmp_path, reads=of_training(split, unmasked))
        return {slices[0].parent.relative_to(tmp_path).as_posix() for slices in found}

    assert read(unmasked=True) == {"a", "without_masks/c"} and read(unmasked=False) == {"a"}


def test_a_patient_of_the_same_name_at_another_depth_is_another(tmp_path):
    for place in ("anna", "site/anna", "other/site/anna"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / place / "x_1.png")
    for train in ("anna", "site/anna"):
        others = tuple({"anna", "site/anna", "other/site/anna"} - {train})
        found = unlabelled_volumes(tmp_path, reads=of_training(Split(0, (train,), others[:1], others[1:])))
        assert [slices[0].parent for slices in found] == [tmp_path / train]


def test_an_encoder_is_pretrained_and_taken(phantoms, home, tmp_path):
    """It learns, it reads training patients only, and a training begins with its weights."""
    names = sorted(folder.name for folder in (phantoms / "kaggle_3m").iterdir() if folder.is_dir())
    split = make_split({name: name.split("_")[1] for name in names}, 0)
    save_split(split, tmp_path / "split.json")
    out = tmp_path / "encoder.safetensors"
    command = ("pretrain.py", "--data-dir", phantoms, "--model", "mini", "--image-size", 32, "--out", out)
    more = ("--split-file", tmp_path / "split.json", "--epochs", 6, "--batch-size", 16)
    done = run_here(*command, *more)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert losses[-1] < 0.9 * losses[0]
    with safe_open(out, "pt") as file:
        about = json.loads(file.metadata()["medfl"])
        weight = file.get_tensor("blocks.0.attn.qkv.weight")
    assert about["volumes"] == len(split.train) and about["split_sha256"] == split.sha256()
    settings = TrainingSettings(model="mini", image_size=48, encoder=str(out))
    model, resolved, note = start_model(settings)
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, weight) and note is None
    assert resolved.encoder == "encoder.safetensors"
    wrong = run_here(*command[:-1], tmp_path / "encoder.pth")
    assert wrong.returncode == 2 and "written as .safetensors" in wrong.stderr
