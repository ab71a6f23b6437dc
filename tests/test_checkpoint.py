"""Saving and loading a model, and every file that is none."""

import json
import os
import pickle

import pytest
import torch

from checkpoint import describe, load_checkpoint, save_checkpoint, update_metadata
from common import MedFLError
from transunet import TransUNet


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.pth"
    torch.manual_seed(0)
    model = TransUNet("tiny", 32).eval()
    save_checkpoint(path, model.state_dict(), describe(model, origin={"kind": "centralised"}))
    return path, model


def test_round_trip_is_bit_equal(saved):
    path, model = saved
    loaded = load_checkpoint(path)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(image), model.to(memory_format=torch.channels_last)(image))
    assert not loaded.model.training
    assert loaded.metadata["architecture"] == {
        "name": "tiny",
        "image_side": 32,
        "norm": "batch",
        "classes": 1,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    assert loaded.threshold == 0.5 and loaded.state is None


def test_update_metadata_leaves_the_weights(saved, tmp_path):
    path = tmp_path / "copy.pth"
    path.write_bytes(saved[0].read_bytes())
    update_metadata(path, scores={"test": {"patients": 3}})
    before, after = load_checkpoint(saved[0]), load_checkpoint(path)
    assert (
        after.metadata["scores"] == {"test": {"patients": 3}}
        and after.metadata["created"] == before.metadata["created"]
    )
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[name])


def refused(path) -> str:
    with pytest.raises(MedFLError) as caught:
        load_checkpoint(path)
    assert "malicious" not in str(caught.value) or "evil" in path.name
    return str(caught.value)


def test_no_file(tmp_path):
    assert "there is no checkpoint" in refused(tmp_path / "missing.pth")


def test_a_folder_and_a_file_of_somebody_else(tmp_path):
    with pytest.raises(MedFLError, match="is a folder, but a checkpoint is a file; .* without unpacking it"):
        load_checkpoint(tmp_path)
    (tmp_path / "loop.pth").symlink_to("loop.pth")  # for a file without permission, which root may read
    with pytest.raises(MedFLError, match="loop.pth can't be read .*; check its permissions"):
        load_checkpoint(tmp_path / "loop.pth")


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "p.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in refused(tmp_path / "p.pth")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated(saved, tmp_path, share):
    content = saved[0].read_bytes()
    (tmp_path / "t.pth").write_bytes(content[: int(len(content) * share)])
    assert "truncated" in refused(tmp_path / "t.pth")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" * 20])
def test_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    assert "x.pth" in refused(tmp_path / "x.pth")


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "write", [lambda o, p: p.write_bytes(pickle.dumps(o)), torch.save], ids=["pickle", "torch"]
)
def test_malicious_pickle_is_not_run(tmp_path, write):
    write({"model": Malicious(tmp_path / "owned"), "metadata": "{}"}, tmp_path / "evil.pth")
    assert "malicious" in refused(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_another_programs_file(saved, tmp_path):
    torch.save(saved[1].state_dict(), tmp_path / "state.pth")
    assert "no model of MedFL" in refused(tmp_path / "state.pth")


def test_a_nested_tensor_is_no_weight(saved, tmp_path):
    content = torch.load(saved[0], weights_only=True)
    content["model"]["odd"] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    torch.save(content, tmp_path / "odd.pth")
    assert "not plain values" in refused(tmp_path / "odd.pth")


def changed(saved, path, **entries):
    metadata = {**describe(saved[1]), **entries}
    torch.save({"model": saved[1].state_dict(), "metadata": json.dumps(metadata)}, path)
    return refused(path)


def test_newer_format_and_other_preprocessing(saved, tmp_path):
    assert "format 2" in changed(saved, tmp_path / "f.pth", format=2)
    assert "other preprocessing (whitened)" in changed(
        saved, tmp_path / "p.pth", preprocessing={"name": "whitened"}
    )


def test_a_model_is_of_todays_preprocessing_and_says_so(saved):
    assert not load_checkpoint(saved[0]).shrunk_otherwise


def test_another_architecture(saved, tmp_path):
    plan = {"name": "tiny", "image_side": 64, "norm": "batch"}
    assert "another architecture" in changed(saved, tmp_path / "a.pth", architecture=plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(saved, tmp_path, value):
    content = torch.load(saved[0], weights_only=True)
    next(iter(content["model"].values())).view(-1)[0] = value
    torch.save(content, tmp_path / "broken.pth")
    assert "no finite numbers" in refused(tmp_path / "broken.pth")


def test_a_failed_save_keeps_the_old_file(saved, tmp_path):
    path = tmp_path / "kept.pth"
    path.write_bytes(saved[0].read_bytes())
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(path, saved[1].state_dict(), {"dice": float("nan")})
    assert path.read_bytes() == saved[0].read_bytes() and list(tmp_path.iterdir()) == [path]


def test_damaged_metadata(saved, tmp_path):
    torch.save({"model": saved[1].state_dict(), "metadata": "{cut"}, tmp_path / "cut.pth")
    assert "damaged metadata" in refused(tmp_path / "cut.pth")
    torch.save({"model": saved[1].state_dict(), "metadata": '{"format": 1}'}, tmp_path / "few.pth")
    assert "has no architecture" in refused(tmp_path / "few.pth")
    whole = {name: value for name, value in describe(saved[1]).items() if name != "threshold"}
    torch.save({"model": saved[1].state_dict(), "metadata": json.dumps(whole)}, tmp_path / "few.pth")
    assert "has no threshold" in refused(tmp_path / "few.pth")
    for name, value in {"data": "text", "training": [1], "scores": {"val": 1}}.items():
        assert f"damaged metadata ({name}" in changed(saved, tmp_path / "odd.pth", **{name: value})


def test_update_metadata_keeps_the_run_and_the_threshold_counts(saved, tmp_path):
    save_checkpoint(tmp_path / "last.pth", saved[1].state_dict(), describe(saved[1]), {"epoch": 3})
    update_metadata(tmp_path / "last.pth", threshold=0.25)
    loaded = load_checkpoint(tmp_path / "last.pth")
    assert loaded.state == {"epoch": 3} and loaded.threshold == 0.25


def test_a_disk_that_fills_up_keeps_the_old_file(saved, tmp_path, monkeypatch):
    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "kept.pth"
    path.write_bytes(saved[0].read_bytes())
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(MedFLError, match="free the space"):
        save_checkpoint(path, saved[1].state_dict(), {})
    assert path.read_bytes() == saved[0].read_bytes() and list(tmp_path.iterdir()) == [path]
