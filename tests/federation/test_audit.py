"""The audit log holds together, and every way to change it is found."""

import json
import os
from pathlib import Path

import pytest
from running import run_here, run_script

from common import MedFLError
from federation.server.audit import NOTHING, AuditLog, verify


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path)
    for event in ("start", "joined", "round", "end"):
        audit.write(event, hospital="mercy", why="geändert")
    return path


def test_lines_follow_from_each_other_also_over_restarts(log):
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["n"] for line in lines] == [1, 2, 3, 4] and lines[0]["before"] == NOTHING
    count, last = verify(log)
    AuditLog(log).write("start")
    assert count == 4 and json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["before"] == last
    assert verify(log)[0] == 5


def remove(lines, at):
    return lines[:at] + lines[at + 1 :]


CHANGES = {
    "changed": lambda lines: [lines[0], lines[1].replace("mercy", "hope"), *lines[2:]],
    "removed": lambda lines: remove(lines, 1),
    "swapped": lambda lines: [lines[1], lines[0], *lines[2:]],
    "added": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "the first is gone": lambda lines: lines[1:],
    "nonsense": lambda lines: [*lines[:2], "{", *lines[3:]],
    "other JSON": lambda lines: [*lines[:2], "[]", *lines[3:]],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found(log, name):
    lines = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join(CHANGES[name](lines)) + "\n", encoding="utf-8")
    with pytest.raises(MedFLError, match="does not follow"):
        verify(log)
    with pytest.raises(MedFLError, match="does not follow"):
        AuditLog(log)


def test_a_line_that_a_full_disk_left_half_is_cut_and_told(log):
    """The check of a finished log tells it; a server that goes on cuts it, and writes that down."""
    log.write_bytes(log.read_bytes()[:-9])
    with pytest.raises(MedFLError, match="cut off"):
        verify(log)
    AuditLog(log).write("start")
    events = [json.loads(line)["event"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert events == ["start", "joined", "round", "cut", "start"] and verify(log)[0] == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here to play a full disk")
def test_a_line_that_does_not_fit_leaves_nothing_behind(log, monkeypatch):
    audit, whole, real = AuditLog(log), log.read_bytes(), os.fsync

    def full(file):
        os.write(file, b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MedFLError, match="free the space"):
        audit.write("round")
    monkeypatch.setattr("os.fsync", real)
    assert log.read_bytes().startswith(whole) and verify(log)[0] in (4, 5)


def test_the_copy_of_the_end_beside_the_kit_shows_a_log_that_was_cut_or_written_anew(tmp_path):
    path, ends = tmp_path / "audit.jsonl", tmp_path / "kit" / "audit_ends.json"
    audit = AuditLog(path, ends)
    for event in ("start", "joined", "round"):
        audit.write(event)
    AuditLog(path, ends).write("end")
    assert ends.stat().st_mode & 0o077 == 0
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(MedFLError, match="cut off, rewritten or removed"):
        AuditLog(path, ends)
    path.unlink()
    for event in ("start", "joined", "round", "end"):
        AuditLog(path).write(event, by="somebody")
    with pytest.raises(MedFLError, match="cut off, rewritten or removed"):
        AuditLog(path, ends)
    path.write_bytes(whole)
    AuditLog(path, ends)


def test_the_end_that_was_cut_off_shows_in_the_hash_that_the_command_prints(log):
    done = run_script("provision.py", "audit", log)
    assert done.returncode == 0 and "4 lines" in done.stdout and verify(log)[1] in done.stdout, done.stderr
    log.write_text("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    assert verify(log)[1] not in done.stdout
    log.write_text("no log\n", encoding="utf-8")
    done = run_here("provision.py", "audit", log)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
