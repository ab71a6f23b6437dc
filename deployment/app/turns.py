"""Readers whose scans are segmented at the same time take turns, one block of slices each, in the order of
their requests, so that a short scan need not wait for a long one."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator


class Turns:
    """One turn at a time, first come, first served. Used by the threads of one process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._scans = 0

    @contextlib.contextmanager
    def scan(self) -> Iterator[None]:
        """While the block runs, the scan is one of `others`."""
        with self._changed:
            self._scans += 1
        try:
            yield
        finally:
            with self._changed:
                self._scans -= 1

    @property
    def others(self) -> int:
        """The number of other scans that are being segmented."""
        return max(0, self._scans - 1)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until all earlier requests are done, and run the block."""
        mine = object()
        with self._changed:
            self._waiting.append(mine)
            self._changed.wait_for(lambda: self._waiting[0] is mine)
        try:
            yield
        finally:
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()


TURNS = Turns()  # one for this process, which has one set of processors
