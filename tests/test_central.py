"""The centralised run by its parts, in this process: who trains, who chooses, what is kept, rates, clocks."""

import argparse
import json
import math
import time

import pytest
import torch

from checkpoint import load_checkpoint
from dataset import load_dataset
from runs.central import CentralTraining
from split import make_split, save_split
from train_centralized import choose_split
from training import EpochResult, TrainingSettings


@pytest.fixture
def central(phantoms, tmp_path):
    dataset = load_dataset(phantoms, progress=False)
    split = make_split({p.name: p.site for p in dataset.patients}, 0)

    def make(resume: bool = False, **settings) -> CentralTraining:
        small = {"image_size": 32, "batch_size": 8, "epochs": 1, "ema_decay": 0.5}
        return CentralTraining(
            dataset, split, TrainingSettings(**{**small, **settings}), torch.device("cpu"), tmp_path, resume
        )

    return make


def test_what_is_kept_is_what_was_scored_on_the_validation_patients(central, monkeypatch):
    subject, seen = central(), []
    monkeypatch.setattr(
        "runs.central.score_patients",
        lambda model, _, patients, threshold, with_loss: seen.append((model, patients, threshold)) or [],
    )
    subject.run()
    averaged, raw = subject.learner.weights_model.state_dict(), subject.learner.model.state_dict()
    assert seen == [(subject.learner.weights_model, subject.split.val, 0.5)]
    for path in (subject.best, subject.last):
        for name, value in load_checkpoint(path).model.state_dict().items():
            assert torch.equal(value, averaged[name]), name
    assert not torch.equal(raw["head.weight"], averaged["head.weight"])


def test_only_the_training_patients_train(central):
    subject = central()
    slices = subject.dataset.table.set_index("patient")["slices"][list(subject.split.train)].sum()
    assert subject.batches.slices == slices
    subject.run()
    assert subject.progress.rows[-1]["step"] == math.ceil(slices / 8)
    images = load_checkpoint(subject.best).metadata["preprocessing"]["training_images"]
    assert images == json.loads(json.dumps(subject.dataset.image_statistics(subject.split.train)))


def test_the_plateau_halves_the_rate_also_after_a_resume(central):
    def record(subject, times: int) -> float:
        for _ in range(times):
            subject.progress.epoch += 1
            subject._record(EpochResult(1.0, 0.5, 1), {"mean": 0.5, "median": 0.5}, 0.7)
        return subject.learner.optimiser.param_groups[0]["lr"]

    assert record(central(schedule="plateau"), 3) == 1e-3
    again = central(resume=True, schedule="plateau")
    assert record(again, 2) == 5e-4  # patience 3: the first sets the mark, the fifth is one too many
    again._train()
    assert again.learner.optimiser.param_groups[0]["lr"] == 5e-4


@pytest.mark.parametrize(("epochs", "frozen"), [(1, True), (2, False)])
def test_a_frozen_encoder_thaws_after_its_epochs(central, epochs, frozen):
    subject = central(epochs=epochs, freeze_encoder_epochs=1)
    before = [p.clone() for p in subject.learner.model.encoder.parameters()]
    subject.run()
    assert (
        all(torch.equal(p, b) for p, b in zip(subject.learner.model.encoder.parameters(), before)) == frozen
    )


def test_patience_counts_epochs(central):
    subject = central(epochs=20, patience=2)
    subject.progress.epoch, subject.progress.best_epoch = 4, 3
    assert not subject._finished()
    subject.progress.epoch = 5
    assert subject._finished()


def test_a_resumed_run_says_when_its_scans_are_others_by_now(central, capsys):
    subject = central()
    subject.progress.epoch = 1
    subject._record(EpochResult(1.0, 0.5, 1), None, None)
    capsys.readouterr()
    again = central(resume=True)
    assert "have changed" not in capsys.readouterr().out
    again.dataset.content = "of a mask that was drawn again"
    again._resume()
    assert "scans or masks in" in (said := capsys.readouterr().out) and "start without --resume" in said


def test_the_minutes_are_those_of_the_clock_and_go_on_after_a_resume(central):
    subject = central(minutes=1.0)
    subject.began = time.monotonic() - 30
    assert subject._share_done() == pytest.approx(0.5, abs=0.05)
    subject.progress.ending_seconds = 20.0  # room for scoring and saving once more, and half as much again
    assert subject._share_done() == pytest.approx(1.0, abs=0.1)
    assert subject._train().steps == 0
    subject.progress.seconds = 30.0
    subject._record(EpochResult(1.0, 0.5, 1), None, None)
    again = central(resume=True, minutes=1.0)
    assert time.monotonic() - again.began >= 30


def test_a_named_split_is_put_beside_the_checkpoint(central, tmp_path):
    subject = central()
    save_split(subject.split, tmp_path / "other.json")
    arguments = argparse.Namespace(
        out=tmp_path, split_file=tmp_path / "other.json", resume=False, val_fraction=0.1, test_fraction=0.2
    )
    assert choose_split(arguments, {p.name: p.site for p in subject.dataset.patients}, 0) == subject.split
    assert (tmp_path / "split.json").read_bytes() == (tmp_path / "other.json").read_bytes()


def test_the_epoch_with_the_best_score_is_kept(central):
    subject = central(epochs=3)
    for dice in (0.5, 0.6, 0.6, 0.4):
        subject.progress.epoch += 1
        subject._record(EpochResult(1.0, 0.5, 1), {"mean": dice, "median": dice}, 1 - dice)
    assert (subject.progress.best, subject.progress.best_epoch) == (0.6, 2)
    assert load_checkpoint(subject.best).metadata["training"]["epochs_done"] == 2
