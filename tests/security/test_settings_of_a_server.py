"""Settings by which a server would get more out of a hospital's answers than it is told."""

import json
from dataclasses import replace

import pytest
import torch
from scripted import TINIER

from common import MedFLError, __version__
from federation.hospital.hospital import Hospital
from federation.hospital.identity import Identity
from federation.protocol.agreement import from_json, to_json
from federation.protocol.requests import Train
from federation.protocol.settings import FederationSettings
from training import TrainingSettings
from transunet import ARCHITECTURES, TransUNet


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [
        ("local_epochs", 1e-6, False),  # the loss, divided by it, told six digits more
        ("local_steps", 2.5, False),
        ("secure_aggregation", 0, False),
        ("withhold_model", "no", False),
        ("rounds", 2.5, False),
        ("alpha", 1, True),
        ("min_clients", None, True),
    ],
)
def test_settings_have_their_types(name, value, fine):
    settings = json.loads(to_json(TrainingSettings(), FederationSettings()))
    settings["federation"][name] = value
    if fine:
        assert getattr(from_json(json.dumps(settings))[1], name) == value
        return
    with pytest.raises(MedFLError, match="settings that this MedFL does not know"):
        from_json(json.dumps(settings))


@pytest.fixture
def mercy(monkeypatch, phantoms, tmp_path):
    """Makes a hospital with data of its own."""
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINIER)
    who = Identity(
        label="mercy",
        cid=None,
        data=phantoms,
        device="cpu",
        medfl=__version__,
        models=tmp_path / "models",
        code="0" * 64,
    )

    def make(rounds: int, steps: int | None) -> Hospital:
        settings = FederationSettings(rounds=rounds, local_steps=steps, moments="reset")
        return Hospital(who, TrainingSettings(image_size=32), settings, tmp_path / "model.pt")

    return make


def loss_of(subject: Hospital, number: int, model: int, seed: int = 0) -> float | None:
    """What is told of a round that begins with one of several models."""
    torch.manual_seed(model)
    subject.training = replace(subject.training, seed=seed)
    task = Train(settings="", run="r", without=[], round=number, rate=None, seconds=60.0, partition=None)
    return subject.train(TransUNet("tiny", 32), task)[0].train_loss


def test_one_model_gives_no_losses_over_more_and_more_different_slices(mercy):
    """From losses of one model over many sets of slices those of single slices follow."""
    subject = mercy(rounds=2, steps=None)
    told = [loss_of(subject, 1 + k % 2, 0, k // 2) for k in range(30)]
    assert sum(loss is not None for loss in told) == 2 * (2 + 8) and told[-1] is None
    assert loss_of(subject, 2, 0, 0) == told[1] is not None


def test_a_round_of_one_step_tells_no_loss(mercy):
    """It can be of one patient's slices."""
    subject = mercy(rounds=30, steps=1)
    assert {loss_of(subject, number, number) for number in range(1, 6)} == {None}
