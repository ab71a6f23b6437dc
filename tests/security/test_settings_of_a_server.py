"""Settings by which a server would get more out of a hospital's answers than it is told."""

import json

import pytest
import torch
from scripted import TINIER

from batches import TrainingBatches
from common import SMALLEST_GROUP, MedFLError, __version__
from federation.hospital.hospital import Hospital
from federation.hospital.identity import Identity
from federation.hospital.training import seed_of
from federation.protocol.requests import Train
from federation.protocol.settings import FederationSettings, from_json, to_json
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


def test_a_round_of_one_step_tells_no_loss_of_one_or_two_patients(monkeypatch, phantoms, tmp_path):
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
    training = TrainingSettings(image_size=32, freeze_encoder_epochs=0)
    settings = FederationSettings(rounds=30, local_steps=1, clients=4, moments="reset")
    subject = Hospital(who, training, settings, tmp_path / "model.pt")
    batches = TrainingBatches(
        subject.data.dataset,
        subject.data.split.train,
        32,
        settings.batch_of_one(training.batch_size),
        seed_of(0, "mercy"),
    )
    told = {}
    for number in range(1, settings.rounds + 1):
        torch.manual_seed(number)
        task = Train(settings="", run="r", without=[], round=number, rate=None, seconds=60.0, partition=None)
        work, _ = subject.train(TransUNet("tiny", 32), task)
        patients = {batches._slices[k][0] for k in batches.order(number)[0]}
        told.setdefault(len(patients) >= SMALLEST_GROUP, set()).add(work.train_loss is not None)
    assert told == {True: {True}, False: {False}}
