"""ZIP files of patients among an export's files: unpacked into a private folder for as long as they are read."""

import contextlib
import os
import shutil
import stat
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from borders.limits import BUDGET, ZIP_KINDS
from common import MedFLError
from scans.folders import OF_THE_SYSTEM

UNPACKED = "unpacked"  # in the private folder
MOST_FILES = 50_000  # in one archive, enough for a study of many series
MOST_BYTES = 16 * 2**30  # unpacked
MOST_TIMES = 200  # unpacked size over packed size, above the budget; scans shrink to a half or a third
ROOM = 2**30  # bytes that stay free on the disk
PIECE = 2**20
DAMAGED = (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, ValueError, zlib.error)


def is_zip(path: Path) -> bool:
    """Whether a file is a ZIP, by its name."""
    return path.suffix.lower() == ".zip"


def unpack(path: Path, into: Path) -> list[Path]:
    """The files of a patient's ZIP, written to `into` below the folder from `private_room`, without hidden files and
    those of operating systems. Their times are those in the archive, so that a second run recognises them.

    Raises MedFLError for a damaged or encrypted archive, names that point out of it, and sizes above the limits or
    the free space.
    """
    try:
        into.mkdir(parents=True)
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check(path, entries, into)
            return [_write(archive, entry, into) for entry in entries if not _is_hidden(entry)]
    except DAMAGED as error:
        raise MedFLError(f"{path} can't be unpacked (damaged or encrypted); pack it again") from error
    except OSError as error:
        raise MedFLError(
            f"{path} can't be unpacked into {into} ({error.strerror or error}); free the space, or name another "
            "--private"
        ) from error


def private_room(private: Path) -> Path:
    """An empty folder to unpack into, which only its owner can read. Raises MedFLError if it can't be made."""
    remove_unpacked(private)  # from a run that was killed
    try:
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        (private / UNPACKED).mkdir(mode=0o700)
    except OSError as error:
        raise MedFLError(
            f"{private} can't be written ({error.strerror}); name another folder with --private"
        ) from error
    return private / UNPACKED


def remove_unpacked(private: Path) -> None:
    """Remove the unpacked files, and the private folder if nothing else is in it."""
    if (private / UNPACKED).exists():
        shutil.rmtree(private / UNPACKED, ignore_errors=True)
        with contextlib.suppress(OSError):
            private.rmdir()


def _name(entry: zipfile.ZipInfo) -> PurePosixPath:
    return PurePosixPath(entry.filename.replace("\\", "/"))


def _is_hidden(entry: zipfile.ZipInfo) -> bool:
    return any(part.startswith(".") or part in OF_THE_SYSTEM for part in _name(entry).parts)


def _check(path: Path, entries: list[zipfile.ZipInfo], into: Path) -> None:
    """Raises MedFLError for names that point out of the archive, and for archives above the limits."""
    names = [_name(entry) for entry in entries]
    if any(name.is_absolute() or ".." in name.parts or ":" in str(name) for name in names) or any(
        stat.S_ISLNK(entry.external_attr >> 16) for entry in entries
    ):
        raise MedFLError(f"{path} holds a name that points out of the archive; pack it again")
    if len({str(name).lower() for name in names}) < len(names):
        raise MedFLError(f"{path} holds two files with one name, so one would be lost; pack it again")
    if any(entry.compress_type not in ZIP_KINDS for entry in entries):
        raise MedFLError(f"{path} is compressed with bzip2 or LZMA; pack it again as an ordinary ZIP")
    asked, free = sum(entry.file_size for entry in entries), shutil.disk_usage(into).free
    if len(entries) > MOST_FILES or asked > MOST_BYTES:
        raise MedFLError(
            f"{path} holds {len(entries):,} files of {asked / 2**30:.0f} GiB, more than one patient has; "
            "pack each patient separately"
        )
    if asked > max(BUDGET, MOST_TIMES * path.stat().st_size):
        raise MedFLError(
            f"{path} would unpack to {asked / 2**20:.0f} MiB, far more than scans of its size do; pack it again"
        )
    if asked > free - ROOM:
        raise MedFLError(
            f"{path} needs {asked / 2**30:.1f} GiB unpacked, but the disk has {free / 2**30:.1f} GiB free; "
            "free the space, or name another --private"
        )


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, into: Path) -> Path:
    """Write one file, with at most the size that its entry states."""
    to = into / _name(entry)
    to.parent.mkdir(parents=True, exist_ok=True)
    room = entry.file_size
    with archive.open(entry) as packed, open(to, "xb") as file:
        while piece := packed.read(PIECE):
            room -= len(piece)
            if room < 0:
                raise ValueError("it unpacks to more than it says")
            file.write(piece)
    when = time.mktime((*entry.date_time, 0, 0, -1))
    os.utime(to, (when, when))
    return to
