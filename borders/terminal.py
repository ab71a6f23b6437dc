"""Output streams that never end a run and that no name can control."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from borders import escaping


class SteadyStream:
    """A terminal, file or pipe that never ends a run and that no name can control. What it can't show is escaped, and
    so are control codes. When it is gone (a closed pipe, a full disk, a closed terminal), its output is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream
        if hasattr(stream, "reconfigure"):  # a notebook's stream has none
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._unbroken():
            self._stream.write(escaping.stream(text))
        return len(text)

    def flush(self) -> None:
        with self._unbroken():
            self._stream.flush()

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: it was closed
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())  # also for what Python still buffers at the end
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_output() -> None:
    """Make sure that printing raises no error from now on. A service may have been started with both streams
    closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  until the process ends
        if not isinstance(stream, SteadyStream):
            setattr(sys, name, SteadyStream(stream))
