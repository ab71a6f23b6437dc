"""The audit log: what happened in a federation, in lines that can't be changed, left out or put elsewhere
unnoticed.

`audit.jsonl` is appended to only. Each line is JSON: `n` (its number, from 1), `time` (UTC), `event`, what
belongs to it, and `before`: the SHA-256 of the line before (of 64 zeros for the first). No figure of a
patient or slice, no name of a patient or a file, and no path is written. Who holds the last line's hash
elsewhere notices that the end was cut off, too.

Events: start (settings and code by their SHA-256, versions, whether keys are asked for), joined, refused,
left, round (with whom, and what was written), left_out (whose update, and why), statistics_left_out (whose
statistics did not count, and why), signed (an update that was taken: what its hospital signed of it, and the
signature), blamed (who broke the secure aggregation, and how), lost (a round whose sum was made
impossible, and what was written), checkpoint (the best so far),
end (exit code).
"""

import hashlib
import json
import os
from pathlib import Path

from common import MedFLError, utc_now

AUDIT = "audit.jsonl"  # in the folder that a run writes
NOTHING = "0" * 64


class AuditLog:
    """Appends to the log in `path`. Raises MedFLError where what is there
    was changed, or can't be written."""

    def __init__(self, path: Path):
        self.path = path
        self._count, self._last = verify(path) if path.exists() else (0, NOTHING)

    def write(self, event: str, **about) -> None:
        """Append a line; it is on disk when this returns."""
        line = json.dumps(
            {"n": self._count + 1, "time": utc_now(), "event": event, **about, "before": self._last},
            ensure_ascii=False,
            allow_nan=False,
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MedFLError(
                f"{self.path} can't be written ({error.strerror or error}); free the space, then go on with "
                "--resume"
            ) from error
        self._count, self._last = self._count + 1, hashlib.sha256(line.encode()).hexdigest()


def verify(path: Path) -> tuple[int, str]:
    """The number of lines and the SHA-256 of the last. Raises MedFLError that names the first line that does
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
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise MedFLError(
                f"line {count} of {path} does not follow from the one before it: the log was changed; put "
                "back a copy, and find out who can write there"
            )
        last = hashlib.sha256(line).hexdigest()
    return count, last
