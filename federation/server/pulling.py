"""Pulls answers out of Flower, each in a thread of its own, so that a slow or malformed answer delays no other one.

Flower hands out an answer as soon as its first piece has arrived, and waits up to two hours for the others. A
malformed answer raises an error, and the answers that were requested together with it are lost. Each answer is
therefore requested by itself.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Message

AT_ONCE = 4  # answers that are pulled, and therefore in memory, at the same time
SLOW = 10.0  # seconds after which an answer that is still arriving no longer counts towards AT_ONCE
LOOK = 0.2  # seconds for which a look waits for the answers that it has requested
LAST = 5.0  # the same for a last look, enough on a busy machine too
PULL_TIME = 60.0  # seconds in which all pieces of an answer must arrive; longer for many bytes:
BYTES_A_SECOND = 125_000  # 1 Mbit/s


@dataclass
class Pulled:
    """The result of one request for an answer: the message, None if it has not arrived yet, or an error."""

    identity: str
    message: Message | None = None
    error: BaseException | None = None


class Puller:
    """Requests answers from `grid`. Each pull runs in a daemon thread."""

    def __init__(self, grid: Any):
        self._grid = grid
        self._came: queue.SimpleQueue[Pulled] = queue.SimpleQueue()
        self._began: dict[str, float] = {}  # pulls in flight: when they began, monotonic

    def look(self, identities: list[str], patient: bool = True) -> Iterator[Pulled]:
        """Request the answers to these messages that are not being pulled already, and yield what arrives, also from
        earlier looks. patient: at most `AT_ONCE` at a time; else all at once, for a last look."""
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
        """For how many seconds the answer to this message has been pulled; 0 if it is not being pulled."""
        began = self._began.get(identity)
        return 0.0 if began is None else time.monotonic() - began

    def _busy(self) -> int:
        """The number of pulls in flight that are not slow yet."""
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
            pass  # a broken connection, or the end: the round loop notices it too, and this answer is requested again
        except (
            BaseException
        ) as error:  # bytes from elsewhere: Flower, protobuf and numpy raise their own kinds
            pulled.error = error
        self._came.put(pulled)


def time_for(size: int) -> float:
    """Seconds in which an answer of `size` bytes must arrive, also over a slow connection."""
    return PULL_TIME + size / BYTES_A_SECOND
