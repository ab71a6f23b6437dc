"""What a run uses and how far it has come: its device, times in words, peak memory, and a log file beside its
results."""

import contextlib
import sys
from pathlib import Path

import torch

from common import MedFLError, utc_now

LOG_SECONDS = 60.0  # between two lines of a run's log


def choose_device(name: str = "auto") -> torch.device:
    """The device that "auto" (CUDA, else CPU), "cpu", "cuda" or "mps" names. Raises MedFLError if it does not
    exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MedFLError(f"there is no device {name} here; choose --device cpu or auto") from error
    return device


def in_time(seconds: float) -> str:
    """Seconds as a person says them: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def peak_memory() -> int:
    """The most memory that this process has held, in bytes; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def memory_in_words() -> str:
    """The most memory that this process has held, after a semicolon; "" where the system does not say."""
    return f"; at most {peak_memory() / 2**30:.1f} GiB of memory" if peak_memory() else ""


class RunLog:
    """A text file to which a run appends lines, each with its time (UTC). A full disk does not end
    the run."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, text: str) -> None:
        """Append a line."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{utc_now()}  {text}\n")
