"""Where data/prepare_hospital.py puts patients, and how two programs take turns in that folder."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from common import MedFLError

TRAINING, MORE, UNMASKED = "", "more_studies", "without_masks"  # folders in the output
LOG = "truth.jsonl"  # in the folder of a patient whose truth a person saved
LOCK = ".medfl.lock"

_within = threading.Lock()  # where the system has no locks on files, for this process at least


def has_truth(out: Path, name: str) -> str | None:
    """The part of the output in which a patient lies whose truth a person saved, or None."""
    return next((part for part in (TRAINING, MORE, UNMASKED) if (out / part / name / LOG).exists()), None)


@contextlib.contextmanager
def turn_in(out: Path) -> Iterator[None]:
    """While the block runs, no other thread or process is within it for this folder. Raises MedFLError where the
    folder can't be written."""
    with _within:
        try:
            file = open(out / LOCK, "ab")  # noqa: SIM115  closed below
        except OSError as error:
            raise MedFLError(
                f"{out} can't be written ({error.strerror}); make it writable for the user that runs this"
            ) from error
        with file:
            with contextlib.suppress(OSError):  # a share without locks
                _lock(file.fileno())
            yield


def _lock(handle: int) -> None:
    """Wait for a lock that ends when the file is closed, or its process ends."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
