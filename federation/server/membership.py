"""The hospitals that take part: they join, are refused, fall behind, vanish and come back."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from common import MedFLError, counted
from federation.protocol.answers import LABEL, Facts, Introduction, parse
from federation.protocol.messages import FAILURES, End, Failure, Query
from federation.protocol.settings import FederationSettings
from federation.server.audit import AuditLog
from federation.server.mailbox import NOT_ADMITTED, Answer, Mailbox
from tasks import LGG

LOOK = 1.0  # seconds between two looks at which hospitals are connected
JOIN_TIME = 600.0  # seconds for a hospital's answer at joining; it may have to read its scans first
JOIN_TRIES = 3  # for a connected hospital whose answer at joining is a failure
JOIN_AGAIN = 10.0  # seconds between these tries
PING_TIME = 45.0  # seconds in which a hospital that is there answers, even on a busy machine
PURPOSES = ("join", "ping", "end")
FINAL = (
    Failure.DATA,
    Failure.CONSENT,
    Failure.PRIVACY,
)  # reasons for not joining that another try would not change


@dataclass
class Member:
    """A hospital that takes part. facts: its answer at joining."""

    label: str
    node: int
    session: str
    facts: Facts
    behind: bool = False  # gave no answer in time; gets no work until it answers again


@dataclass(frozen=True)
class Refusal:
    """Why a hospital can't be a member. detail: completes the sentence of this code."""

    label: str
    code: End
    detail: str = ""


class Membership:
    """Keeps the list of members up to date. Whoever waits for answers calls `poll` and `handle` repeatedly.

    about: the content of the JOIN message (settings and the server's versions). contributors: the facts that
    hospitals with updates gave at joining, by label. say: prints a line. audit: records which hospitals joined, were
    refused and left. labels: returns the label that belongs to each node's key, or None if the server asks for no
    keys. until: returns the day on which each node's admission ends.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        settings: FederationSettings,
        about: dict,
        contributors: dict[str, Facts],
        say: Callable[[str], None],
        audit: AuditLog,
        labels: Callable[[], dict[int, str] | None] = lambda: None,
        until: Callable[[], dict[int, str]] = dict,
    ):
        self.mailbox, self.settings, self.about, self.contributors, self.say = (
            mailbox,
            settings,
            about,
            contributors,
            say,
        )
        self.audit, self.labels, self.until = audit, labels, until
        self.members: dict[str, Member] = {}
        self._asked: set[int] = set()
        self._tries: dict[
            int, tuple[int, float]
        ] = {}  # nodes that could not join: number of tries, time of the next one
        self._rivals: dict[int, Facts] = {}  # the facts of nodes that claim a label which a member has
        self._looked = -LOOK
        self._settled = bool(contributors)  # whether the hospitals' task and partition are decided

    @property
    def present(self) -> list[Member]:
        """The members that can be given work, by label."""
        return [member for member in self._ready if member.facts.role == "train"]

    @property
    def observers(self) -> list[Member]:
        """The members that only score, by label."""
        return [member for member in self._ready if member.facts.role == "observe"]

    @property
    def training(self) -> set[str]:
        """The labels of the members that train, including those that are behind."""
        return {label for label, member in self.members.items() if member.facts.role == "train"}

    @property
    def _ready(self) -> list[Member]:
        return [self.members[label] for label in sorted(self.members) if not self.members[label].behind]

    @property
    def partition(self) -> str | None:
        """The SHA-256 of the partition that the simulated hospitals share; None if there is none, or not yet."""
        return next((f.partition_sha256 for f in self._known if not f.own_data), None)

    @property
    def _known(self) -> list[Facts]:
        """The facts of the members, and of hospitals that contributed before."""
        return [*(member.facts for member in self.members.values()), *self.contributors.values()]

    @property
    def disputed(self) -> bool:
        """Whether two hospitals claim one label, and it is not known yet whether the first is still there."""
        return bool(self._rivals)

    def poll(self) -> None:
        """Check which hospitals are connected. Newcomers are asked to join; members that are behind or whose label is
        contested are asked whether they are still there."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        online = self.mailbox.online()
        again = {
            node
            for node, (_, when) in self._tries.items()
            if node in online and now > when and not self.mailbox.is_open(node)
        }
        newcomers = sorted(online - self._asked | again)
        self._asked = online
        for node in again:
            self._tries[node] = (self._tries[node][0], now + JOIN_TIME)
        ends = self.until()
        for day in sorted(
            {ends.get(node, "") for node in newcomers}
        ):  # one message for all hospitals whose admission ends on that day
            nodes = [node for node in newcomers if ends.get(node, "") == day]
            asked = {"query": Query.JOIN, **self.about, "until": day}
            self.mailbox.send(nodes, "query", "join", asked, JOIN_TIME)
        admitted = self.labels()
        for member in [m for m in self.members.values() if m.node not in online]:
            out = admitted is not None and member.node not in admitted
            self._remove(member, NOT_ADMITTED if out else "gone")
        for node in [n for n in self._rivals if n not in online]:
            del self._rivals[node]
        contested = [
            self.members[facts.label].node for facts in self._rivals.values() if facts.label in self.members
        ]
        behind = [m.node for m in self.members.values() if m.behind]
        free = [node for node in {*contested, *behind} if not self.mailbox.is_open(node)]
        self.mailbox.send(sorted(free), "query", "ping", {"query": Query.PING}, PING_TIME)
        for node, facts in list(self._rivals.items()):
            if facts.label not in self.members:
                self._admit(node, self._rivals.pop(node))

    def handle(self, answer: Answer) -> None:
        """Process an answer to one of the membership's own messages (`PURPOSES`)."""
        if answer.purpose == "join":
            self._joined(answer)
        elif answer.purpose == "ping":
            self._pinged(answer)

    def fell_behind(self, member: Member) -> None:
        """Give this member no work until it answers again."""
        member.behind = True

    def end(self, code: End, seconds: float) -> None:
        """Send all hospitals the end of the federation, and wait up to `seconds` for their answers."""
        nodes = sorted(self.mailbox.online())
        self.mailbox.send(nodes, "query", "end", {"query": Query.END, "code": code}, seconds)
        until = time.monotonic() + seconds
        while any(self.mailbox.is_open(node, "end") for node in nodes) and time.monotonic() < until:
            for _ in self.mailbox.collect():
                pass
            time.sleep(0.2)

    def _joined(self, answer: Answer) -> None:
        if answer.failure:
            self._did_not_join(answer)
            return
        try:
            seen = self._look_at(answer.node, answer.about)
        except MedFLError as error:
            self._unfit(answer, str(error))
            return
        except Exception as error:  # any error from an introduction is its hospital's failure
            self._unfit(answer, f"its answer can't be used ({type(error).__name__})")
            return
        if isinstance(seen, Refusal):
            self.say(f"{seen.label} refused: {seen.code}{' (' + seen.detail + ')' if seen.detail else ''}")
            # named by its key, not by the label that it gives itself, which may be another hospital's
            self.audit.write("refused", hospital=self._name(answer), node=str(answer.node), why=seen.code)
            self._refuse(answer.node, seen.code, seen.detail)
            return
        holder = self.members.get(seen.label)
        if seen.role == "check":
            self.say(f"{seen.label} asks whether it could join: {End.TAKEN if holder else 'it could'}")
            self._refuse(answer.node, End.TAKEN if holder else End.FIT)
            return
        # two answers from one connection are no dispute: otherwise a hospital could delay all rounds by disputing its
        # own label
        if holder and holder.session != seen.session and holder.node != answer.node:
            self._rivals[answer.node] = seen  # the holder is asked whether it is still there
        else:
            self._admit(answer.node, seen)

    def _did_not_join(self, answer: Answer) -> None:
        """Handle a failed answer to JOIN. Bad data and a lack of consent are final; other failures, including Flower's
        own, may be temporary, so the hospital is asked again."""
        if answer.about.get("failure") == Failure.CODE:
            return self._differs(answer, FAILURES[Failure.CODE])
        count = self._tries.get(answer.node, (0, 0.0))[0] + 1
        if answer.about.get("failure") in FINAL or count >= JOIN_TRIES:
            self._tries.pop(answer.node, None)
            self._unfit(answer, str(answer.failure))
        else:
            self._tries[answer.node] = (count, time.monotonic() + JOIN_AGAIN)
            who = self._name(answer) or "a hospital"
            self.say(f"{who} could not join: {answer.failure}; it will be asked again")

    def _unfit(self, answer: Answer, why: str) -> None:
        """Refuse a hospital that can't take part, and record its label, if it is known."""
        name = self._name(answer)
        self.say(f"{name or 'a hospital'} can't take part: {why}")
        self.audit.write("refused", hospital=name, node=str(answer.node), why=why)
        self._refuse(answer.node, End.UNFIT)

    def _name(self, answer: Answer) -> str | None:
        """The label of the node's key or, if the server asks for no keys, the one in its answer."""
        known = self.labels()
        label = answer.about.get("label") if known is None else known.get(answer.node)
        return label if isinstance(label, str) and LABEL.fullmatch(label) else None

    def _differs(self, answer: Answer, why: str) -> None:
        """Report a hospital with another version. It is not refused: it waits until either side is restarted with the
        right version, and is then asked again."""
        ours = self.about["versions"]
        commit = f", commit {ours['commit'][:12]}" if ours.get("commit") else ""
        self._tries.pop(answer.node, None)
        name = self._name(answer)
        self.say(f"{name or 'a hospital'} can't take part: {why} (here: MedFL {ours.get('medfl')}{commit})")
        self.audit.write("refused", hospital=name, node=str(answer.node), why=why)

    def _pinged(self, answer: Answer) -> None:
        member = next((m for m in self.members.values() if m.node == answer.node), None)
        if member is None:
            return
        rivals = [node for node, facts in self._rivals.items() if facts.label == member.label]
        if answer.failure:
            if rivals:
                self._remove(member, "replaced by its new connection")
                self._refuse(member.node, End.TAKEN)  # in case the first was only slow
            return
        if member.behind:
            member.behind = False
            self.say(f"{member.label} answers again")
        for node in rivals:
            self.say(f"{member.label} refused: {End.TAKEN}")
            self.audit.write("refused", hospital=member.label, why=End.TAKEN)
            self._refuse(node, End.TAKEN)
            del self._rivals[node]

    def _look_at(self, node: int, about: dict) -> Facts | Refusal:
        """A hospital's facts, or the reason why it can't be a member. Raises MedFLError if they make no sense."""
        who = parse(Introduction, {name: about[name] for name in Introduction.model_fields if name in about})
        if not LABEL.fullmatch(who.label) or who.cid is not None and who.label != f"hospital-{who.cid}":
            raise MedFLError(
                "its label is not one that run_client.py gives; use the same version of MedFL everywhere"
            )
        if refusal := self._refusal(node, who):
            return refusal
        facts = parse(Facts, about)
        early = not self._settled and facts.role != "check"
        return facts if early else self._other_data(facts, self._known) or facts

    def settle(self) -> bool:
        """Refuse members, and from now on newcomers, whose data belong to another task or another divided dataset than
        those of most hospitals. The majority decides, because otherwise the first hospital to come could have all
        others refused. Returns whether a member was refused."""
        members = list(self.members.values())
        training = [one.facts for one in members if one.facts.role == "train"]
        voters = [*self.contributors.values()] or training or [one.facts for one in members]
        right = _most_common(voters, lambda facts: facts.outlined)
        shares = _most_common(
            [one for one in voters if not one.own_data], lambda facts: facts.partition_sha256
        )
        out = {one.label: self._other_data(one.facts, [*shares, *right]) for one in members}
        for member in members:
            if refusal := out[member.label]:
                self._remove(member, f"its data do not match those of most hospitals ({refusal.code})")
                self.audit.write("refused", hospital=member.label, node=str(member.node), why=refusal.code)
                self._refuse(member.node, refusal.code, refusal.detail)
        self._settled = True
        return any(out.values())

    def _other_data(self, facts: Facts, known: list[Facts]) -> Refusal | None:
        """Why a hospital's data do not match those of these hospitals; None if they do."""
        partition = next((one.partition_sha256 for one in known if not one.own_data), None)
        if not facts.own_data and partition not in (None, facts.partition_sha256):
            return Refusal(facts.label, End.SPLIT)
        if known and facts.outlined != known[-1].outlined:
            return Refusal(facts.label, End.TASK, (known[-1].task or LGG).region)
        return None

    def _refusal(self, node: int, who: Introduction) -> Refusal | None:
        """Why a hospital with this introduction can't be a member, whatever its data are; None if it can."""
        known, ours = self.labels(), self.about["versions"]
        if known is not None and known.get(node) != who.label:
            return Refusal(who.label, End.IDENTITY, known.get(node, "nobody"))
        other = [
            f"{name} {who.versions.get(name)} instead of {ours[name]}"
            for name in ("medfl", "flwr", "timm")
            if who.versions.get(name) != ours[name]
        ]
        if other:
            return Refusal(who.label, End.VERSION, ", ".join(other))
        if who.cid is not None and who.cid >= self.settings.clients:
            return Refusal(who.label, End.NUMBER, str(self.settings.clients))
        # with keys, the list of admissions decides who may join, now or in any later round
        places = self.settings.clients if known is None and who.role != "observe" else None
        if places is not None and who.label not in self.members and len(self.training) >= places:
            return Refusal(who.label, End.FULL)
        return None

    def _admit(self, node: int, facts: Facts) -> None:
        back = facts.label in self.members
        self._tries.pop(node, None)
        member = Member(facts.label, node, facts.session, facts)
        self.members[member.label] = member
        parts, promise, torch_note = facts.parts, facts.patient_privacy, ""
        if facts.versions.get("torch") != self.about["versions"]["torch"]:
            torch_note = (
                f"; it runs torch {facts.versions.get('torch')}, the server {self.about['versions']['torch']}"
            )
        self.audit.write("joined", hospital=member.label)
        train, val = parts["train"], parts["val"]
        said = f"{member.label} {'is back' if back else 'joined'}: {counted(train.patients, 'patient')} to train on "
        said += f"({counted(train.slices, 'slice')}), {val.patients} for validation{torch_note}"
        if promise:
            said += f"; it promises them epsilon {promise.epsilon:g} at delta {promise.delta:g}"
        if facts.role == "observe":
            said += "; it scores and does not train"
        self.say(said)

    def _remove(self, member: Member, why: str) -> None:
        self.say(f"{member.label}: {why}")
        self.audit.write("left", hospital=member.label, why=why)
        del self.members[member.label]

    def _refuse(self, node: int, code: End, detail: str = "") -> None:
        self.mailbox.send(
            [node], "query", "end", {"query": Query.END, "code": code, "detail": detail}, PING_TIME
        )


def _most_common(told: list[Facts], what: Callable[[Facts], object]) -> list[Facts]:
    """One of the facts that share the most common value of `what`, as a list; among equally common ones, the first.
    Empty without facts."""
    counts = Counter(what(facts) for facts in told)
    return [max(told, key=lambda facts: counts[what(facts)])] if told else []
