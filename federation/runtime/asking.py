"""Questions to a server that may never answer in full."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

ANSWER_TIME = 10.0  # seconds for a whole answer

Said = TypeVar("Said")


class Asker(Generic[Said]):
    """Asks in a thread, because a socket's own limit is for each piece: an answer that comes letter by letter is never
    late for it. While an answer is outstanding nothing else is asked, so threads don't add up."""

    def __init__(self) -> None:
        self._asked: Future[Said] | None = None

    def __call__(self, ask: Callable[[], Said]) -> Said | None:
        """What `ask` returns or raises; None if that takes longer than `ANSWER_TIME`."""
        asked = self._asked
        if asked is None:
            asked = self._asked = Future()
            threading.Thread(target=_answer, args=(ask, asked), daemon=True).start()
        wait([asked], ANSWER_TIME)
        if not asked.done():
            return None
        self._asked = None
        return asked.result()


def _answer(ask: Callable[[], Said], asked: Future[Said]) -> None:
    try:
        asked.set_result(ask())
    except BaseException as error:  # raised where the answer is waited for
        asked.set_exception(error)
