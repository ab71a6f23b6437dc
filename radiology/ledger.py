"""The results for an archive's studies, one line each, so that an interrupted run continues where it stopped.

The file lies in the private folder, because it names studies. The last line about a study counts.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common import MedFLError
from storage.files import atomic_write

LEDGER = "archive.jsonl"


@dataclass(frozen=True)
class Entry:
    """state: of the study in the archive when it was processed, and of everything else that decides the result.
    name: its pseudonym if it was prepared. rows: its lines in the report. why: the reason if it was left out."""

    study: str
    state: str
    name: str = ""
    rows: list[list] = field(default_factory=list)
    why: str = ""


class Ledger:
    """The lines of a folder's ledger. Raises MedFLError for a damaged one."""

    def __init__(self, folder: Path, name: str = LEDGER):
        self.file = folder / name
        self._entries = self._read()

    def find(self, study: str, state: str) -> Entry | None:
        """The result for a study in this state, or None."""
        entry = self._entries.get(study)
        return entry if entry is not None and entry.state == state else None

    def of_all(self) -> list[Entry]:
        """The results for all studies."""
        return list(self._entries.values())

    def of(self, studies: list[str]) -> list[Entry]:
        """The results for these studies, as far as there are any."""
        return [self._entries[uid] for uid in studies if uid in self._entries]

    def add(self, entry: Entry) -> None:
        """Record the result for a study; it is on the disk when this returns."""
        self._entries[entry.study] = entry
        line = json.dumps(asdict(entry)) + "\n"
        try:
            handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "ab") as file:
                before = os.fstat(file.fileno()).st_size
                try:
                    file.write(line.encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.file, before)  # half a line would spoil the next
                    raise
        except OSError as error:
            raise MedFLError(
                f"{self.file} can't be written ({error.strerror or error}); free the space or name another "
                "folder"
            ) from error

    def _read(self) -> dict[str, Entry]:
        """The file's entries. A last line that was cut off is dropped, so that study is processed again."""
        try:
            text = self.file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise MedFLError(
                f"{self.file} can't be read; move it away, and every study is treated as new"
            ) from error
        whole, _, cut = text.rpartition("\n")
        try:
            entries = [Entry(**json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError) as error:
            raise MedFLError(
                f"{self.file} is damaged; move it away, and every study is treated as new"
            ) from error
        latest = {entry.study: entry for entry in entries}
        if cut or len(latest) < len(entries):
            with atomic_write(self.file, "w", private=True) as file:
                file.writelines(json.dumps(asdict(entry)) + "\n" for entry in latest.values())
        return latest
