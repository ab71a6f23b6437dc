"""The round loop on a grid whose hospitals answer as a test says: what is kept, averaged, left out, and when it ends."""

import pytest

from checkpoint import load_checkpoint
from federation.weights import pack
from federation.state import BEST, RunState
from scripted import Worker, federate, make_fast


@pytest.fixture
def run(monkeypatch, tmp_path):
    make_fast(monkeypatch)
    return lambda workers, rounds, **training: federate(workers, rounds, tmp_path, **training)


def kept(state: RunState) -> tuple[float, dict]:
    """The value of the best checkpoint's weights, and its metadata."""
    checkpoint = load_checkpoint(state.best)
    weights = pack(checkpoint.model.state_dict())
    assert (weights == weights[0]).all()
    return weights[0].item(), checkpoint.metadata


def test_the_best_is_the_model_that_was_scored(run):
    """The score in round 2's answers is of the model after round 1; random weights are never kept."""
    code, state, _ = run([Worker("hospital-0", [0.9, 0.6, 0.4, 0.3])], 3)
    value, metadata = kept(state)
    assert code == 0 and value == 1.0 and metadata["training"]["rounds_done"] == 1
    assert metadata["scores"]["val"]["volume_dice"]["mean"] == 0.6


def test_the_last_model_is_the_average_over_rounds(run):
    worker = Worker("hospital-0", [0.1, 0.2, 0.3])
    _, state, _ = run([worker], 2)
    assert worker.got[-1][0].item() == pytest.approx(1 + (1 - 2 / 11)) and kept(state)[0] == worker.got[-1][0].item()
    assert pack(load_checkpoint(state.last).model.state_dict())[0] == worker.got[-1][0]


def test_patience_ends_the_rounds(run):
    _, state, said = run([Worker("hospital-0", [0.1, *[0.5] * 9])], 9, patience=2)
    assert state.progress.round == 4 and any("stopped" in line for line in said)  # best after 1; 2 and 3 were no better


def test_the_plateau_rate_reaches_the_hospitals(run):
    worker = Worker("hospital-0", [0.5] * 8)
    run([worker], 7, schedule="plateau")
    assert [about.get("rate") for about in worker.heard] == [1.0] * 6 + [0.5, None]


def test_an_unusable_update_is_left_out_everywhere(run):
    good, bad = Worker("hospital-0", [0.5] * 2), Worker("hospital-1", [0.7] * 2, factor=float("nan"))
    code, state, said = run([good, bad], 1)
    assert code == 0 and state.weights[0] == 1.0 and list(state.progress.hospitals) == ["hospital-0"]
    assert [row["site"] for row in state.progress.rows if row["round"] == 1] == ["hospital-0"]
    assert any("without hospital-1" in line for line in said)


def test_a_round_is_tried_twice_and_no_more(run):
    assert run([Worker("hospital-0", [0.5] * 2, failures=1)], 1)[0] == 0
    assert run([Worker("hospital-0", [0.5] * 2, failures=2)], 1)[0] == 3


def test_the_best_of_an_earlier_run_does_not_stay(run, tmp_path):
    (tmp_path / BEST).write_bytes(b"of an earlier run")
    _, state, _ = run([Worker("hospital-0", [None] * 2)], 1)
    assert kept(state)[0] == 1.0
