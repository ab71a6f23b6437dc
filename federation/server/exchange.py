"""The server's talk with the hospitals: who is there, what is sent to whom, and the wait for answers."""

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
LATE_TIME = 120.0  # seconds in which the others may come to a run that goes on, once enough are there
REMIND = 60.0  # seconds between two lines that say who is missing

Take = Callable[
    [Member, Answer], None
]  # takes in an answer with its arrays; raises MedFLError where it can't count


class NoQuorum(MedFLError):
    """Too few hospitals are left to go on."""


class Exchange:
    """Sends the members messages and waits for what they answer.

    about: what every message with weights says (settings and the run's name). known: labels of those that
    ever gave an update.
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
        self._observers = False  # whether those that only score count as well
        self._complaints: dict[str, set[str]] = {}  # by node, of secure aggregation
        self._have: set[str] = (
            set()
        )  # sessions of hospitals that hold a whole model, so that parts of it are enough

    def assemble(self, resumed: bool, observers: bool = False) -> None:
        """Wait for the hospitals that a run begins with. A resumed run waits for those that took part before
        and may still come, and, once enough are there, not much longer. observers: they count as well."""
        self._observers = observers
        began, told, told_at, enough = time.monotonic(), "", 0.0, None
        while self._incomplete(resumed) or self.membership.settle():  # for who had to go another may come
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
            self.say("going on with those that are here")

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
        """Who is missing, and whether fewer keys are admitted than hospitals are waited for."""
        said = f"; missing: {', '.join(self.missing())}" if self.missing() else ""
        admitted = self.membership.labels()
        if admitted is None or len(admitted) >= self.settings.clients:
            return said
        return (
            f"{said}; {counted(len(admitted), 'key')} admitted and {self.settings.clients} hospitals are waited "
            "for: admit more with `provision.py admit`, or start with fewer --clients"
        )

    def missing(self) -> list[str]:
        """Labels that are expected and not there: those that took part before, then those whose keys are
        admitted, or numbers; of the latter none where more could come than are waited for, or where hospitals
        with own data chose their names. A hospital whose key is revoked can't come."""
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
        """The sentence about a round that only so many hospitals took part in."""
        missing = f" (missing: {', '.join(self.missing())})" if self.missing() else ""
        return (
            f"{count} of {counted(self.settings.clients, 'hospital')} took part and a round needs "
            f"{self.settings.beginners}{missing}; see to them and go on with --resume"
        )

    def quorum(self) -> list[Member]:
        """The members that can be given work. Raises NoQuorum where too few come within a round's time."""
        until = time.monotonic() + self.settings.round_timeout
        told = False
        while len(present := self.membership.present) < self.settings.beginners or self.membership.disputed:
            if not told and not self.membership.disputed:
                self.say(
                    f"{len(present)} of {counted(self.settings.clients, 'hospital')} can work, a round needs "
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
        """Send the members one message with the weights; those who hold a model get it without the parts that
        are left out. own: what is said to each besides, by label. The bytes that went to each, by label."""
        holders = [m for m in members if m.session in self._have] if left_out else []
        sent: dict[str, int] = {}
        for some, without in ((holders, left_out), ([m for m in members if m not in holders], [])):
            if not some:
                continue
            part = to_record(weights[part_mask(self.model, without)], self.settings.update_dtype)
            message = {**self.about, "without": without, **about}
            # Flower lets the message live a little longer, so that it is we who say that somebody gave no
            # answer in time
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
        """Wait for answers, for `limit` seconds or as long as a round may take: answers, and reasons for
        none, by label.

        take: is given each answer as it comes; an answer that it refuses is a failure. The arrays are let go
        of then.
        """
        by_node = {member.node: member for member in members}
        answers: dict[str, Answer] = {}
        failures: dict[str, str] = {}
        limit = limit or self.settings.round_timeout
        until = time.monotonic() + limit
        with tqdm(total=len(members), desc=title, unit="hospital", leave=False, disable=None) as bar:
            over = False
            while len(answers) + len(failures) < len(members) and not over:
                over = time.monotonic() > until  # then whatever is there is still taken in
                for answer in self._attend(over):
                    member = by_node.get(answer.node) if answer.purpose == purpose else None
                    if member is None or member.label in failures:
                        continue
                    self._sort(member, answer, take, answers, failures)
                    bar.update()
                waiting = [m.label for m in members if m.label not in answers and m.label not in failures]
                for label in waiting:
                    now = self.membership.members.get(label)
                    if now and now.node not in by_node:  # what was sent to its old connection is lost
                        failures[label] = "it came back with a new connection; the next round counts on it"
                bar.set_postfix_str(f"waiting for {', '.join(waiting)}" if waiting else "", refresh=False)
                time.sleep(TICK)
        self.mailbox.drop(purpose)
        for member in members:
            if member.label not in answers and member.label not in failures:
                failures[member.label] = f"no answer within {limit:.0f} s"
                self.membership.fell_behind(member)
        return answers, failures

    def complaints(self) -> dict[str, set[str]]:
        """Who could not use the shares of which node since this was asked last."""
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
        """Put an answer among the answers, or its failure among the failures."""
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
            ) as error:  # whatever an answer raises is its hospital's failure, and the round goes on
                failures[member.label] = f"its answer can't be used ({type(error).__name__}); it is left out"
                return
            finally:
                answer.arrays = None
        answers[member.label] = answer

    def _attend(self, last: bool = False) -> Iterator[Answer]:
        """One look at who comes and goes, and at the answers; those
        to other questions than the membership's. last: see Mailbox.collect."""
        self.membership.poll()
        for answer in self.mailbox.collect(last):
            if answer.purpose in PURPOSES:
                self.membership.handle(answer)
            else:
                yield answer
