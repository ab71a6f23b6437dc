"""Pseudonyms, which lead to nobody without the key: a keyed hash of the patient's number, and the table that leads
back to the patients.

Key and table lie in a private folder beside the archive, readable only by its owner (mode 0600; on Windows the
folder's own permissions decide). They are never in the prepared data.
"""

import csv
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from borders.escaping import cell
from common import MedFLError
from storage.files import atomic_write, write_csv

KEY, TABLE = "pseudonyms.key", "patients.csv"
COLUMNS = ("pseudonym", "patient_id", "study")


def check_folders(source: Path, out: Path, private: Path) -> None:
    """Raises MedFLError if the output or the private folder lies in the source, or one of the two in the other."""
    source, out, private = (Path(p).resolve() for p in (source, out, private))
    for option, folder in (("--out", out), ("--private", private)):
        if folder.is_relative_to(source):
            raise MedFLError(
                f"{option} is {folder}, inside the archive {source}, where nothing may be written; choose a "
                "folder outside it"
            )
    if source.is_relative_to(out):
        raise MedFLError(f"--out is {out}, which contains the archive {source}; choose a separate folder")
    if private.is_relative_to(out) or out.is_relative_to(private):
        raise MedFLError(
            f"the key and the table of names would lie in {private}, together with the output {out}, which "
            "is passed on; name another folder with --private"
        )


class Pseudonyms:
    """Pseudonyms from the key in a private folder. The key is made at first use. `save` writes the table that leads
    back to the patients."""

    def __init__(self, private: Path):
        self.folder = Path(private)
        self._key, self._table = _key_in(self.folder), _table_in(self.folder)

    def name(self, patient_id: str, study: str) -> str:
        """The name of a patient's study, always the same with the same key: letters and digits, the patient's part
        first.

        Raises MedFLError if the table has another study of that name. A collision of two studies is next to
        impossible, but a spreadsheet that saves the table removes leading zeros.
        """
        patient = self._digest("patient", patient_id or f"study {study}")[:12]
        name = f"p{patient}_s{self._digest('study', patient_id, study)[:8]}"
        who = (cell(patient_id), cell(study))  # as the table holds them
        if self._table.setdefault(name, who) != who:
            raise MedFLError(
                f"{self.folder / TABLE} gives another number or study for {name} than the archive, as if a "
                "spreadsheet program had saved it; restore a copy, or move the table away (the key stays, "
                "and so do all names)"
            )
        return name

    def save(self) -> None:
        """Write the table: pseudonym, patient's number, study; the lines of earlier runs stay."""
        rows = [(name, *who) for name, who in sorted(self._table.items())]
        write_csv(self.folder / TABLE, [COLUMNS, *rows], private=True)

    def _digest(self, *parts: str) -> str:
        return hmac.new(self._key, "\0".join(parts).encode(), hashlib.sha256).hexdigest()


def _key_in(folder: Path) -> bytes:
    """The folder's key, 32 bytes, made if there is none. Raises MedFLError for a damaged key, or one that others can
    read."""
    path = folder / KEY
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            with atomic_write(path, "w", private=True) as file:
                file.write(secrets.token_hex(32) + "\n")
        if os.name != "nt" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise MedFLError(
                f"{path} can be read by others, but leads from pseudonyms to patients; chmod 600 {path}"
            )
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise MedFLError(
            f"{path} can't be made or read ({error.strerror or error}); name another folder with --private"
        ) from error
    except ValueError as error:
        raise MedFLError(
            f"{path} is not a key of MedFL; name the folder with the key with --private, or move this file "
            "away"
        ) from error
    if len(key) != 32:
        raise MedFLError(
            f"{path} is cut off; restore the complete key, otherwise every patient gets a new name"
        )
    return key


def _table_in(folder: Path) -> dict[str, tuple[str, str]]:
    """The table of earlier runs: pseudonym to patient's number and study."""
    try:
        with open(folder / TABLE, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
            return {row["pseudonym"]: (cell(row["patient_id"]), cell(row["study"])) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, ValueError) as error:
        raise MedFLError(
            f"{folder / TABLE} can't be read; restore the complete table, or move it away"
        ) from error
