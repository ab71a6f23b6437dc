"""The measurement of what is learnt of patients (benchmarks/privacy_audit.py): its figures, and one short run."""

from argparse import Namespace

import pytest
import torch
from scripted import make_messages_outside_of_a_run

from benchmarks.privacy_audit import (
    PATIENTS,
    PLAIN,
    Attacker,
    attack,
    auc,
    federate,
    gradients_seen,
    subtraction,
)
from dataset import load_dataset
from federation.protocol.weights import pack
from transunet import TransUNet


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    assert auc([3.0, 4.0], [1.0, 2.0]) == 1.0 and auc([1.0], [2.0, 3.0]) == 0.0
    assert auc([1.0, 3.0], [2.0, 2.0]) == 0.5 and auc([1.0, 1.0], [1.0]) == 0.5


def test_subtraction_gives_a_patient_of_exact_means_and_not_of_what_is_told(phantoms, tmp_path):
    exact, told = (
        float(part.split()[0]) for part in subtraction(load_dataset(phantoms), tmp_path).split(", ")
    )
    assert exact < 0.02 < 0.1 < told


@pytest.fixture
def arguments(phantoms, monkeypatch):
    make_messages_outside_of_a_run(monkeypatch)
    return Namespace(
        data_dir=phantoms, image_size=32, hospitals=2, rounds=1, delta=1e-3, dp_clip=1.0, slices=1, seed=0
    )


@pytest.fixture
def attacker(phantoms):
    torch.manual_seed(0)
    return Attacker(load_dataset(phantoms), TransUNet("mini", 32, "group"))


def test_a_federation_is_attacked_with_what_the_server_got(arguments, attacker, tmp_path, monkeypatch):
    """An update that is what a patient alone would change tells that patient's hospital, each time."""
    attacker.model = TransUNet("tiny", 32, "group")
    trial = federate(arguments, pack(attacker.model.state_dict()), tmp_path, None)
    assert [one.hospital for one in trial.seen] == [0, 1] and all(one.change.norm() > 0 for one in trial.seen)
    members = [patient for at_one in trial.members for patient in at_one]
    assert len(members) + len(trial.others) == 10 and not {*members} & {*trial.others}
    attacker.at(trial.seen[0].sent)
    for one in trial.seen:
        one.change = sum(attacker.wanted(patient) for patient in trial.members[one.hospital])
    found = attack(attacker, trial, 1)
    assert float(found["one update"]) > 0.9 and found["holder"].startswith(f"{len(members)} of")


def test_an_inversion_sees_what_the_defence_lets_through(arguments, attacker):
    images, masks = attacker.slices(attacker.dataset.patients[0].name)
    slices = [(images[3:4], masks[3:4])]
    every, plain = gradients_seen(arguments, attacker, PLAIN, 0, slices)
    last, noised = gradients_seen(arguments, attacker, PATIENTS, 8.0, slices)
    assert len(last) < len(every) and len(plain) == len(every)
    exact = dict(zip(map(id, every), plain))
    one = torch.cat([gradient.flatten() for gradient in noised])
    true = torch.cat([exact[id(weight)].flatten() for weight in last])
    assert torch.nn.functional.cosine_similarity(one, true, dim=0) < 0.2
