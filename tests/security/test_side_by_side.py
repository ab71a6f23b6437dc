"""Two processes of a hospital with one label, in one folder: neither forgets what the other has told or given."""

import json
import threading
from contextlib import contextmanager

import pytest
import torch

from common import MedFLError
from federation.hospital import scored, statistics, sums
from federation.hospital.identity import Identity
from federation.hospital.scored import ScoredModels
from federation.hospital.statistics import ToldStatistics
from federation.hospital.sums import Sums


def models(folder):
    both = [ScoredModels(folder / "mercy_scored.json") for _ in range(2)]
    return [lambda one=one, k=k: one.admits(torch.full((3,), float(k)), 1) for k, one in enumerate(both)]


def losses(folder):
    one = ScoredModels(folder / "mercy_scored.json")
    assert one.admits(torch.zeros(3), 1)
    return [lambda k=k: one.loss(torch.zeros(3), str(k), 0.5, 1) for k in range(2)]


def images(folder):
    both = [ToldStatistics(folder / "mercy_images.json") for _ in range(2)]
    told = {"brightness": {"mean": [0.5], "deviation": [0.1]}}
    groups = [tuple(f"{k}-{number}" for number in range(8)) for k in range(2)]
    return [lambda one=one, group=group: one.tell(group, told) for one, group in zip(both, groups)]


def given(folder, keys=("[1]", "[2]")):
    who = Identity(label="mercy", cid=None, data=folder, device="cpu", medfl="1", models=folder, code="c")
    return [lambda key=key, k=k: Sums(who, folder).remember({key: [f"a{k}"]}) for k, key in enumerate(keys)]


def side_by_side(monkeypatch, module, first, second) -> list:
    """Begin `second` when `first` is about to write its file."""
    write, others, raised = module.atomic_write, [], []

    def other() -> None:
        try:
            second()
        except MedFLError as error:
            raised.append(error)

    @contextmanager
    def meanwhile(*path, **how):
        if not others:
            others.append(threading.Thread(target=other))
            others[0].start()
            others[0].join(0.5)  # it is either done by then, or waits for this one
        with write(*path, **how) as file:
            yield file

    monkeypatch.setattr(module, "atomic_write", meanwhile)
    first()
    others[0].join()
    return raised


@pytest.mark.parametrize(
    "module, told, name, part",
    [
        (scored, models, "scored", "models"),
        (scored, losses, "scored", "losses"),
        (statistics, images, "images", "told"),
        (sums, given, "sums", "given"),
    ],
    ids=["scores", "losses", "images", "sums"],
)
def test_both_are_kept(monkeypatch, tmp_path, module, told, name, part):
    assert side_by_side(monkeypatch, module, *told(tmp_path)) == []
    assert len(json.loads((tmp_path / f"mercy_{name}.json").read_text())[part]) == 2


def test_one_round_is_not_summed_twice(monkeypatch, tmp_path):
    (refused,) = side_by_side(monkeypatch, sums, *given(tmp_path, ("[1]", "[1]")))
    assert "another sum of this round" in str(refused)
