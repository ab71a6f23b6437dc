"""Who takes part: hospitals join, are refused, fall behind, vanish and come back."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from common import MedFLError
from federation.messages import FACTS, INTRODUCTION, LABEL, End, Query, expect
from federation.post import Answer, Post
from federation.settings import FederationSettings
from split import PARTS

LOOK = 1.0  # seconds between two looks at who is connected
JOIN_TIME = 600.0  # seconds for a hospital's answer at joining; it may have to read its scans first
PING_TIME = 20.0  # seconds in which somebody who is there answers
PURPOSES = ("join", "ping", "end")


@dataclass
class Member:
    """A hospital that takes part. facts: what it said at joining."""

    label: str
    node: int
    session: str
    facts: dict
    behind: bool = False  # gave no answer in time; gets no work until it answers again


class Membership:
    """Keeps the list of members up to date; `poll` and `handle` are called again and again by who waits for answers.

    about: what the JOIN message says (settings and the server's versions). say: prints a line.
    """

    def __init__(self, post: Post, settings: FederationSettings, about: dict, say: Callable[[str], None]):
        self.post, self.settings, self.about, self.say = post, settings, about, say
        self.members: dict[str, Member] = {}
        self._asked: set[int] = set()
        self._rivals: dict[int, dict] = {}  # nodes that claim a label somebody has: what they said
        self._looked = -LOOK

    @property
    def present(self) -> list[Member]:
        """The members that can be given work, by label."""
        return [self.members[label] for label in sorted(self.members) if not self.members[label].behind]

    def poll(self) -> None:
        """See who is connected; ask newcomers, and those behind, who they are and whether they are there."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        online = self.post.online()
        newcomers = sorted(online - self._asked)
        self._asked = online
        self.post.send(newcomers, "query", "join", {"query": Query.JOIN, **self.about}, JOIN_TIME)
        for member in [m for m in self.members.values() if m.node not in online]:
            self._remove(member, "gone")
        for node in [n for n in self._rivals if n not in online]:
            del self._rivals[node]
        contested = [self.members[facts["label"]].node for facts in self._rivals.values() if facts["label"] in self.members]
        behind = [m.node for m in self.members.values() if m.behind]
        free = [node for node in {*contested, *behind} if not self.post.is_open(node)]
        self.post.send(sorted(free), "query", "ping", {"query": Query.PING}, PING_TIME)
        for node, facts in list(self._rivals.items()):
            if facts["label"] not in self.members:
                self._admit(node, self._rivals.pop(node))

    def handle(self, answer: Answer) -> None:
        """Take an answer to one of our own messages (`PURPOSES`)."""
        if answer.purpose == "join":
            self._joined(answer)
        elif answer.purpose == "ping":
            self._pinged(answer)

    def fell_behind(self, member: Member) -> None:
        """No work for this member until it answers again."""
        member.behind = True

    def end(self, code: End, seconds: float) -> None:
        """Tell everybody that the federation is over, and give them `seconds` to take note."""
        nodes = sorted(self.post.online())
        self.post.send(nodes, "query", "end", {"query": Query.END, "code": code}, seconds)
        until = time.monotonic() + seconds
        while any(self.post.is_open(node, "end") for node in nodes) and time.monotonic() < until:
            self.post.collect()
            time.sleep(0.2)

    def _joined(self, answer: Answer) -> None:
        facts = answer.about
        if answer.failure:
            if "failure" in facts:
                self.say(f"{facts.get('label', 'a hospital')} can't take part: {answer.failure}")
                self._refuse(answer.node, End.UNFIT)
            else:  # Flower's answer: the hospital's did not come; it is asked again while it is connected
                self._asked.discard(answer.node)
            return
        try:
            refusal, detail = self._refusal(facts)
        except (MedFLError, KeyError, TypeError) as error:
            self.say(f"a hospital's introduction can't be read ({error}); it is refused")
            self._refuse(answer.node, End.UNFIT)
            return
        if refusal:
            self.say(f"{facts['label']} refused: {refusal}{' (' + detail + ')' if detail else ''}")
            self._refuse(answer.node, refusal, detail)
            return
        holder = self.members.get(facts["label"])
        if holder and holder.session != facts["session"]:
            self._rivals[answer.node] = facts  # the holder is asked whether it is still there
        else:
            self._admit(answer.node, facts)

    def _pinged(self, answer: Answer) -> None:
        member = next((m for m in self.members.values() if m.node == answer.node), None)
        if member is None:
            return
        rivals = [node for node, facts in self._rivals.items() if facts["label"] == member.label]
        if answer.failure:
            if rivals:
                self._remove(member, "replaced by one that came back")
            return
        if member.behind:
            member.behind = False
            self.say(f"{member.label} answers again")
        for node in rivals:
            self.say(f"{member.label} refused: {End.TAKEN}")
            self._refuse(node, End.TAKEN)
            del self._rivals[node]

    def _refusal(self, facts: dict) -> tuple[End | None, str]:
        """Why a hospital can't be a member, and what its sentence says besides."""
        ours, theirs = self.about["versions"], expect(facts, INTRODUCTION)["versions"]
        if not LABEL.fullmatch(facts["label"]):
            raise MedFLError("its label has characters that no label has")
        other = [f"{name} {theirs.get(name)} instead of {ours[name]}" for name in ("medfl", "flwr", "timm")
                 if theirs.get(name) != ours[name]]
        if other:
            return End.VERSION, ", ".join(other)
        if facts["cid"] is not None and facts["cid"] >= self.settings.clients:
            return End.NUMBER, str(self.settings.clients)
        if facts["label"] not in self.members and len(self.members) >= self.settings.clients:
            return End.FULL, ""
        expect(facts, FACTS)
        for part in PARTS:
            expect(facts["parts"][part], {"patients": int, "slices": int})
        hashes = {m.facts["partition_sha256"] for m in self.members.values() if not m.facts["own_data"]}
        if not facts["own_data"] and hashes - {facts["partition_sha256"]}:
            return End.SPLIT, ""
        return None, ""

    def _admit(self, node: int, facts: dict) -> None:
        back = facts["label"] in self.members
        member = Member(facts["label"], node, facts["session"], facts)
        self.members[member.label] = member
        parts = facts["parts"]
        torch_note = ""
        if facts["versions"]["torch"] != self.about["versions"]["torch"]:
            torch_note = f"; it runs torch {facts['versions']['torch']}, the server {self.about['versions']['torch']}"
        self.say(f"{member.label} {'is back' if back else 'joined'}: {parts['train']['patients']} patients to train on "
                 f"({parts['train']['slices']} slices), {parts['val']['patients']} to choose by{torch_note}")

    def _remove(self, member: Member, why: str) -> None:
        self.say(f"{member.label}: {why}")
        del self.members[member.label]

    def _refuse(self, node: int, code: End, detail: str = "") -> None:
        self.post.send([node], "query", "end", {"query": Query.END, "code": code, "detail": detail}, PING_TIME)
