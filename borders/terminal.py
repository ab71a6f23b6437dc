"""Terminals, files and pipes that never end a run, and that no name commands."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from borders import escaping


class SteadyStream:
    """A terminal, file or pipe that never ends a run and that no name commands: what it can't show is escaped, as
    are control codes, and when it is gone (a closed pipe, a full disk, a terminal that was closed) what is said
    goes nowhere."""

    def __init__(self, stream: Any):
        self._stream = stream
        if hasattr(stream, "reconfigure"):  # not so in a notebook
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
                os.dup2(nowhere, self._stream.fileno())  # also for what Python still holds, at the end
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_output() -> None:
    """See to it that nothing that is printed from now on raises. A service may have been started with both closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  until the process ends
        if not isinstance(stream, SteadyStream):
            setattr(sys, name, SteadyStream(stream))
