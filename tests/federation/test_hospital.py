"""A hospital's work in one message, in this process: what it scores, trains, keeps for itself and refuses."""

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Message
from scripted import make_messages_outside_of_a_run

from benchmarks.federated_against_central import loop_of_a_hospital
from benchmarks.local_federation import LocalHospital
from common import MedFLError, __version__
from dataset import load_dataset
from evaluation.scoring import score_patients
from federation.hospital.faults import HospitalError
from federation.hospital.hospital import Hospital
from federation.hospital.identity import ENDED, IDENTITY, Identity
from federation.hospital.reports import Scored
from federation.protocol.agreement import to_json
from federation.protocol.messages import ENDS, End, Failure, Query, message, read
from federation.protocol.requests import Train
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack, to_record
from split import VAL_FRACTION, Split, make_split, save_split
from training import TrainingSettings
from transunet import TransUNet


@pytest.fixture
def hospital(phantoms, tmp_path):
    def make(cid: int | None = 0, training: dict | None = None, **federation) -> Hospital:
        who = Identity(
            label="mercy" if cid is None else f"hospital-{cid}",
            cid=cid,
            data=phantoms,
            device="cpu",
            medfl=__version__,
            models=tmp_path,
            code="0" * 64,
        )
        return Hospital(
            who,
            TrainingSettings(**{"model": "mini", "image_size": 32, "batch_size": 8, **(training or {})}),
            FederationSettings(**{"clients": 1, **federation}),
            tmp_path / "model.pt",
        )

    return make


def work(subject: Hospital, model: TransUNet | None = None, **about):
    """Result and weights of one message; the same network for the same call."""
    torch.manual_seed(0)
    model = model or TransUNet("mini", 32)
    rate = None if subject.training.schedule == "cosine" else 1.0
    about = {
        "run": "this",
        "round": 1,
        "rate": rate,
        "seconds": 600.0,
        "partition": subject.data.partition_sha256,
        **about,
    }
    result, update = subject.train(model, Train(settings="", without=[], **about))
    return result, update, model


def test_the_score_is_of_the_validation_patients(hospital):
    subject, model = hospital(val_fraction=0.3), TransUNet("mini", 32)
    wanted = np.mean(
        [row["dice"] for row in score_patients(model, subject.data.dataset, subject.data.split.val, 0.5)]
    )
    score = subject.reports.score(model)
    assert (score.val_dice, score.val_patients) == (pytest.approx(wanted), 3)


def test_a_server_gets_no_more_scores_than_runs_need(hospital, monkeypatch):
    """With weights of its own making and as many exact scores as it liked, it could read masks pixel by pixel."""
    monkeypatch.setattr("federation.hospital.reports.score_patients", lambda *_: [{"dice": 0.123456}])
    subject, model = hospital(None, val_fraction=0.3, rounds=3), TransUNet("mini", 32)
    heard, bias = [], dict(model.named_parameters())["head.bias"]
    for question in range(30):
        with torch.no_grad():
            bias.fill_(question)
        heard.append(subject.reports.told(subject.reports.score(model)).val_dice)
    assert heard == [0.1235] * 22 + [None] * 8
    assert subject.reports.score(model, "test") == Scored()
    assert work(subject)[0].train_loss is None
    with torch.no_grad():
        bias.fill_(0)
    assert subject.reports.score(model).val_dice == 0.123456  # the same model tells nothing new


def test_a_server_that_ends_a_service_gets_no_more_scores_once_it_has_started_again(hospital, monkeypatch):
    """A unit starts again what ended with an error, which a server can tell it to do."""
    monkeypatch.setattr("federation.hospital.reports.score_patients", lambda *_: [{"dice": 0.123456}])
    model, heard = TransUNet("mini", 32), []
    for question in range(20):
        with torch.no_grad():
            dict(model.named_parameters())["head.bias"].fill_(question)
        heard.append(hospital(None, val_fraction=0.3, rounds=1).reports.score(model).val_dice)
    assert heard == [0.123456] * 18 + [None] * 2
    now = time.time()
    monkeypatch.setattr("federation.hospital.scored.time.time", lambda: now + 90_000)
    assert hospital(None, val_fraction=0.3, rounds=1).reports.score(model).val_dice == 0.123456  # a day later
    file = hospital(None).reports.scored.file
    assert file.stat().st_mode & 0o077 == 0 or os.name == "nt"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(MedFLError, match="is damaged"):
        hospital(None).reports.score(model)


def test_one_model_has_no_more_losses_than_runs_need(hospital):
    """Rates, rounds and settings make many trainings of one model, each with a loss of its own."""
    subject = hospital(None, rounds=1, training={"schedule": "plateau"})
    losses = [work(subject, rate=0.01 * (k + 1))[0].train_loss for k in range(18)]
    subject.training = replace(subject.training, seed=1)
    assert None not in losses and work(subject, rate=0.01)[0].train_loss is None


def test_a_loss_that_was_told_is_told_again_though_another_model_left_other_moments(hospital):
    subject, other = hospital(None, rounds=3), TransUNet("mini", 32)
    first = work(subject, round=2, run="one")[0].train_loss
    work(subject, other, round=1, run="one")
    assert subject._moments("one").before(2) and work(subject, round=2, run="one")[0].train_loss == first


def test_a_loss_over_a_part_of_the_slices_stays_here(hospital, phantoms):
    """With one step a round it would be of a few slices, and of one patient now and then."""
    assert work(hospital(None, local_steps=1))[0].train_loss is None
    subject = hospital(None, local_steps=40)
    assert work(subject)[0].train_loss is not None
    assert work(hospital(0, local_steps=1))[0].train_loss is not None  # a public dataset has no secret


def test_examples_are_the_training_slices(hospital):
    subject = hospital()
    slices = subject.data.dataset.table.set_index("patient")["slices"]
    assert work(subject)[0].examples == slices[list(subject.data.split.train)].sum()


def test_figures_of_one_or_two_patients_stay_here(hospital, phantoms, tmp_path):
    names = [p.name for p in load_dataset(phantoms, progress=False).patients]
    save_split(Split(0, tuple(names[:2]), tuple(names[2:4]), tuple(names[4:])), tmp_path / "mercy_split.json")
    subject = hospital(None)
    assert (
        work(subject)[0].train_loss is None and subject.reports.score(TransUNet("mini", 32)).val_dice is None
    )
    facts = subject.facts()
    assert facts.images is None and facts.split_sha256 is None and facts.partition_sha256 is None


def test_scoring_first_does_not_change_the_training(hospital):
    subject = hospital()
    torch.manual_seed(0)
    model = TransUNet("mini", 32)
    subject.reports.score(model)
    assert torch.equal(work(subject)[1], work(subject, model)[1])


def test_the_rate_and_the_pull_of_the_message_are_used(hospital):
    plain = work(hospital())[1]
    plateau = {"schedule": "plateau"}
    assert not torch.equal(work(hospital(training=plateau), rate=0.1)[1], work(hospital(training=plateau))[1])
    assert not torch.equal(work(hospital(strategy="fedprox", proximal_mu=10.0))[1], plain)


def test_a_frozen_encoder_thaws_after_its_rounds(hospital):
    for number, frozen in ((1, True), (2, False)):
        torch.manual_seed(0)
        before = {n: p.clone() for n, p in TransUNet("mini", 32).encoder.named_parameters()}
        after = work(hospital(training={"freeze_encoder_epochs": 1}), round=number)[
            2
        ].encoder.named_parameters()
        assert all(torch.equal(p, before[n]) for n, p in after) == frozen


@pytest.mark.parametrize(
    ("about", "failure"),
    [
        ({"partition": "another"}, Failure.DATA),
        ({"seconds": 0.0}, Failure.LATE),
        ({"round": 99}, Failure.CONSENT),
        ({"rate": 0.5}, Failure.CONSENT),
    ],
)
def test_what_a_hospital_refuses(hospital, about, failure):
    with pytest.raises(HospitalError) as caught:
        work(hospital(), **about)
    assert caught.value.failure == failure


@pytest.mark.parametrize("code", End)
def test_every_end_is_understood_and_written_down(monkeypatch, tmp_path, phantoms, code):
    make_messages_outside_of_a_run(monkeypatch)
    node = LocalHospital(tmp_path, 0, phantoms)
    node.answer(Message(message({"query": Query.END, "code": code, "detail": "3"}), 1, "query"))
    ended = json.loads((node.folder / ENDED).read_text(encoding="utf-8"))
    assert ended["exit"] == ENDS[code][0] and ended["sentence"] == ENDS[code][1].format(detail="3")


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"query": "joy"},
        {"query": "end", "code": "else"},
        {"query": "join", "settings": 3},
        {"query": "shares", "keys": {"1": ["a"]}},
        {"query": "unmask", "summed": "all", "missing": []},
        {"query": "ping", "more": 1},
    ],
    ids=str,
)
def test_a_question_of_another_form_gets_a_code(monkeypatch, tmp_path, phantoms, capsys, about):
    make_messages_outside_of_a_run(monkeypatch)
    reply = LocalHospital(tmp_path, 0, phantoms).answer(Message(message(about), 1, "query"))
    assert (
        read(reply.content)["failure"] == Failure.PROTOCOL and "the same version" in capsys.readouterr().out
    )


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_hospital_that_only_checks_tells_no_score(monkeypatch, tmp_path, phantoms, capsys, part):
    make_messages_outside_of_a_run(monkeypatch)
    node = LocalHospital(tmp_path, 0, phantoms)
    node.identity.model_copy(update={"cid": None, "role": "check"}).save(node.folder)
    settings = to_json(TrainingSettings(model="mini", image_size=32), FederationSettings(val_fraction=0.3))
    asked = {"settings": settings, "run": "this", "without": [], "part": part, "last": False}
    weights = to_record(pack(TransUNet("mini", 32).state_dict()))
    reply = node.answer(Message(message(asked, weights), 1, "evaluate"))
    assert read(reply.content)["failure"] == Failure.CONSENT and "nothing was told" in capsys.readouterr().out


@pytest.mark.parametrize("gone", ["kit", "identity"])
def test_no_path_leaves_with_a_fault_before_or_after_the_work(monkeypatch, tmp_path, phantoms, capsys, gone):
    """Flower sends the text of an exception that leaves the app, in which a folder's name stood."""
    make_messages_outside_of_a_run(monkeypatch)
    node = LocalHospital(tmp_path, 0, phantoms)
    node.identity.model_copy(update={"key": tmp_path / "of_dr_smith.key"}).save(node.folder)
    if gone == "identity":
        (node.folder / IDENTITY).write_text('{"data": "of_dr_smith"}', encoding="utf-8")
    reply = node.answer(Message(message({"query": "ping"}), 1, "query"))
    assert read(reply.content) == {"failure": Failure.BUG} and "of_dr_smith" in capsys.readouterr().out


def test_a_share_whose_training_masks_are_black_is_told(hospital, monkeypatch):
    subject = hospital()
    assert subject.data.without_tumour() is None
    monkeypatch.setattr(subject.data.dataset, "tumour_pixels", lambda patient: [0])
    told = subject.data.without_tumour()
    count = len(subject.data.split.train)
    assert told and f"no mask of the {count} patients that train here shows tumour" in told


def test_a_round_tells_a_line_a_minute(hospital, monkeypatch):
    monkeypatch.setattr("federation.hospital.training.LOG_SECONDS", 0.0)
    subject, said = hospital(), []
    subject.tell = said.append
    work(subject)
    assert said and all("steps/s, " in line and "left of the round" in line for line in said)
    assert said[0].startswith("round 1: step 1 of ")


def test_one_hospital_learns_what_the_central_loop_learns(federate, phantoms, tmp_path):
    """Bit for bit: nothing is lost by federating as such."""
    alone = {"val_fraction": VAL_FRACTION, "clients": 1}
    hospitals = [LocalHospital(tmp_path, 0, phantoms)]
    state, _, _ = federate(2, {"ema_decay": 0.0}, hospitals=hospitals, **alone)
    dataset = load_dataset(phantoms, progress=False)
    split = make_split({p.name: p.site for p in dataset.patients}, 0)
    settings = TrainingSettings(image_size=32, batch_size=8, epochs=2, ema_decay=0.0)
    assert torch.equal(state.weights, pack(loop_of_a_hospital(dataset, split, settings).state_dict()))
