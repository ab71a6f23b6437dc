"""A round's updates: requested, checked one by one as they arrive, and then compared with each other."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import MedFLError
from federation.protocol.answers import Result, Trained, announced, parse
from federation.protocol.messages import FAILURES, Failure
from federation.protocol.proofs import Proof
from federation.protocol.weights import (
    FULL,
    common_mask,
    from_record,
    part_mask,
    variance_mask,
    weights_sha256,
)
from federation.server.exchange import Exchange
from federation.server.judging import Scores
from federation.server.mailbox import Answer
from federation.server.membership import Member
from federation.server.screening import check_update, screen
from federation.server.secure_round import SecureRound
from federation.server.state import RunState
from federation.server.updates import Updates


@dataclass
class Collected:
    """The result of one attempt at a round.

    members: the members that were there at its start. updates: the updates that may count. told: what hospitals
    reported about their training. observed: the scores of the hospitals that only observe. bytes: sent to each
    hospital, and received from it. failures: why a hospital's update does not count. proofs: what hospitals signed.
    blamed: how a hospital broke the secure aggregation, also if its update counts. unable: hospitals that could not
    train the model, or whose update does not fit into a secure sum. lost: whether a hospital's wrong secret made
    the sum of this round impossible. Dicts are by label.
    """

    members: list[Member]
    updates: Updates
    told: dict[str, Trained] = field(default_factory=dict)
    observed: dict[str, Result] = field(default_factory=dict)
    bytes: dict[str, tuple[int, int]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    proofs: dict[str, Proof] = field(default_factory=dict)
    blamed: dict[str, str] = field(default_factory=dict)
    unable: set[str] = field(default_factory=set)
    lost: bool = False

    @property
    def scores(self) -> Scores:
        """The hospitals' scores of the model that the round began with."""
        return {
            label: (told.val_dice, told.val_patients)
            for label, told in self.told.items()
            if told.val_dice is not None
        }


@dataclass
class Asked:
    """What was sent for one attempt at a round. members: the hospitals that train. observers: those that only score the
    model. travels: which of the weights are in an update, (n,) bool. sent: bytes, by label. secure: the secure
    aggregation, if there is one."""

    number: int
    purpose: str
    members: list[Member]
    observers: list[Member]
    travels: torch.Tensor
    sent: dict[str, int]
    secure: SecureRound | None


class Collector:
    """Collects the updates of each round in files below `out`."""

    def __init__(self, state: RunState, exchange: Exchange, out: Path):
        self.state, self.exchange, self.out = state, exchange, out
        self.settings = state.federation
        self.variances = variance_mask(state.model)
        # of secure aggregation: a round and the hospitals that broke the protocol in it; those that made a round's
        # sum impossible
        self._accused: tuple[int, set[str]] = (0, set())
        self._banned: set[str] = set()

    def collect(self, number: int, attempt: int, partition: str | None) -> Collected:
        """Send the model, and process the hospitals' answers as they arrive.

        number: the round; attempt: the attempt at it, from 1; partition: SHA-256 of the simulated hospitals'
        partition.
        """
        members = self.exchange.quorum()
        came = Collected(members, Updates(self.state.weights, self.state.is_statistic, self.out))
        asked = self._ask(number, f"round-{number}.{attempt}", members, partition)
        _, came.failures = self.exchange.wait(
            asked.purpose,
            [*asked.members, *asked.observers],
            f"round {number} of {self.settings.rounds}",
            take=lambda member, answer: self._take(member, answer, asked, came),
        )
        complaints = self.exchange.complaints()
        unfit = (FAILURES[Failure.TRAINING], FAILURES[Failure.PROTOCOL])
        # an observer's failure says nothing about training: by it one could have had each round taken back
        asked_to_train = {member.label for member in asked.members}
        came.unable = {
            label for label, why in came.failures.items() if why in unfit and label in asked_to_train
        }.difference(*complaints.values())
        if asked.secure:
            self._add_sum(asked.secure, asked, came, complaints)
        return came

    def _ask(self, number: int, purpose: str, members: list[Member], partition: str | None) -> Asked:
        """Send the model to the hospitals that train and to those that only observe."""
        left_out = self.settings.left_out(number <= self.state.training.frozen_epochs)
        travels = part_mask(self.state.model, left_out)
        about = {
            "round": number,
            "rate": self.state.rate,
            "seconds": self.settings.round_timeout,
            "partition": partition,
        }
        secure, own = None, None
        if self.settings.secure_aggregation:
            members = self._without_the_accused(number, members)
            secure = self._secure_round(number, purpose, int(travels.sum()))
            own = secure.prepare(members)
            members = [member for member in members if member.label in own]
        weights, observers = self.state.weights_as_sent, self.exchange.membership.observers
        sent = self.exchange.send("train", purpose, members, about, weights, left_out, own)
        watched = {"part": "val", "last": False}
        sent |= self.exchange.send(
            "evaluate", purpose, observers, watched, weights, self.settings.left_out(False)
        )
        return Asked(number, purpose, members, observers, travels, sent, secure)

    def _secure_round(self, number: int, purpose: str, length: int) -> SecureRound:
        """The secure aggregation of this attempt at a round. length: the number of weights that are sent."""
        model = weights_sha256(
            self.state.weights_as_sent, common_mask(self.state.model, self.settings.keep_norm_local)
        )
        return SecureRound(
            self.exchange.mailbox,
            self.exchange.wait,
            self.settings,
            number,
            purpose,
            length,
            self.state.progress.run,
            model,
            [self.exchange.about["settings"], self.state.rate],
            self.exchange.mailbox.keys(),
        )

    def _take(self, member: Member, answer: Answer, asked: Asked, came: Collected) -> None:
        """Check an answer and add it to `came`. Raises MedFLError if it can't be right."""
        if member in asked.observers:
            seen = parse(Result, answer.about)
            announced(seen, member.facts)
            came.observed[member.label], came.bytes[member.label] = seen, (asked.sent[member.label], 0)
            return
        told = parse(Trained, answer.about)
        if told.round != asked.number:
            raise MedFLError(f"its update is for round {told.round}")
        announced(told, member.facts)
        if asked.secure:
            asked.secure.take(member, told, answer.arrays)
        else:
            self._add_update(member, told, answer, came.updates, asked.travels)
        came.told[member.label] = told
        came.bytes[member.label] = asked.sent[member.label], answer.bytes
        if answer.proof:
            came.proofs[member.label] = answer.proof
        self.exchange.holds(member)

    def _add_sum(
        self, secure: SecureRound, asked: Asked, came: Collected, complaints: dict[str, set[str]]
    ) -> None:
        """Unmask the sum, and add the mean as the round's only update. complaints: those of the earlier stages, by the
        node that they are about."""
        mean = secure.mean(sorted(came.told), self.state.weights, asked.travels)
        for node, by in self.exchange.complaints().items():  # of the last stages
            complaints.setdefault(node, set()).update(by)
        for label in secure.failures.keys() & came.told.keys():
            del came.told[label]
        came.failures |= secure.failures
        came.lost = secure.lost
        came.blamed = secure.blamed | self._accuse(asked.number, secure, complaints, came.failures)
        if mean is not None:
            # single updates can't be checked here; a variance below 0 would ruin the model for everybody
            mean = torch.where(self.variances & (mean < 0), self.state.weights, mean)
            came.updates.add("the mean", mean, 1)

    def _without_the_accused(self, number: int, members: list[Member]) -> list[Member]:
        """The members, without those that broke the protocol in an earlier attempt at this round or made any round
        of this run impossible."""
        if self._accused[0] != number:
            self._accused = number, set()
        return [member for member in members if member.label not in self._accused[1] | self._banned]

    def _accuse(
        self, number: int, secure: SecureRound, complaints: dict[str, set[str]], failures: dict[str, str]
    ) -> dict[str, str]:
        """The hospitals whose shares or codes more than half of the others can't use, by label, with the reason.

        They are excluded from further attempts at this round; hospitals that made a round impossible are excluded from
        the rest of the run. One hospital's word is not enough, because it may lie: it drops out itself, and its
        entry in `failures` also names the hospital that it accuses.
        """
        found = {}
        for node, by in complaints.items():
            label, others = secure.names.get(node), {*secure.shared} - {secure.names.get(node)}
            if label and 2 * len(by & others) > len(others):
                found[label] = f"its shares or codes can't be used ({', '.join(sorted(by))} said so)"
                continue
            for accuser in by & failures.keys() if label else ():
                failures[accuser] += f"; it says that it can't use the shares or codes of {label}"
        self._accused[1].update(found, secure.silent)
        if secure.lost:
            self._banned |= {*secure.blamed, *found}
        return found

    def screen(self, came: Collected) -> None:
        """Leave out the updates that differ too much from the others."""
        for label, reason in screen(came.updates, self.settings).items():
            came.failures[label] = f"{reason}; it is left out"
            del came.told[label]

    def _add_update(
        self, member: Member, told: Trained, answer: Answer, updates: Updates, travels: torch.Tensor
    ) -> None:
        """Check an update and add it to the others. travels: which of the weights are in it, (n,) bool."""
        precision, sent = self.settings.update_dtype, self.state.weights
        update = from_record(answer.arrays, precision)
        if len(update) != int(
            travels.sum()
        ):  # an update of the whole model would change layers that are frozen or kept at the hospitals
            raise MedFLError(
                f"its update has {len(update)} weights, but {int(travels.sum())} of the model's travel in this round"
            )
        weights = sent.clone()
        weights[travels] = update + (0 if precision == FULL else sent[travels])
        check_update(weights, told.examples, len(sent), member.facts.parts["train"].slices, self.variances)
        updates.add(member.label, weights, told.examples)
