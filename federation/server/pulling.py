"""Answers taken out of Flower, each in a thread of its own, so that one that comes slowly, or is no message at
all, holds up nobody else's.

Flower hands out an answer as soon as its first piece has come and waits for the others for up to two hours; an
answer that is malformed raises, and those that were asked for together with it are lost. So each is asked for
by itself.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Message

AT_ONCE = 4  # answers that are taken out of Flower at a time, and so in memory together
SLOW = 10.0  # seconds after which an answer that still comes makes room for another
LOOK = 0.2  # seconds for which a look waits for what it has asked for
LAST = 5.0  # the same for a last look, also on a busy machine
PULL_TIME = 60.0  # seconds in which an answer's pieces come, and longer for many bytes:
BYTES_A_SECOND = 125_000  # 1 Mbit/s


@dataclass
class Pulled:
    """What became of asking for an answer: the message, None where none has come yet, or an error."""

    identity: str
    message: Message | None = None
    error: BaseException | None = None


class Puller:
    """Asks `grid` for answers. Each pull runs in a daemon thread; those that take too long are given up."""

    def __init__(self, grid: Any):
        self._grid = grid
        self._came: queue.SimpleQueue[Pulled] = queue.SimpleQueue()
        self._began: dict[str, float] = {}  # pulls in flight: when they began, monotonic

    def look(self, identities: list[str], patient: bool = True) -> Iterator[Pulled]:
        """Ask for the answers to these messages that are not asked for already, and hand out what came, and
        what former looks asked for. patient: no more than `AT_ONCE` at a time; else all, for a last look."""
        waiting = [identity for identity in identities if identity not in self._began]
        until = time.monotonic() + (LOOK if patient else LAST)
        while True:
            while waiting and (not patient or self._busy() < AT_ONCE):
                self._start(waiting.pop(0))
            left = until - time.monotonic()
            try:
                yield self._taken(left if self._busy() else 0.0)
            except queue.Empty:
                if left <= 0 or not self._busy():
                    return

    def seconds(self, identity: str) -> float:
        """For how long the answer to this message has been coming; 0 where it is not being asked for."""
        began = self._began.get(identity)
        return 0.0 if began is None else time.monotonic() - began

    def _busy(self) -> int:
        """Pulls in flight that have not become slow."""
        now = time.monotonic()
        return sum(now - began < SLOW for began in self._began.values())

    def _taken(self, seconds: float) -> Pulled:
        pulled = self._came.get(timeout=seconds) if seconds > 0 else self._came.get_nowait()
        self._began.pop(pulled.identity, None)
        return pulled

    def _start(self, identity: str) -> None:
        self._began[identity] = time.monotonic()
        threading.Thread(target=self._pull, args=(identity,), daemon=True).start()

    def _pull(self, identity: str) -> None:
        pulled = Pulled(identity)
        try:
            pulled.message = next(iter(self._grid.pull_messages([identity])), None)
        except (httpx.HTTPError, SystemExit):
            pass  # the connection, or the end: the round loop meets it as well, and this answer is asked for again
        except (
            BaseException
        ) as error:  # bytes from elsewhere: Flower, protobuf and numpy raise their own kinds
            pulled.error = error
        self._came.put(pulled)


def time_for(size: int) -> float:
    """Seconds in which an answer of so many bytes comes over a slow connection."""
    return PULL_TIME + size / BYTES_A_SECOND
