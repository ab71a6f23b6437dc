"""`provision.py audit` with a kit: the log's end is compared with its copy there, and every update's signature with
its hospital's keys, also those that it had before."""

import json
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from running import run_here

from common import MedFLError
from federation.protocol.proofs import sign
from federation.runtime import admissions
from federation.server.audit import ENDS, AuditLog, check_end, check_signatures

UNTIL = "2999-01-01T00:00:00+00:00"


def public(key: ec.EllipticCurvePrivateKey) -> str:
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
    )


class Run:
    """A kit with two hospitals, and a log of two rounds that both signed."""

    def __init__(self, folder):
        self.kit, self.path = folder / "kit", folder / "models" / "audit.jsonl"
        self.kit.mkdir(mode=0o700)
        self.keys = {label: ec.generate_private_key(ec.SECP384R1()) for label in ("hope", "mercy")}
        admitted = {
            label: admissions.Admission(public(key), UNTIL, UNTIL) for label, key in self.keys.items()
        }
        admissions.write_admissions(self.kit, admitted)
        self.log = AuditLog(self.path, self.kit / ENDS)
        self.log.write("start", keys=True, resumed=False)
        for number in (1, 2):
            for label in self.keys:
                self.signed(number, label, self.keys[label])
            self.log.write("round", round=number, updates=sorted(self.keys))

    def signed(self, number: int, label: str, key: ec.EllipticCurvePrivateKey, **other) -> None:
        one = {
            "ticket": "0" * 32,
            "run": "r",
            "round": number,
            "answer": "a" * 64,
            "update": "b" * 64,
            **other,
        }
        self.log.write("signed", hospital=label, **one, signature=sign(key, "answer", one))

    def audit(self):
        return run_here("provision.py", "audit", self.path, "--kit", self.kit)

    def written_anew(self, change) -> None:
        """The log with lines changed, by somebody who works out all hashes again."""
        events = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        self.path.unlink()
        log = AuditLog(self.path)
        for event in change(events):
            log.write(**{name: value for name, value in event.items() if name not in ("n", "time", "before")})


@pytest.fixture
def ran(tmp_path):
    return Run(tmp_path)


def test_end_and_signatures_are_looked_at(ran):
    done = ran.audit()
    assert done.returncode == 0, done.stderr
    assert "4 signed updates, each by its hospital's key" in done.stdout and "its end matches" in done.stdout


def test_a_log_that_was_cut_or_written_anew_is_refused(ran):
    whole = ran.path.read_bytes()
    ran.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    cut = ran.audit()
    ran.written_anew(lambda events: [*events, {"event": "end", "exit": 0}])
    anew = ran.audit()
    for done in (cut, anew):
        assert done.returncode == 2 and "cut off, rewritten or removed" in done.stderr, done


def test_a_line_that_was_added_at_the_end_is_refused(ran):
    """It follows from the one before it, and only the kit knows that there was none."""
    AuditLog(ran.path).write("blamed", hospital="mercy", why="somebody says so")
    done = ran.audit()
    assert done.returncode == 2 and "lines were added" in done.stderr, done
    with pytest.raises(MedFLError, match="lines were added"):
        AuditLog(ran.path, ran.kit / ENDS)


@pytest.mark.parametrize("written", [False, True])
def test_a_server_that_is_killed_while_it_writes_a_line_goes_on(ran, monkeypatch, written):
    real, calls = AuditLog._keep_end, []

    def killed(self, *end) -> None:
        calls.append(end)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, *end)

    whole = ran.path.read_bytes()
    monkeypatch.setattr(AuditLog, "_keep_end", killed)
    with pytest.raises(KeyboardInterrupt):
        ran.log.write("round", round=3)
    if not written:
        ran.path.write_bytes(whole)
    monkeypatch.undo()
    AuditLog(ran.path, ran.kit / ENDS).write("end", exit=0)
    assert check_end(ran.path, ran.kit / ENDS)


def another_update(events):
    return [{**one, "update": "c" * 64} if one["event"] == "signed" else one for one in events]


def another_hospital(events):
    return [{**one, "hospital": "hope"} if one["event"] == "signed" else one for one in events]


def nobodys(events):
    return [one for one in events if one["event"] != "signed"]


def a_strangers(events):
    return [{**one, "hospital": "stranger"} if one["event"] == "signed" else one for one in events]


def of_lists(events):
    return [
        {**one, "round": [1], "hospital": {"a": [1]}} if one["event"] == "signed" else one for one in events
    ]


def of_no_event(events):
    return [{"event": [], "updates": 5}, {"event": "round", "round": [[]], "updates": ["hope"]}]


def a_number_of_updates(events):
    return [{**one, "updates": 5} if one["event"] == "round" else one for one in events]


def nothing_said(events):
    return [{"event": "signed", "hospital": "hope"} if one["event"] == "signed" else one for one in events]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (another_update, "not signed with a key of hope"),
        (another_hospital, "not signed with a key of hope"),
        (nobodys, "but no line holds its signature"),
        (a_strangers, "names stranger, which the kit does not know"),
        (of_lists, "says nothing that could have been signed"),
        (nothing_said, "says nothing that could have been signed"),
        (a_number_of_updates, "does not say whose updates it counts"),
    ],
)
def test_a_signature_that_is_not_the_hospitals_is_refused(ran, change, sentence):
    """Also by who can write the log and the kit's copy of its end."""
    ran.written_anew(change)
    (ran.kit / ENDS).unlink()
    done = ran.audit()
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done


def test_a_log_of_another_form_ends_in_no_traceback(ran):
    ran.written_anew(of_no_event)
    (ran.kit / ENDS).unlink()
    assert ran.audit().returncode == 0
    ran.path.write_bytes(b"[" * 100_000 + b"\n")
    done = ran.audit()
    assert done.returncode == 2 and "does not follow" in done.stderr


def test_updates_of_a_former_key_are_still_known_and_the_key_is_not_admitted_again(ran):
    new = public(ec.generate_private_key(ec.SECP384R1()))
    former = admissions.read_admissions(ran.kit)["mercy"].public_key
    admissions.revoke(ran.kit, "mercy")
    admissions.admit(ran.kit, f"{new} mercy", 1)
    assert admissions.read_admissions(ran.kit)["mercy"].former == [former]
    assert ran.audit().returncode == 0
    line = ran.kit.parent / "former.pub"
    line.write_text(f"{former} mercy\n", encoding="utf-8")
    with pytest.raises(MedFLError, match="was revoked"):
        admissions.admit(ran.kit, line.read_text(encoding="utf-8"), 1)
    assert datetime.fromisoformat(admissions.read_admissions(ran.kit)["mercy"].until) > datetime.now(UTC)


def test_what_was_not_looked_at_is_said(ran, tmp_path):
    done = run_here("provision.py", "audit", ran.path, "--kit", tmp_path / "none")
    assert done.returncode == 0 and "signatures were not checked" in done.stdout
    assert "no copy of its end" in done.stdout


@pytest.mark.parametrize("other", [{"update": None}, {"run": "another"}], ids=str)
def test_a_refusal_and_another_runs_update_are_no_update_of_this_run(ran, other):
    """Hospitals sign these as well, and a server could put them into the log."""
    ran.signed(3, "hope", ran.keys["hope"], **other)
    keys = {label: [public(key)] for label, key in ran.keys.items()}
    with pytest.raises(MedFLError, match="line 8 of .*(could have been signed|another run)"):
        check_signatures(ran.path, keys)
