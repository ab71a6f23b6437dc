"""The audit log: the events of a federation, in lines that nobody can change, remove or reorder unnoticed.

Lines are only ever appended to `audit.jsonl`. Each line is JSON: `n` (its number, from 1), `time` (UTC), `event`,
the event's own entries, and `before`: the SHA-256 of the line before it (64 zeros for the first line). The log
holds no figure of a patient or slice, no name of a patient or a file, and no path. A copy of the last line's hash,
kept elsewhere, also shows whether the end was cut off; a server with a kit keeps this copy in the kit.

Events: start (SHA-256 of settings and code, versions, whether keys are asked for), joined, refused, left, round
(the hospitals, and the file that was written), left_out (the hospital whose update was left out, and why),
statistics_left_out (the hospital whose statistics did not count, and why), failed (a round that too few hospitals
completed), collapse (a round's model that was taken back), signed (an update that was accepted: the statement that
its hospital signed, and the signature), blamed (the hospital that broke the secure aggregation, and how), lost (a
round whose sum became impossible, and the file that was written), cut (a half-written line, after a full disk),
checkpoint (the best model so far), delivered (the hospitals that have the model), end (exit code).
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from common import MedFLError, utc_now
from federation.protocol.proofs import check
from storage.files import atomic_write, file_sha256

AUDIT = "audit.jsonl"  # in the folder that a run writes
NOTHING = "0" * 64
SHA256 = re.compile("[0-9a-f]{64}")

# in the server's kit: {path of a log: [lines, SHA-256 of the last line]}, and the next line's SHA-256 while that
# line is being written
ENDS = "audit_ends.json"


class AuditLog:
    """Appends to the log in `path`. A half-written last line is cut off, and the log says so.

    ends: the file beside the kit's keys in which a copy of the log's end is kept; None without a kit. Raises
    MedFLError if the existing log was changed or can't be written.
    """

    def __init__(self, path: Path, ends: Path | None = None):
        self.path, self.ends = path, ends
        half = cut_half_line(path)
        self._count, self._last = verify(path) if path.exists() else (0, NOTHING)
        check_end(path, ends)
        if half:
            self.write("cut", bytes=half)

    @property
    def end(self) -> tuple[int, str]:
        """The number of lines and the SHA-256 of the last line."""
        return self._count, self._last

    @property
    def head(self) -> str:
        """SHA-256 of the last line."""
        return self._last

    def write(self, event: str, **about) -> None:
        """Append a line. It is on disk when this returns."""
        line = json.dumps(
            {"n": self._count + 1, "time": utc_now(), "event": event, **about, "before": self._last},
            ensure_ascii=False,
            allow_nan=False,
        )
        new = hashlib.sha256(line.encode()).hexdigest()
        self._keep_end(self._count, self._last, new)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                cut_half_line(self.path)
            raise MedFLError(
                f"{self.path} can't be written ({error.strerror or error}); free the space, then continue with "
                "--resume"
            ) from error
        self._count, self._last = self._count + 1, new
        self._keep_end(self._count, self._last)

    def _keep_end(self, *end: int | str) -> None:
        """Keep a copy of the log's end, and the hash of its next line, in the kit. Other runs may keep theirs in the
        same file."""
        if not self.ends:
            return
        with FileLock(f"{self.ends}.lock"):
            kept = {**_read_ends(self.ends), str(self.path.resolve()): end}
            with atomic_write(self.ends, "w", private=True) as file:
                json.dump(kept, file, indent=2)


def cut_half_line(path: Path) -> int:
    """Cut off a last line that a full disk left incomplete; returns how many bytes that was."""
    if not path.exists() or (content := path.read_bytes()).endswith(b"\n") or not content:
        return 0
    whole = content.rfind(b"\n") + 1
    os.truncate(path, whole)
    return len(content) - whole


def check_end(path: Path, ends: Path | None) -> bool:
    """Whether there is a copy of the log's end to compare with. Raises MedFLError if the log in `path` ends neither
    with the last line according to that copy nor with the line that was being written."""
    kept = _read_ends(ends).get(str(path.resolve())) if ends else None
    if kept is None or not path.exists():
        return False
    number, sha256, *begun = kept
    by = f"the copy of its end in {ends}"
    check_line(path, number, sha256, by)
    more = [hashlib.sha256(line).hexdigest() for line in path.read_bytes().splitlines()[number:]]
    if more not in ([], begun):
        raise MedFLError(
            f"{path} continues after line {number}, the last one according to {by}: lines were added; put back a copy, "
            "and find out who can write there"
        )
    return True


def check_signatures(path: Path, keys: Mapping[str, list[str]]) -> int:
    """The number of signed updates in the log, each signed with a key that its hospital has or had.

    keys: public keys (OpenSSH's lines) by label. Raises MedFLError that names the first line whose signature was
    not made by that hospital, belongs to no update or to another run, or does not match the line, and the first
    round that counts an update without a signature.
    """
    signed: set[tuple[str, str]] = set()
    count, asked, run = 0, False, None
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        about = json.loads(line)
        where = f"line {number} of {path}"
        event = about.get("event")
        if event == "start":
            asked = bool(about.get("keys"))
            if not about.get("resumed"):
                signed, run = set(), None  # another run's rounds have the same numbers
        elif event == "signed":
            _check_signed(about, keys, where)
            run = run or about["run"]
            if about["run"] != run:
                raise MedFLError(
                    f"{where} is signed for another run than the lines before it; the log was changed"
                )
            signed.add((str(about["round"]), str(about["hospital"])))
            count += 1
        elif event == "round" and asked:
            counted = about.get("updates") or []
            if not isinstance(counted, dict | list):
                raise MedFLError(f"{where} does not say whose updates it counts; the log was changed")
            for hospital in map(str, counted):
                if (str(about.get("round")), hospital) not in signed:
                    raise MedFLError(
                        f"{where} counts an update of {hospital}, but no line holds its signature; ask that "
                        "hospital, and find out who can write there"
                    )
    return count


def _check_signed(about: dict, keys: Mapping[str, list[str]], where: str) -> None:
    """Raises MedFLError if what a line says was not signed with a key of its hospital."""
    try:
        hospital, signature = str(about["hospital"]), str(about["signature"])
        statement = {name: about[name] for name in ("ticket", "run", "round", "answer", "update")}
        _ = int(about["round"])
        if not SHA256.fullmatch(about["update"]):  # a hospital also signs its refusals, which hold no update
            raise ValueError("no update")
    except (KeyError, TypeError, ValueError) as error:
        raise MedFLError(f"{where} says nothing that could have been signed; the log was changed") from error
    if hospital not in keys:
        raise MedFLError(f"{where} names {hospital}, which the kit does not know; name the run's own --kit")
    for key in keys[hospital]:
        with contextlib.suppress(MedFLError):
            return check(key, "answer", statement, signature)
    raise MedFLError(
        f"{where} is not signed with a key of {hospital} that the kit knows; name the run's own --kit, or ask "
        "that hospital what it sent"
    )


def check_line(path: Path, number: int, sha256: str, by: str) -> None:
    """Raises MedFLError if line `number` of the log, from 1, has another SHA-256. by: the source of that hash."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    if number and (len(lines) < number or hashlib.sha256(lines[number - 1]).hexdigest() != sha256):
        raise MedFLError(
            f"{path} does not have the line {number} that {by} names: the log was cut off, rewritten or "
            "removed; put back a copy, and find out who can write there"
        )


def hashes_of(name: str, log: Path) -> list[str]:
    """The SHA-256 that the log holds for a file of this name, once for each time that the file was written. Unreadable
    lines are ignored here; `verify` and `cut_half_line` report them."""
    said = []
    for line in log.read_bytes().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError, AttributeError, KeyError, RecursionError):
            about = json.loads(line)
            if about.get("file") == name:
                said.append(about["sha256"])
    return said


def check_file(path: Path, log: Path) -> None:
    """Raises MedFLError if a file is not the one that the log says was written last."""
    said = hashes_of(path.name, log)
    if said and file_sha256(path) != said[-1]:
        raise MedFLError(
            f"{path} is not the file whose hash is in {log}: it was changed, by somebody or by evaluate.py "
            "(--write-back, --fit-temperature); put back a copy of both, or start a new run elsewhere"
        )


def _read_ends(ends: Path) -> dict:
    """The copies of the ends of logs, by the log's path."""
    if not ends.exists():
        return {}
    try:
        return dict(json.loads(ends.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise MedFLError(
            f"{ends}, which holds copies of the ends of logs, is damaged; put back a copy, or remove it if you know "
            "that no log was changed"
        ) from error


def verify(path: Path) -> tuple[int, str]:
    """The number of lines and the SHA-256 of the last line. Raises MedFLError that names the first line that does
    not fit."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise MedFLError(
            f"{path} can't be read ({error.strerror}); name the audit.jsonl that run_server.py wrote"
        ) from error
    if content and not content.endswith(b"\n"):
        raise MedFLError(
            f"the last line of {path} is cut off; put back a copy, or move it away to begin a new one"
        )
    count, last = 0, NOTHING
    for count, line in enumerate(content.splitlines(), start=1):
        try:
            about = json.loads(line)
            fits = about["n"] == count and about["before"] == last
        except (ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise MedFLError(
                f"line {count} of {path} does not follow from the one before it: the log was changed; put "
                "back a copy, and find out who can write there"
            )
        last = hashlib.sha256(line).hexdigest()
    return count, last


def ended_well(path: Path) -> bool:
    """Whether the last line of a log says that the run ended successfully."""
    try:
        last = json.loads(Path(path).read_bytes().splitlines()[-1])
        return last["event"] == "end" and last["exit"] == 0
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return False
