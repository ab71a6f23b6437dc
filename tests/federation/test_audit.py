"""The audit log holds together, and every way to change it is found."""

import json

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


def test_a_line_that_is_cut_off_is_told(log):
    log.write_bytes(log.read_bytes()[:-9])
    with pytest.raises(MedFLError, match="cut off"):
        AuditLog(log)


def test_the_end_that_was_cut_off_shows_in_the_hash_that_the_command_prints(log):
    done = run_script("provision.py", "audit", log)
    assert done.returncode == 0 and "4 lines" in done.stdout and verify(log)[1] in done.stdout, done.stderr
    log.write_text("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    assert verify(log)[1] not in done.stdout
    log.write_text("no log\n", encoding="utf-8")
    done = run_here("provision.py", "audit", log)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
