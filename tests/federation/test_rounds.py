"""The round loop on a grid whose hospitals answer as a test says: what is kept, averaged, left out, and when it ends."""

import pytest
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

import federation.membership
import federation.rounds
from checkpoint import load_checkpoint
from federation.audit import AuditLog
from federation.messages import from_record, message, pack, read, to_record
from federation.rounds import Federation
from federation.settings import FederationSettings
from federation.state import BEST, RunState
from test_membership import VERSIONS, Grid, Node, facts
from training import TrainingSettings
from transunet import TransUNet


class Worker(Node):
    """Gives weights that are all the round's number times `factor`; its scores come from a list, one a message."""

    def __init__(self, label: str, scores: list[float | None], factor: float = 1.0, failures: int = 0):
        super().__init__(facts(label))
        self.scores, self.factor, self.failures, self.heard, self.got = list(scores), factor, failures, [], []

    def answer(self, incoming: Message) -> Message | None:
        about = read(incoming.content)
        if "query" in about:
            return super().answer(incoming)
        self.heard.append(about)
        self.got.append(from_record(incoming.content["arrays"]))
        if self.failures:
            self.failures -= 1
            return Message(message({"failure": "bug"}), reply_to=incoming)
        dice = self.scores.pop(0)
        result = {"val_dice": dice, "val_patients": 0 if dice is None else 3, "seconds": 1.0}
        if "round" not in about:
            return Message(message(result), reply_to=incoming)
        weights = torch.full_like(self.got[-1], about["round"] * self.factor)
        result |= {"round": about["round"], "examples": 10, "train_loss": 1.0}
        return Message(message(result, to_record(weights)), reply_to=incoming)


@pytest.fixture
def run(monkeypatch, tmp_path):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(federation.membership, "LOOK", -1.0)
    monkeypatch.setattr(federation.rounds, "TICK", 0.01)
    monkeypatch.setattr(federation.rounds, "draw_curves", lambda *_: None)

    def go(workers: list[Worker], rounds: int, **training):
        settings = FederationSettings(clients=len(workers), rounds=rounds, round_timeout=20.0)
        state = RunState(TransUNet("tiny", 32), TrainingSettings(image_size=32, **training), settings, tmp_path, None)
        state.progress.started_from = "random weights"
        said, grid = [], Grid()
        grid.nodes = dict(enumerate(workers, 1))
        code = Federation(grid, state, VERSIONS, tmp_path, False, AuditLog(tmp_path / "audit.jsonl"), say=said.append).run()
        return code, state, said

    return go


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
