"""The network: shapes, sides, gradients, weights from a file, and timm
beside a torchvision of another build."""

import subprocess
import sys

import pytest
import torch
from running import ROOT
from safetensors.torch import save_file

from common import MedFLError
from transunet import ARCHITECTURES, TransUNet


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_logits_have_the_images_side(name, norm):
    model = TransUNet(name, 32, norm).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 32, 32)


@pytest.mark.parametrize("side", [16, 48, 80])
def test_any_side_divisible_by_16(side):
    with torch.no_grad():
        assert TransUNet("tiny", side).eval()(torch.zeros(1, 3, side, side)).shape == (1, 1, side, side)


@pytest.mark.parametrize("side", [0, 8, 100])
def test_another_side_is_refused(side):
    with pytest.raises(MedFLError, match="multiple of 16"):
        TransUNet("tiny", side)


def test_unknown_names_are_refused():
    with pytest.raises(MedFLError, match="tiny, small, base"):
        TransUNet("huge", 32)
    with pytest.raises(MedFLError, match="batch or group"):
        TransUNet("tiny", 32, "layer")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    model = TransUNet(name, 32)
    for parameter in model.encoder.parameters():
        if (
            not parameter.any()
        ):  # timm starts residual branches at 0, which holds their gradients back for one step
            torch.nn.init.normal_(parameter, std=0.5)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_the_head_depends_on_skips_and_on_tokens():
    """Either path can be taken away and the logits change: neither is dead."""
    torch.manual_seed(0)
    model, image = TransUNet("tiny", 32, "group").eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        whole = model(image)
        for part in (model.encoder, *model.pyramid.stages):
            before = {n: p.clone() for n, p in part.named_parameters()}
            for parameter in part.parameters():
                parameter.zero_()
            assert not torch.allclose(model(image), whole, atol=1e-5)
            for n, p in part.named_parameters():
                p.copy_(before[n])
        assert torch.equal(model(image), whole)


def test_frozen_encoder_gets_no_gradient():
    model = TransUNet("tiny", 32)
    model.set_encoder_trainable(False)
    model(torch.randn(2, 3, 32, 32)).mean().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())
    model.set_encoder_trainable(True)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_encoder_weights_from_a_file_of_another_side(tmp_path, suffix):
    """timm's own names and side: position embeddings are resampled, the classifier is left out."""
    source = TransUNet("tiny", 64).encoder
    state = {**source.state_dict(), "head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    path = tmp_path / f"vit{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    encoder = TransUNet("tiny", 32, encoder_weights=path).encoder
    assert torch.equal(encoder.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    assert encoder.pos_embed.shape[1] == 1 + 4


def test_wrong_encoder_weights_are_told(tmp_path):
    with pytest.raises(MedFLError, match="there is no weights file"):
        TransUNet("tiny", 32, encoder_weights=tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(TransUNet("small", 32).encoder.state_dict(), tmp_path / "small.pth")
    for name in ("text.pth", "other.pth", "small.pth"):
        with pytest.raises(MedFLError, match="does not hold this encoder's weights"):
            TransUNet("tiny", 32, encoder_weights=tmp_path / name)


def test_pretrained_without_network_names_both_remedies(tmp_path, monkeypatch):
    """Offline by the hub's own switch, with an empty cache: the same on a machine with a network."""
    code = (
        "from common import MedFLError\nfrom transunet import TransUNet\n"
        "try:\n    TransUNet('tiny', 32, pretrained=True)\nexcept MedFLError as error:\n    "
        "print('SENTENCE', error)"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "SENTENCE" in done.stdout, done.stderr
    assert "could not be fetched from huggingface.co" in done.stdout and "--encoder-weights" in done.stdout


def test_timm_imports_and_a_matching_torchvision_is_left_alone():
    """Operators are declared exactly where a plain `import torchvision` fails."""
    plain = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    ours = subprocess.run(
        [sys.executable, "-c", "import transunet, torchvision_operators as t; print(t.DECLARED)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout.strip() == str(plain.returncode != 0)


def test_another_fault_of_torchvision_is_not_hidden(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('broken in another way')\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import torchvision_operators"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "broken in another way" in done.stderr
