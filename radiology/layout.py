"""The folders that data/prepare_hospital.py fills, and a lock for programs that write there."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from common import MedFLError

TRAINING, MORE, UNMASKED = "", "more_studies", "without_masks"  # folders in the output
LOG = "truth.jsonl"  # in the folder of a patient for whom a person saved a truth
LOCK = ".medfl.lock"

_within = threading.Lock()  # if the system has no file locks, protects at least within this process


def has_truth(out: Path, name: str) -> str | None:
    """The part of the output that holds a patient for whom a person saved a truth, or None."""
    return next((part for part in (TRAINING, MORE, UNMASKED) if (out / part / name / LOG).exists()), None)


@contextlib.contextmanager
def turn_in(out: Path) -> Iterator[None]:
    """While the block runs, no other thread or process is in such a block for this folder. Raises MedFLError if the
    folder can't be written."""
    with _within:
        try:
            file = open(out / LOCK, "ab")  # noqa: SIM115  closed below
        except OSError as error:
            raise MedFLError(
                f"{out} can't be written ({error.strerror}); make it writable for the user that runs this"
            ) from error
        with file:
            with contextlib.suppress(OSError):  # a network share without locks
                _lock(file.fileno())
            yield


def _lock(handle: int) -> None:
    """Wait for a lock, which is released when the file is closed or the process ends."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
