"""Messages to hospitals and their answers, collected without waiting. Each message has a time after which it counts
as lost."""

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from flwr.app import ArrayRecord, Message

from common import MedFLError
from federation.protocol.answers import Failed, parse
from federation.protocol.messages import FAILURES, message, read
from federation.protocol.proofs import Asked, Proof, asked, check_answer
from federation.protocol.weights import check_form, payload
from federation.server.pulling import PULL_TIME, Puller, time_for

SPARE = 10.0  # seconds that Flower has after a message's timeout to report the timeout itself
GONE, NO_ANSWER = 5, "no answer in time"
UNREADABLE = "its answer can't be read"
NOT_ADMITTED = "its key is revoked or its admission has ended"
DRIPS = "its answer came piece by piece and was not complete within {seconds:.0f} s"
FLOWER_SAYS = {
    3: NO_ANSWER,
    GONE: "it is not reachable",
    8: "its process ended without an answer",
}  # its error codes


@dataclass
class Answer:
    """The answer to a message: `about` and arrays, or the reason why there is none. bytes: the size of the arrays'
    values; proof: what the hospital signed, if the server asks for keys."""

    node: int
    purpose: str
    about: dict
    arrays: ArrayRecord | None = None
    failure: str | None = None
    bytes: int = 0
    proof: Proof | None = None


@dataclass
class _Sent:
    node: int
    purpose: str
    lost_at: float
    pull_time: float = PULL_TIME  # seconds in which the answer must arrive
    asked: Asked = Asked("")


class Mailbox:
    """Sends messages over Flower's Grid and hands out the answers as they arrive.

    keys: returns the public key (OpenSSH's line) of each node, which checks the signature of its answers; None if the
    server asks for no keys.
    """

    def __init__(self, grid: Any, keys: Callable[[], dict[int, str] | None] = lambda: None):
        self._grid, self._puller, self.keys = grid, Puller(grid), keys
        self._open: dict[str, _Sent] = {}
        self._refused: list[Answer] = []

    def online(self) -> set[int]:
        """The nodes that Flower considers connected. One that was killed stays here for about a minute."""
        return set(self._grid.get_node_ids())

    def send(
        self,
        nodes: list[int],
        kind: str,
        purpose: str,
        about: dict,
        timeout: float,
        arrays: ArrayRecord | None = None,
    ) -> None:
        """Send each node the same message of Flower's `kind` (train, evaluate or query), to be answered within
        `timeout` s. Each message has a ticket of its own, so that no other node can know the message."""
        if not nodes:
            return
        texts = [{**about, "ticket": secrets.token_hex(16)} for _ in nodes]
        messages = [
            Message(message(text, arrays), node, kind, ttl=timeout, group_id=purpose)
            for node, text in zip(nodes, texts)
        ]
        lost_at, pull_time = time.monotonic() + timeout + SPARE, time_for(payload(arrays))
        identities = list(self._grid.push_messages(messages))
        for identity, node, text in zip_longest(identities, nodes, texts):
            if identity:
                self._open[identity] = _Sent(node, purpose, lost_at, pull_time, asked(text))
            else:  # the node has left since the last look
                self._refused.append(Answer(node, purpose, {}, failure=FLOWER_SAYS[GONE]))

    def is_open(self, node: int, purpose: str | None = None) -> bool:
        """Whether a message to the node (of this purpose, if one is given) is unanswered."""
        return any(sent.node == node and purpose in (None, sent.purpose) for sent in self._open.values())

    def drop(self, purpose: str) -> None:
        """Stop waiting for answers to messages of this purpose. Later answers are ignored."""
        self._open = {identity: sent for identity, sent in self._open.items() if sent.purpose != purpose}

    def collect(self, last: bool = False) -> Iterator[Answer]:
        """The answers that have arrived, lost messages included, a few at a time. The caller must finish with one
        before it takes the next, so that memory holds only a few (pulling.py). last: this is the last look, so all
        answers are requested at once.
        """
        refused, self._refused = self._refused, []
        yield from refused
        for pulled in self._puller.look(list(self._open), patient=not last):
            if pulled.error is None and pulled.message is None:
                continue
            # found by the message that was sent, not by the answer's sender: Flower answers for dead nodes
            sent = self._open.pop(pulled.identity, None)
            if sent and pulled.message is not None:
                yield self._answer(sent, pulled.message)
            elif sent:
                yield Answer(sent.node, sent.purpose, {}, failure=UNREADABLE)
        now = time.monotonic()
        for identity, sent in list(self._open.items()):
            if self._puller.seconds(identity) > sent.pull_time:
                del self._open[identity]
                yield Answer(sent.node, sent.purpose, {}, failure=DRIPS.format(seconds=sent.pull_time))
            elif now > sent.lost_at:
                del self._open[identity]
                yield Answer(sent.node, sent.purpose, {}, failure=NO_ANSWER)

    def _answer(self, sent: _Sent, reply: Message) -> Answer:
        """The answer in a message. Any error while reading it counts against its sender."""
        try:
            if reply.has_error():
                said = FLOWER_SAYS.get(reply.error.code, "its program could not answer")
                return Answer(sent.node, sent.purpose, {}, failure=said)
            arrays = reply.content.get("arrays")
            if not (arrays is None or isinstance(arrays, ArrayRecord)):
                raise TypeError("another record in the arrays' place")
            if arrays is not None:
                check_form(arrays)
            keys, proof = self.keys(), None
            if keys is not None and sent.node not in keys:  # revoked after the message was sent
                return Answer(sent.node, sent.purpose, {}, failure=NOT_ADMITTED)
            if keys is not None:
                proof = check_answer(reply.content, sent.asked, keys[sent.node])
            about = read(reply.content)
            if "failure" in about:
                failed = parse(Failed, about)
                said = FAILURES.get(failed.failure, "it failed")
                return Answer(sent.node, sent.purpose, about, failure=said)
            return Answer(sent.node, sent.purpose, about, arrays, bytes=payload(arrays), proof=proof)
        except MedFLError as error:
            return Answer(sent.node, sent.purpose, {}, failure=str(error))
        except Exception:  # bytes from elsewhere: Flower and numpy each raise their own kinds
            return Answer(sent.node, sent.purpose, {}, failure=UNREADABLE)
