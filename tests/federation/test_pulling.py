"""Answers that come slowly or are no messages, beside honest ones that come late: on a grid that hands them out
as Flower does, piece by piece and with whatever error they cause."""

import json
import threading
import time

import pytest
import scripted
from scripted import Grid, Worker, federate, make_fast

import federation.server.pulling


class Dripping(Grid):
    """Answers of nodes in `drips` never get whole, those of `late` come after so many seconds, and those of
    `odd` raise when they are read."""

    drips, odd, late = frozenset(), frozenset(), {}
    over = threading.Event()

    def push_messages(self, messages):
        accepted = super().push_messages(messages)
        self.sent = getattr(self, "sent", {}) | {
            identity: (one.metadata.dst_node_id, one.metadata.message_type == "train", time.monotonic())
            for identity, one in zip(accepted, messages)
        }
        return accepted

    def pull_messages(self, identities):
        for identity in identities:
            node, trains, when = self.sent[identity]
            if trains and node in self.drips:
                self.over.wait(20)
                return []
            if trains and node in self.odd:
                raise KeyError("a child")
            if trains and time.monotonic() < when + self.late.get(node, 0):
                return []
        return super().pull_messages(identities)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Federate hospitals over such a grid: exit code, the labels of each round, what was left out and why, what
    was said, and the seconds that it took."""
    make_fast(monkeypatch)

    def go(hospitals: int, drips=(), late=None, odd=(), rounds: int = 1, **settings):
        attributes = {"drips": set(drips), "late": late or {}, "odd": set(odd), "over": threading.Event()}
        monkeypatch.setattr(scripted, "Grid", type("Dripping", (Dripping,), attributes))
        workers = [Worker(f"hospital-{k}", [0.5] * 9) for k in range(hospitals)]
        began = time.monotonic()
        code, _, said = federate(workers, rounds, tmp_path, federation={"min_clients": 1, **settings})
        seconds = time.monotonic() - began
        attributes["over"].set()
        events = list(map(json.loads, (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()))
        rounds = [event["hospitals"] for event in events if event["event"] == "round"]
        left = {event["hospital"]: event["why"] for event in events if event["event"] == "left_out"}
        return code, rounds, left, said, seconds

    return go


def test_a_dripping_answer_throws_no_late_honest_one_out(run):
    """Node 1 begins to answer at once, and its pieces never end; the others answer when the time is nearly
    over."""
    code, rounds, left, _, seconds = run(3, drips=[1], late={2: 1.5, 3: 1.5}, round_timeout=3.0)
    assert code == 0 and rounds == [["hospital-1", "hospital-2"]] and seconds < 12
    assert left == {"hospital-0": "no answer within 3 s"}


def test_more_dripping_answers_than_are_taken_at_once_hold_nobody_up(run, monkeypatch):
    monkeypatch.setattr(federation.server.pulling, "SLOW", 0.3)
    many = federation.server.pulling.AT_ONCE + 1
    drips = range(1, many + 1)
    code, rounds, left, _, _ = run(2 * many, drips=drips, late={2 * many: 0.5}, round_timeout=3.0)
    assert code == 0 and rounds == [sorted(f"hospital-{k}" for k in range(many, 2 * many))]
    assert set(left) == {f"hospital-{k}" for k in range(many)}


def test_pulling_has_a_deadline_of_its_own(run, monkeypatch):
    """Long before the round's time is over."""
    monkeypatch.setattr("federation.server.mailbox.time_for", lambda size: 0.5)
    code, rounds, left, _, seconds = run(3, drips=[1], round_timeout=600.0)
    assert code == 0 and rounds == [["hospital-1", "hospital-2"]] and seconds < 12
    assert "piece by piece and was not complete" in left["hospital-0"]


def test_an_answer_that_is_no_message_takes_no_other_with_it(run):
    """Flower raises for it, and gives none of those that were asked for together with it twice."""
    code, rounds, left, _, _ = run(3, odd=[2], rounds=2)
    assert code == 0 and rounds == [["hospital-0", "hospital-2"]] * 2
    assert left == {"hospital-1": "its answer can't be read"}


def test_one_update_of_three_is_no_round_whatever_the_quorum_is(run):
    """--min-clients 1 does not let one hospital's update alone become the model while others are there."""
    code, rounds, left, said, _ = run(3, odd=[2, 3])
    assert code == 3 and rounds == [] and set(left) == {"hospital-1", "hospital-2"}
    assert any("round 1 got 1 updates and needs 2" in line for line in said)
