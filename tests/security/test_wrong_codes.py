"""A hospital of four makes another one drop out of a secure sum, by shares of no use, and says codes to the two
others that fit nothing, or none: they give no shares. The blame is its own, and the run goes on without it."""

import json

import pytest
from in_process import RealHospital

import federation.server.secure_round
from federation.protocol.messages import message


def fitting_nothing(said: dict) -> None:
    said["codes"] = dict.fromkeys(said["codes"], "0" * 64)


class Saboteur(RealHospital):
    def __init__(self, *where, spoil):
        super().__init__(*where)
        self.spoil = {"shares": lambda said: said["sealed"].update({"1": "ab" * 60}), "agree": spoil}

    def answer(self, incoming):
        query = json.loads(incoming.content["about"]["json"]).get("query")
        reply = super().answer(incoming)
        if query not in self.spoil:
            return reply
        if self.spoil[query] is None:
            return None
        said = json.loads(reply.content["about"]["json"])
        self.spoil[query](said)
        return type(incoming)(message(said), reply_to=incoming)


@pytest.mark.parametrize("spoil", [fitting_nothing, dict.clear, None], ids=["wrong", "no codes", "no answer"])
def test_who_makes_a_sum_impossible_by_its_codes_does_not_end_the_run(
    federate, monkeypatch, phantoms, tmp_path, spoil
):
    monkeypatch.setattr(federation.server.secure_round, "STAGE_TIME", 2.0)
    hospitals = [RealHospital(tmp_path / "out", cid, phantoms) for cid in range(3)]
    hospitals.append(Saboteur(tmp_path / "out", 3, phantoms, spoil=spoil))
    settings = {"clients": 4, "partition": "iid", "val_fraction": 0.0, "secure_aggregation": True}
    state, _, _ = federate(2, hospitals=hospitals, **settings)
    log = (tmp_path / "out" / "audit.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in log.splitlines()]
    assert {event["hospital"] for event in events if event["event"] == "blamed"} <= {"hospital-3"}
    summed = {row["site"] for row in state.progress.rows if row["round"] == 2 and row["examples"]}
    assert summed == {f"hospital-{k}" for k in range(3)}
