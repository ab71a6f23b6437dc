"""Hospitals and a grid that answer as a test says, for cases that real processes can't be brought into at
will."""

import torch
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

import federation.server.exchange
import federation.server.membership
import federation.server.record
from benchmarks.local_federation import Grid
from federation.protocol.messages import Query, message, read
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import from_record, to_record
from federation.server.audit import AuditLog
from federation.server.rounds import Federation
from federation.server.state import RunState, load_run
from training import TrainingSettings
from transunet import ARCHITECTURES, Architecture, TransUNet

TINIER = Architecture("test_vit", (8, 8, 16, 16), (16, 16, 8))
VERSIONS = {"medfl": "1", "flwr": "1", "timm": "1", "torch": "1"}


def facts(label: str, **other) -> dict:
    part = {"patients": 4, "slices": 80}
    cid = int(label.removeprefix("hospital-")) if label.startswith("hospital-") else None
    return {
        "label": label,
        "session": f"session of {label}",
        "cid": cid,
        "versions": VERSIONS,
        "own_data": cid is None,
        "data": "phantoms",
        "parts": {"train": part, "val": part, "test": part},
        "images": None,
        "device": "cpu",
        "split_sha256": None if cid is None else "s",
        "partition_sha256": None if cid is None else "p",
        "patient_privacy": None,
        **other,
    }


class Node:
    """A hospital: what it says at joining, whether it answers at all, and what it was told at the end."""

    def __init__(self, introduction, silent: bool = False):
        self.introduction, self.silent, self.ends = introduction, silent, []

    def answer(self, incoming: Message) -> Message | None:
        about = read(incoming.content)
        if about["query"] == Query.END:
            self.ends.append(about["code"])
        if self.silent:
            return None
        if about["query"] == Query.JOIN:
            if isinstance(self.introduction, int):
                return Message(Error(self.introduction, "x"), reply_to=incoming)
            return Message(message(self.introduction), reply_to=incoming)
        return Message(message({}), reply_to=incoming)


class Worker(Node):
    """Gives weights that are all the round's number times `factor`; its scores come from a list, one a
    message."""

    def __init__(self, label: str, scores: list[float | None], factor: float = 1.0, failures: int = 0):
        super().__init__(facts(label))
        self.test_dice = 0.5
        self.scores, self.factor, self.failures, self.heard, self.got = list(scores), factor, failures, [], []

    def answer(self, incoming: Message) -> Message | None:
        about = read(incoming.content)
        if "query" in about:
            return super().answer(incoming)
        if about.get("part") == "test":
            score = {"test_dice": self.test_dice, "test_patients": 4, "seconds": 1.0}
            return Message(message(score), reply_to=incoming)
        self.heard.append(about)
        self.got.append(from_record(incoming.content["arrays"]))
        if self.failures:
            self.failures -= 1
            return Message(message({"failure": "bug"}), reply_to=incoming)
        dice = self.scores.pop(0)
        result = {"val_dice": dice, "val_patients": 0 if dice is None else 4, "seconds": 1.0}
        if "round" not in about:
            return Message(message(result), reply_to=incoming)
        weights = torch.full_like(self.got[-1], about["round"] * self.factor)
        result |= {"round": about["round"], "examples": 10, "train_loss": 1.0, "patient_epsilon": None}
        return Message(message(result, to_record(weights)), reply_to=incoming)


def make_messages_outside_of_a_run(monkeypatch) -> None:
    """Flower makes messages only where a run's identity is known."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def make_fast(monkeypatch) -> None:
    """Let messages be made outside of a run, the loop look for answers all the time, and `tiny` be a
    twentieth of its size."""
    make_messages_outside_of_a_run(monkeypatch)
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINIER)
    monkeypatch.setattr(federation.server.membership, "LOOK", -1.0)
    monkeypatch.setattr(federation.server.exchange, "TICK", 0.01)
    monkeypatch.setattr(federation.server.record, "draw_curves", lambda *_: None)


def federate(
    workers: list[Worker],
    rounds: int,
    out,
    weights: torch.Tensor | None = None,
    federation: dict | None = None,
    resume: bool = False,
    keys: dict[int, str] | None = None,
    **training,
) -> tuple[int, RunState, list[str]]:
    """Exit code, final state and spoken lines of a federation of these hospitals. weights: numbers to start
    from in the place of a model, none of which is a variance; federation: more of its settings; keys: public
    keys by node, where they are asked for."""
    settings = FederationSettings(
        **{"clients": len(workers), "rounds": rounds, "round_timeout": 20.0, **(federation or {})}
    )
    model = TransUNet("tiny", 32, training.get("norm", "batch"))
    state = RunState(model, TrainingSettings(image_size=32, **training), settings, out, None)
    if weights is not None:
        state.weights = weights
    state.progress.started_from = "random weights"
    if resume:
        state.restore(load_run(out)[2])
    said, grid = [], Grid()
    grid.nodes = dict(enumerate(workers, 1))
    subject = Federation(
        grid,
        state,
        VERSIONS,
        out,
        resume,
        AuditLog(out / "audit.jsonl"),
        lambda: keys and {node: grid.nodes[node].introduction["label"] for node in keys},
        said.append,
        lambda: keys,
    )
    if weights is not None:
        subject.collector.variances = torch.zeros_like(subject.collector.variances)
    code = subject.run()
    return code, state, said
