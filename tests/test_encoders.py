"""What an encoder starts with: files as timm writes them, the hub with and without an answer, the recipe of each."""

import socket
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from running import run_here
from safetensors.torch import save_file

import torchvision_operators  # noqa: F401  must come before timm

# isort: split
import timm

from checkpoint import Checkpoint, load_checkpoint
from common import MedFLError
from encoders import weights
from encoders.weights import RANDOM, go_on_from, start_model
from training import Learner, TrainingSettings
from transunet import TransUNet

SMALL = TrainingSettings(image_size=32)
REPO = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(scope="module")
def as_timm_has_it() -> dict[str, torch.Tensor]:
    """The state of timm's own model: 224 pixels, so 14×14 places, and 1000 classes."""
    torch.manual_seed(3)
    state = timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict()
    assert state["pos_embed"].shape == (1, 197, 192) and state["head.weight"].shape == (1000, 192)
    return {**state, "pos_embed": torch.randn(1, 197, 192)}


def written(state: dict[str, torch.Tensor], path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize("side", [32, 128, 224])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "vit.pth"])
def test_files_as_timm_writes_them(as_timm_has_it, tmp_path, name, side):
    """Both formats, each grid: position embeddings are resampled, the classifier is left out, and every other
    weight is the file's."""
    written(as_timm_has_it, tmp_path / name)
    model, settings, note = start_model(replace(SMALL, image_size=side, encoder=str(tmp_path / name)))
    loaded, places = model.encoder.state_dict(), (side // 16) ** 2
    assert loaded["pos_embed"].shape == (1, 1 + places, 192)
    assert all(torch.equal(loaded[key], as_timm_has_it[key]) for key in loaded if key != "pos_embed")
    assert torch.equal(loaded["pos_embed"][:, 0], as_timm_has_it["pos_embed"][:, 0])  # the class token's
    if side == 224:
        assert torch.equal(loaded["pos_embed"], as_timm_has_it["pos_embed"])
    assert settings.encoder == name and note is None
    assert settings.encoder_lr_factor == 0.1 and settings.freeze_encoder_epochs == 3


def in_the_cache(folder, state, file: str) -> None:
    """As the hub's client keeps a file: refs/main names the snapshot."""
    repo = folder / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    written(state, repo / "snapshots" / ("a" * 40) / file)


@pytest.mark.parametrize("file", weights.FILES)
def test_weights_in_the_hubs_cache_need_no_network(as_timm_has_it, tmp_path, monkeypatch, file):
    in_the_cache(tmp_path, as_timm_has_it, file)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    model, settings, note = start_model(SMALL)
    assert torch.equal(model.encoder.blocks[3].attn.qkv.weight, as_timm_has_it["blocks.3.attn.qkv.weight"])
    assert settings.encoder == "pretrained" and note is None and settings.encoder_lr_factor == 0.1


@pytest.mark.parametrize("way", ["offline", "refused", "silent"])
def test_without_the_hub_it_goes_on_at_once_and_says_so(tmp_path, monkeypatch, way):
    """One try, no retries; also where somebody listens and never answers."""
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", way == "offline")
    monkeypatch.setattr(weights, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1] if way == "silent" else 9
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        model, settings, note = start_model(SMALL)
    assert time.monotonic() - began < 10
    assert settings.encoder == RANDOM and settings.encoder_lr_factor == 1.0
    assert settings.freeze_encoder_epochs == 0
    assert note and "random weights" in note and REPO in note and "\n" not in note


def test_a_hub_that_answers_and_then_fails_is_said(tmp_path, monkeypatch):
    """The hub's own client would wait half a minute between its tries, so its answer is put in its place."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    def fail(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        path, why = weights.pretrained_weights("tiny")
        server.shutdown()
    assert path is None and "can't be loaded from the hub (ConnectionError)" in why


def test_a_packed_file_is_not_read(tmp_path):
    """Its zeros are a gigabyte for each megabyte."""
    torch.save({"cls_token": torch.zeros(1000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "x.pth", "w", 8) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(MedFLError, match="is packed"):
        TransUNet("tiny", 32, "batch", tmp_path / "x.pth")


def test_mini_has_no_pretrained_weights():
    path, why = weights.pretrained_weights("mini")
    assert path is None and "no pretrained weights for mini" in why


def test_what_was_asked_for_goes_before_the_recipe(as_timm_has_it, tmp_path):
    written(as_timm_has_it, tmp_path / "vit.pth")
    asked = replace(SMALL, encoder=str(tmp_path / "vit.pth"), encoder_lr_factor=0.5, freeze_encoder_epochs=1)
    model, settings, _ = start_model(asked)
    assert (settings.encoder_lr_factor, settings.frozen_epochs) == (0.5, 1)
    rates = {group["lr"] for group in Learner(model, settings, torch.device("cpu")).optimiser.param_groups}
    assert rates == {settings.lr, 0.5 * settings.lr}


def test_a_start_from_a_checkpoint_keeps_what_its_encoder_was(tmp_path):
    about = {"training": {"encoder": "pretrained"}}
    start = Checkpoint(tmp_path, TransUNet("mini", 32), about, None)
    settings = go_on_from(start, SMALL)
    assert (settings.encoder, settings.encoder_lr_factor, settings.frozen_epochs) == ("pretrained", 1.0, 0)


def test_the_run_tells_what_its_encoder_began_with(as_timm_has_it, phantoms, home, tmp_path):
    """On the terminal, in the checkpoint, in the history; also after a resume, without the file."""
    written(as_timm_has_it, tmp_path / "vit.safetensors")
    options = ("--data-dir", phantoms, "--image-size", 32, "--batch-size", 8, "--out", tmp_path / "out")
    start = ("--encoder", tmp_path / "vit.safetensors", "--epochs", 1)
    done = run_here("train_centralized.py", *options, *start)
    assert done.returncode == 0 and "encoder vit.safetensors" in done.stdout, done.stderr
    best = load_checkpoint(tmp_path / "out" / "transunet_centralized_best.pth")
    assert best.metadata["training"]["encoder"] == "vit.safetensors"
    frozen = best.model.encoder.blocks[0].attn.qkv.weight
    assert torch.equal(frozen, as_timm_has_it["blocks.0.attn.qkv.weight"])  # for three epochs
    history = (tmp_path / "out" / "centralized_history.csv").read_text().splitlines()
    assert history[0].endswith(",encoder") and history[1].endswith(",vit.safetensors")
    (tmp_path / "vit.safetensors").unlink()
    again = run_here("train_centralized.py", *options, "--resume")
    assert again.returncode == 0, again.stderr


def test_random_weights_are_said_in_one_line(phantoms, home, tmp_path):
    options = ("--data-dir", phantoms, "--image-size", 32, "--steps", 1, "--batch-size", 4, "--out", tmp_path)
    told = run_here("train_centralized.py", *options, "--model", "mini")
    assert told.returncode == 0 and told.stdout.count("random weights") == 1, told.stderr
    silent = run_here(
        "train_centralized.py", *options, "--model", "mini", "--encoder", "random", "--overwrite"
    )
    assert silent.returncode == 0 and "random weights" not in silent.stdout
    assert isinstance(load_checkpoint(tmp_path / "transunet_centralized_best.pth").model, TransUNet)


def test_an_encoder_beside_a_checkpoint_is_refused(tmp_path):
    start = Checkpoint(tmp_path, TransUNet("mini", 32), {}, None)
    with pytest.raises(MedFLError, match="--init brings an encoder"):
        go_on_from(start, replace(SMALL, encoder="vit.safetensors"))


def test_a_note_of_git_lfs_in_the_place_of_an_encoder_is_told(tmp_path):
    (tmp_path / "vit.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(MedFLError, match="git lfs pull"):
        start_model(replace(SMALL, encoder=str(tmp_path / "vit.safetensors")))
