"""Files that are written whole or not at all, folders of a run, and texts that a person wrote."""

import codecs
import contextlib
import csv
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from borders import escaping
from common import MedFLError

if TYPE_CHECKING:
    from filelock import FileLock

NAME_KEPT = 40  # characters of a file's name in that of its temporary file; a name has at most 255 bytes
NUMBER = re.compile(r"[0-9]{1,9}")  # of a process
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # errors of network shares without locks
# torch's words in its error for a file that it could not write
TORN = ("PytorchStreamWriter", "inline_container")


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb", private: bool = False) -> Iterator[IO]:
    """An open file that replaces `path` at the end of the block, whole or not at all. Only its owner can read a
    private one.

    Raises MedFLError if the folder can't be made or written, or if the disk is full.
    """
    path = Path(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = f".{path.name[:NAME_KEPT]}."
        _remove_leftovers(path.parent, hidden)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{hidden}{os.getpid()}-")
        beside = Path(name)
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not private:
            with contextlib.suppress(OSError):  # many network shares keep their own permissions
                beside.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        _replace(beside, path)
    except PermissionError as error:
        raise MedFLError(
            f"{path} can't be written; close the program that has it open, or choose a folder of your own"
        ) from error
    except OSError as error:
        raise MedFLError(
            f"{path} can't be written ({error.strerror or error}); free the space or choose another place"
        ) from error
    except RuntimeError as error:  # torch's error for a file that took no more bytes
        if not any(sign in str(error) for sign in TORN):
            raise
        raise MedFLError(
            f"{path} can't be written (the disk is full?); free the space or choose another place"
        ) from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def run_folder(kind: str) -> Path:
    """A new folder among the system's temporary files, called medfl-KIND-…. Folders that killed runs of this kind
    left there are removed."""
    place = Path(tempfile.gettempdir())
    _remove_leftovers(place, f"medfl-{kind}-")
    try:
        return Path(tempfile.mkdtemp(prefix=f"medfl-{kind}-{os.getpid()}-", dir=place))
    except OSError as error:
        raise MedFLError(
            f"no folder can be made in {place} ({error.strerror}); free space there, or name another folder in TMPDIR"
        ) from error


def claim(out: Path, what: str) -> "FileLock":
    """The lock of a folder, held while the object lives: only one `what` ("server", "training") at a time writes
    there. On a file system without locks it stops nobody. Raises MedFLError if another one holds the lock."""
    from filelock import FileLock, Timeout  # not installed where scans are only prepared

    lock = FileLock(out / f".{what}.lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MedFLError(
            f"another {what} writes into {out}; wait until it ends, or choose another --out"
        ) from error
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise MedFLError(
                f"{out} can't be written ({error.strerror or error}); make it writable, or choose another --out"
            ) from error
    return lock


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process is in such a block for this file, which is read and then written there. On a file system
    without locks it stops nobody."""
    from filelock import FileLock  # not installed where scans are only prepared

    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise MedFLError(
                f"{path} can't be written ({error.strerror or error}); free the space or mend its folder"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(place: Path, prefix: str) -> None:
    """Remove what ended processes left in `place` under `prefix` and their number."""
    if os.name != "posix":
        return
    for left in place.glob(f"{glob.escape(prefix)}*-*"):
        number = left.name[len(prefix) :].split("-")[0]
        if not NUMBER.fullmatch(number) or _is_alive(int(number)):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
            if left.lstat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True


def _replace(beside: Path, path: Path) -> None:
    """Rename, with several tries: on Windows a virus scanner or a viewer can hold the old file for a moment."""
    for wait in (0.1, 0.3, 0.6, 1.0):
        try:
            return os.replace(beside, path)
        except PermissionError:
            time.sleep(wait)
    os.replace(beside, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_csv(path: Path, rows: Iterable[Sequence], private: bool = False) -> None:
    """Write rows of values as CSV, with the column names first, atomically. No text in it becomes a formula."""
    with atomic_write(path, "w", private=private) as file:
        csv.writer(file).writerows([escaping.cell(value) for value in row] for row in rows)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN is a bug here, not a number."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def text_of(path: Path, errors: str = "strict", most: int = -1) -> str:
    """The content of a text file that a person or a terminal wrote: UTF-8, or UTF-16 with its mark, as Windows' `>`
    writes it. most: bytes; no limit if below 0. Raises OSError, and ValueError for another encoding or more bytes."""
    with open(path, "rb") as file:
        content = file.read(most + 1 if most >= 0 else -1)
    if 0 <= most < len(content):
        raise ValueError(f"more than {most:,} bytes")
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_wide else "utf-8-sig", errors)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
