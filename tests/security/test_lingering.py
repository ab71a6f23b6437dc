"""A key that another process has, or had until it was killed: what run_client.py does meanwhile.

Flower lets go of a dead connection after about a minute, and of a living one never; so the connections here
are scripted. test_gateway.py has a killed hospital that comes back, with real processes.
"""

import time

import pytest

from common import MedFLError
from federation.runtime import connection
from storage.files import write_json

AGAIN = 0.02


class Scripted:
    """Connections that are refused so many times, and then work."""

    refusals, made = 0, 0

    def __init__(self, server, kit, folder):
        type(self).made += 1
        self.began = time.monotonic()
        self.refused = self.made <= self.refusals
        if not self.refused:
            write_json(folder / "ended.json", {"exit": 0, "sentence": "the federation is over"})

    @property
    def broken(self) -> bool:
        """As with Flower's, a refusal takes a while to come."""
        return self.refused and time.monotonic() - self.began > AGAIN

    def stop(self) -> None:
        pass


@pytest.fixture
def watch(monkeypatch, tmp_path):
    monkeypatch.setattr(connection, "Connection", Scripted)
    monkeypatch.setattr(connection, "ask_admission", lambda *_: "admitted")
    health = iter([True] * 10_000)
    monkeypatch.setattr(connection, "is_healthy", lambda *_, **__: next(health))
    monkeypatch.setattr(connection, "tell_hospital", lambda *_: None)
    for name, value in {"LOOK": 0.001, "AGAIN": AGAIN, "LINGERS": 20 * AGAIN, "PARTING": 0.0}.items():
        monkeypatch.setattr(connection, name, value)
    monkeypatch.setattr(Scripted, "made", 0)
    return connection.Watch("127.0.0.1:1", "127.0.0.1", 1, tmp_path, tmp_path, 5.0)


def test_it_waits_until_the_server_lets_go_and_says_so_once(watch, monkeypatch, capsys):
    monkeypatch.setattr(Scripted, "refusals", 4)
    assert watch.run() == (0, "the federation is over") and Scripted.made == 5
    assert capsys.readouterr().out.count("still holds a connection") == 1


def test_it_gives_up_where_another_process_has_the_key(watch, monkeypatch):
    monkeypatch.setattr(Scripted, "refusals", 1_000)
    with pytest.raises(MedFLError, match="another process takes part with this hospital's key"):
        watch.run()


def test_a_clock_is_waited_for_and_told_once(watch, monkeypatch, capsys):
    """The machine's, or the server's, was set wrong and is set right again."""
    monkeypatch.setattr(Scripted, "refusals", 3)
    monkeypatch.setattr(connection, "ask_admission", lambda *_: "clock")
    assert watch.run() == (0, "the federation is over") and Scripted.made == 4
    assert capsys.readouterr().out.count("this machine's time") == 1


def test_a_clock_is_not_waited_for_longer_than_the_hospital_waits(watch, monkeypatch):
    monkeypatch.setattr(Scripted, "refusals", 1_000)
    monkeypatch.setattr(connection, "ask_admission", lambda *_: "clock")
    watch.wait = 5 * AGAIN
    with pytest.raises(MedFLError, match="this machine's time"):
        watch.run()
    assert Scripted.made > 1


@pytest.mark.parametrize(
    ("said", "patient", "sentence"),
    [("unknown", True, "does not admit"), ("clock", False, "this machine's time")],
)
def test_what_does_not_pass_ends_it_at_once(watch, monkeypatch, said, patient, sentence):
    """A key that is not admitted; with --check, also a wrong clock."""
    monkeypatch.setattr(Scripted, "refusals", 1_000)
    monkeypatch.setattr(connection, "ask_admission", lambda *_: said)
    watch.patient = patient
    with pytest.raises(MedFLError, match=sentence):
        watch.run()
    assert Scripted.made == 1
