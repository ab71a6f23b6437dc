"""Federations of real hospitals in the test's own process, without Flower's: quick, and each message can be
looked at."""

import json

import pytest
import torch
from flwr.app import Message
from scripted import VERSIONS, make_fast

from benchmarks.local_federation import Grid, LocalHospital
from federation.protocol.answers import PatientPrivacy
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import payload
from federation.server.audit import AuditLog
from federation.server.rounds import Federation
from federation.server.state import RunState, load_run
from training import TrainingSettings
from transunet import TransUNet


class RealHospital(LocalHospital):
    """A local hospital of the scripted versions, with a promise to its patients perhaps, that keeps what it
    was asked."""

    def __init__(self, folder, cid, data, promise=None):
        super().__init__(folder, cid, data)
        self.asked = []
        privacy = promise and PatientPrivacy(**promise)
        self.identity = self.identity.model_copy(
            update={"medfl": VERSIONS["medfl"], "patient_privacy": privacy}
        )
        self.identity.save(self.folder)

    def answer(self, incoming: Message) -> Message:
        about, arrays = json.loads(incoming.content["about"]["json"]), incoming.content.get("arrays")
        reply = super().answer(incoming)
        if arrays is not None and about.get("part") != "test":
            self.asked.append({**about, "values": arrays["weights"].shape[0], "bytes": payload(arrays)})
        return reply


@pytest.fixture
def federate(monkeypatch, tmp_path, phantoms, home):
    """Run a federation of real hospitals, two if none are given, in this process: its state, its hospitals,
    what it said."""
    make_fast(monkeypatch)
    monkeypatch.setattr("federation.hospital.identity.local_versions", lambda medfl: VERSIONS)

    def run(
        rounds: int,
        training: dict | None = None,
        out: str = "out",
        resume: bool = False,
        hospitals=None,
        energy: bool = False,
        **settings,
    ):
        said, grid, folder = [], Grid(), tmp_path / out
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        federation = FederationSettings(
            **{"rounds": rounds, "round_timeout": 300.0, "val_fraction": 0.2, **settings}
        )
        settings = TrainingSettings(**{"image_size": 32, "batch_size": 8, **(training or {})})
        state = RunState(TransUNet("tiny", 32, settings.norm), settings, federation, folder, None)
        state.progress.started_from = "random weights"
        if resume:
            state.restore(load_run(folder)[2])
        hospitals = hospitals or [RealHospital(folder, cid, phantoms) for cid in (0, 1)]
        grid.nodes = dict(enumerate(hospitals, 1))
        code = Federation(
            grid,
            state,
            VERSIONS,
            folder,
            resume,
            AuditLog(folder / "audit.jsonl"),
            say=said.append,
            energy=energy,
        ).run()
        assert code == 0, said
        return state, hospitals, said

    return run
