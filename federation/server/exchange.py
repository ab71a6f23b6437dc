"""The server's exchange with the hospitals: waiting for members, sending messages and waiting for answers."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from common import MedFLError, counted
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import part_mask, payload, to_record
from federation.server.mailbox import NO_ANSWER, SPARE, Answer, Mailbox
from federation.server.membership import PURPOSES, Member, Membership
from federation.server.updates import NoRoom

TICK = 0.2  # seconds between two looks for answers
LATE_TIME = 120.0  # seconds that a resumed run waits for the others once enough hospitals are there
REMIND = 60.0  # seconds between two lines that name the missing hospitals

Take = Callable[
    [Member, Answer], None
]  # processes an answer with its arrays; raises MedFLError if it can't count


class NoQuorum(MedFLError):
    """Too few hospitals are left to continue."""


class Exchange:
    """Sends the members messages and waits for their answers.

    about: the content of every message with weights (settings and the run's name). known: returns the labels of the
    hospitals that ever gave an update.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        membership: Membership,
        settings: FederationSettings,
        about: dict,
        model: nn.Module,
        known: Callable[[], list[str]],
        say: Callable[[str], None],
    ):
        self.mailbox, self.membership, self.settings, self.about, self.model = (
            mailbox,
            membership,
            settings,
            about,
            model,
        )
        self.known, self.say = known, say
        self._observers = False  # whether hospitals that only score count as well
        self._complaints: dict[str, set[str]] = {}  # in secure aggregation: who complained, by node
        self._have: set[str] = (
            set()
        )  # sessions of hospitals that hold a whole model, so that parts of it are enough

    def assemble(self, resumed: bool, observers: bool = False) -> None:
        """Wait for the hospitals that a run begins with. A resumed run waits for those that took part before and may
        still come, but only `LATE_TIME` once enough are there. observers: whether these count as well."""
        self._observers = observers
        began, told, told_at, enough = time.monotonic(), "", 0.0, None
        while self._incomplete(resumed) or self.membership.settle():  # others may come for refused members
            for _ in self._attend():
                pass
            count, now = len(self._here), time.monotonic()
            whom = counted(self.settings.clients, "hospital")
            are = "is" if self.settings.clients == 1 else "are"
            said = f"{count} of {whom} {are} here{self._why_not_all()}"
            if said != told or now - told_at > REMIND:
                told, told_at = said, now
                self.say(said)
            if count < self.settings.beginners:
                enough = None
                if resumed and now - began > self.settings.round_timeout:
                    raise NoQuorum(self.too_few(count))
            elif enough is None:
                enough = now
            if resumed and enough and now - enough > min(LATE_TIME, self.settings.round_timeout):
                self.membership.settle()
                break
            time.sleep(TICK)
        if self.missing():
            self.say("continuing with those that are here")

    @property
    def _here(self) -> set[str]:
        """The labels of the members that count."""
        return set(self.membership.members) if self._observers else self.membership.training

    def _incomplete(self, resumed: bool) -> bool:
        """Whether to wait for more hospitals before the first round of this start."""
        here, known = self._here, set(self.known())
        if not (resumed and known):
            return len(here) < self.settings.clients
        admitted = self.membership.labels()
        may_come = known if admitted is None else known & set(admitted.values())
        return bool(may_come - here) or len(here) < self.settings.beginners

    def _why_not_all(self) -> str:
        """The missing hospitals, and a hint if fewer keys are admitted than the run waits for."""
        said = f"; missing: {', '.join(self.missing())}" if self.missing() else ""
        admitted = self.membership.labels()
        if admitted is None or len(admitted) >= self.settings.clients:
            return said
        return (
            f"{said}; {counted(len(admitted), 'key')} admitted, but the run waits for {self.settings.clients} "
            "hospitals: admit more with `provision.py admit`, or start with fewer --clients"
        )

    def missing(self) -> list[str]:
        """The labels that are expected and not there.

        First come hospitals that took part before, unless their key is revoked. Then come those whose keys are
        admitted or, without keys, the numbered ones. These are left out if more could come than the run waits for;
        the numbered ones also if hospitals with own data chose their names.
        """
        here, admitted = self._here, self.membership.labels()
        keys = None if admitted is None else set(admitted.values())
        absent = [
            label for label in sorted(self.known()) if label not in here and (keys is None or label in keys)
        ]
        others = sorted(keys or ())
        if admitted is None and not any(self.membership.members[label].facts.own_data for label in here):
            others = [f"hospital-{k}" for k in range(self.settings.clients)]
        room = max(self.settings.clients - len(here), 0)
        more = [label for label in others if label not in here and label not in absent]
        return [*absent, *(more if len(absent) + len(more) <= room else [])][:room]

    def too_few(self, count: int) -> str:
        """The sentence for a round in which only `count` hospitals took part."""
        missing = f" (missing: {', '.join(self.missing())})" if self.missing() else ""
        return (
            f"{count} of {counted(self.settings.clients, 'hospital')} took part and a round needs "
            f"{self.settings.beginners}{missing}; check on them, then continue with --resume"
        )

    def quorum(self) -> list[Member]:
        """The members that can be given work. Raises NoQuorum if too few come within a round's time."""
        until = time.monotonic() + self.settings.round_timeout
        told = False
        while len(present := self.membership.present) < self.settings.beginners or self.membership.disputed:
            if not told and not self.membership.disputed:
                self.say(
                    f"{len(present)} of {counted(self.settings.clients, 'hospital')} can work and a round needs "
                    f"{self.settings.beginners}; waiting up to {self.settings.round_timeout:.0f} s for "
                    f"{', '.join(self.missing()) or 'those behind'}"
                )
                told = True
            if time.monotonic() > until:
                raise NoQuorum(self.too_few(len(present)))
            for _ in self._attend():
                pass
            time.sleep(TICK)
        return present

    def send(
        self,
        kind: str,
        purpose: str,
        members: list[Member],
        about: dict,
        weights: torch.Tensor,
        left_out: list[str],
        own: dict[str, dict] | None = None,
    ) -> dict[str, int]:
        """Send the members one message with the weights. Members that hold a model get the weights without the parts
        in `left_out`. own: further content for each member, by label. Returns the bytes sent to each, by label."""
        holders = [m for m in members if m.session in self._have] if left_out else []
        sent: dict[str, int] = {}
        for some, without in ((holders, left_out), ([m for m in members if m not in holders], [])):
            if not some:
                continue
            part = to_record(weights[part_mask(self.model, without)], self.settings.update_dtype)
            message = {**self.about, "without": without, **about}
            # Flower keeps the message a little longer, so that our own timeout is the first to report a missing
            # answer
            time_to_live = self.settings.round_timeout + SPARE
            if own is None:
                self.mailbox.send([m.node for m in some], kind, purpose, message, time_to_live, part)
            else:
                for member in some:
                    self.mailbox.send(
                        [member.node], kind, purpose, message | own[member.label], time_to_live, part
                    )
            sent |= {member.label: payload(part) for member in some}
        return sent

    def wait(
        self,
        purpose: str,
        members: list[Member],
        title: str,
        limit: float | None = None,
        take: Take | None = None,
    ) -> tuple[dict[str, Answer], dict[str, str]]:
        """Wait for answers, for `limit` seconds or as long as a round may take. Returns the answers, and the reasons
        where there is none, by label.

        take: is called with each answer as it arrives; an answer that it refuses counts as a failure. The arrays are
        released after that.
        """
        by_node = {member.node: member for member in members}
        answers: dict[str, Answer] = {}
        failures: dict[str, str] = {}
        limit = limit or self.settings.round_timeout
        until = time.monotonic() + limit
        with tqdm(total=len(members), desc=title, unit="hospital", leave=False, disable=None) as bar:
            over = False
            while len(answers) + len(failures) < len(members) and not over:
                over = time.monotonic() > until  # answers that have arrived by then are still processed
                for answer in self._attend(over):
                    member = by_node.get(answer.node) if answer.purpose == purpose else None
                    if member is None or member.label in failures:
                        continue
                    self._sort(member, answer, take, answers, failures)
                    bar.update()
                waiting = [m.label for m in members if m.label not in answers and m.label not in failures]
                for label in waiting:
                    now = self.membership.members.get(label)
                    if now and now.node not in by_node:  # messages to its old connection are lost
                        failures[label] = "it reconnected during the round; it takes part in the next one"
                bar.set_postfix_str(f"waiting for {', '.join(waiting)}" if waiting else "", refresh=False)
                time.sleep(TICK)
        self.mailbox.drop(purpose)
        for member in members:
            if member.label not in answers and member.label not in failures:
                failures[member.label] = f"no answer within {limit:.0f} s"
                self.membership.fell_behind(member)
        return answers, failures

    def complaints(self) -> dict[str, set[str]]:
        """The labels of the hospitals that could not use a node's shares, by node, since the last call."""
        complaints, self._complaints = self._complaints, {}
        return complaints

    def holds(self, member: Member) -> None:
        """Note that a member holds a whole model now."""
        self._have.add(member.session)

    def _sort(
        self,
        member: Member,
        answer: Answer,
        take: Take | None,
        answers: dict[str, Answer],
        failures: dict[str, str],
    ) -> None:
        """Add an answer to the answers, or its failure to the failures."""
        if answer.failure:
            failures[member.label] = answer.failure
            if isinstance(of := answer.about.get("of"), str):
                self._complaints.setdefault(of, set()).add(member.label)
            if answer.failure == NO_ANSWER:
                self.membership.fell_behind(member)
            return
        if take:
            try:
                take(member, answer)
            except NoRoom:
                raise
            except MedFLError as error:
                failures[member.label] = f"{error}; it is left out"
                return
            except (
                Exception
            ) as error:  # any error from an answer is its hospital's failure, and the round continues
                failures[member.label] = f"its answer can't be used ({type(error).__name__}); it is left out"
                return
            finally:
                answer.arrays = None
        answers[member.label] = answer

    def _attend(self, last: bool = False) -> Iterator[Answer]:
        """Update the membership once, and yield the answers that do not belong to it. last: see Mailbox.collect."""
        self.membership.poll()
        for answer in self.mailbox.collect(last):
            if answer.purpose in PURPOSES:
                self.membership.handle(answer)
            else:
                yield answer
