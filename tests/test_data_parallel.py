"""Central training by two processes, as torchrun starts them: the result of one, but for rounding."""

import subprocess
import sys

import pytest
import torch
from running import ROOT
from two_processes import central, gradients, of_several_classes

from checkpoint import load_checkpoint
from common import MedFLError
from federation.protocol.weights import pack
from runs.data_parallel import Processes
from training import segmentation_loss

NAMES = ("transunet_centralized_best.pth", "transunet_centralized_last.pth")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(phantoms, tmp_path):
    alone = central(phantoms, tmp_path / "alone")
    alone.run()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ROOT / "tests" / "two_processes.py"
    done = subprocess.run([*command, script, phantoms, tmp_path], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1 ") == 2  # of two runs: one process prints
    whole, parts, one = (
        [load_checkpoint(tmp_path / run / name) for name in NAMES] for run in ("whole", "parts", "alone")
    )
    for left, right in zip(whole, parts):  # --resume changes nothing
        assert torch.equal(pack(left.model.state_dict()), pack(right.model.state_dict()))
    step, other = torch.load(tmp_path / "step.pt"), gradients(central(phantoms, tmp_path / "step"))
    assert (step - other).norm() < 1e-5 * other.norm()
    start = pack(central(phantoms, tmp_path / "start").learner.model.state_dict())
    left, right = (pack(run[1].model.state_dict()) for run in (whole, one))
    assert (left - right).norm() < 0.02 * (right - start).norm()  # Adam makes much of rounding
    rows = [run[1].state["progress"]["rows"] for run in (whole, one)]
    for row, other in zip(*rows, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert row["step"] == other["step"] and row["learning_rate"] == other["learning_rate"]
    logits, masks = of_several_classes()
    loss, _ = segmentation_loss(logits.requires_grad_(), masks)
    loss.backward()
    losses, shares = zip(*(torch.load(tmp_path / f"classes_{rank}.pt") for rank in range(2)))
    assert losses == pytest.approx([loss.item()] * 2, rel=1e-5)
    assert torch.allclose(torch.cat(shares) / 2, logits.grad, atol=1e-7)  # torch takes the processes' mean
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }


def test_a_batch_is_shared_whole():
    processes = Processes()
    processes.count = 3
    shares = []
    for processes.rank in range(3):
        shares += range(7)[processes.share(7)]
    assert shares == list(range(7))
    with pytest.raises(MedFLError, match="a larger batch"):
        processes.share(2)


def test_without_torchrun_there_is_one():
    processes = Processes()
    assert processes.first and processes.agree(5) == 5
    layer = torch.nn.BatchNorm2d(2)
    processes.whole_batches(layer)
    assert type(layer) is torch.nn.BatchNorm2d and processes.network(layer) is layer


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [({"WORLD_SIZE": "4"}, "RANK is not set"), ({"WORLD_SIZE": "four"}, "WORLD_SIZE is four")],
)
def test_half_of_what_torchrun_sets_is_told(monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MedFLError, match=sentence):
        Processes()
