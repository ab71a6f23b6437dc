"""Federations in one process, without Flower's processes: the product's own round loop, and its hospitals one after
the other.

The weights are the same as from run_server.py and run_client.py, but there is no network, and nothing waits. Used for
studies of many federations, and for hostile hospitals, whose answers can be changed on their way.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import federation.server.exchange
import federation.server.membership
from common import __version__
from federation.hospital.app import make_app
from federation.hospital.identity import Identity
from federation.protocol.messages import local_versions
from federation.protocol.settings import FederationSettings
from federation.server.audit import AuditLog
from federation.server.rounds import Federation
from federation.server.state import RunState
from training import TrainingSettings


class Grid:
    """Nodes by number. Like Flower's SuperLink, it does not accept a message to a node that does not exist."""

    def __init__(self):
        self.nodes, self.replies, self.ids = {}, {}, itertools.count(1)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        accepted = []
        for sent in messages:
            node = self.nodes.get(sent.metadata.dst_node_id)
            identity = f"message {next(self.ids)}" if node else ""
            sent.metadata.__dict__["_message_id"] = identity
            if node and (reply := node.answer(sent)):
                self.replies[identity] = reply
            accepted.append(identity)
        return accepted

    def pull_messages(self, identities):
        return [self.replies.pop(identity) for identity in identities if identity in self.replies]


class LocalHospital:
    """A node that answers with a hospital's own app, in this process. change: turns each answer into another."""

    def __init__(
        self,
        folder: Path,
        cid: int,
        data: Path,
        change: Callable[[Message, Message], Message] | None = None,
        device: str = "cpu",
    ):
        self.folder, self.change = folder / f"hospital-{cid}", change
        self.identity = Identity(
            label=f"hospital-{cid}",
            cid=cid,
            data=data,
            device=device,
            medfl=__version__,
            models=folder / "models",
            code="0" * 64,
        )
        self.identity.save(self.folder)
        self.app, self.context = make_app(lambda context: self.folder), Context(1, 1, {}, RecordDict(), {})

    def answer(self, incoming: Message) -> Message:
        reply = self.app(incoming, self.context)
        return self.change(incoming, reply) if self.change else reply


def run(
    hospitals: list[LocalHospital],
    training: TrainingSettings,
    settings: FederationSettings,
    out: Path,
    start: torch.Tensor | None = None,
    say: Callable[[str], None] = print,
) -> tuple[RunState, list[dict]]:
    """Run a federation of these hospitals. Returns its state and the audit log's entries. start: weights to begin
    with, (n,) float32."""
    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = (
        1  # Flower makes messages only inside a run
    )
    federation.server.membership.LOOK, federation.server.exchange.TICK = (
        -1.0,
        0.0,
    )  # there is nothing to wait for
    torch.manual_seed(training.seed)
    state = RunState(training.network(), training, settings, out, None)
    state.progress.started_from = "random weights"
    if start is not None:
        state.weights, state.progress.started_from = start, "checkpoint"
    grid = Grid()
    grid.nodes = dict(enumerate(hospitals, 1))
    code = Federation(
        grid, state, local_versions(__version__), out, False, AuditLog(out / "audit.jsonl"), say=say
    ).run()
    if code:
        raise RuntimeError(f"the federation ended with {code}")
    return state, [
        json.loads(line) for line in (out / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    ]
