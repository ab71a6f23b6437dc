"""The server's side of a round with secure aggregation: relays keys and sealed shares, adds masked updates
up, unmasks the sum."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord

from common import MedFLError
from federation.protocol.answers import OpenShares, PublicKeys, SealedShares, Trained, parse
from federation.protocol.messages import Query
from federation.protocol.secure_aggregation import LEAST, from_sum, threshold, unmasked
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import values_of
from federation.server.mailbox import Answer, Mailbox
from federation.server.membership import Member
from federation.server.updates import capped

STAGE_TIME = 60.0  # seconds for an answer in the stages in which nobody trains, also on a busy machine

Told = TypeVar("Told")  # what is made of an answer
Wait = Callable[[str, list[Member], str, float], tuple[dict[str, Answer], dict[str, str]]]


class SecureRound:
    """One try of one round.

    wait: waits for the answers to a purpose from members, with a title and a limit in seconds; answers, and
    reasons for none, by label. purpose: a name for the try, unlike any other's. length: values of an update.
    Masked updates are added up as they come, so memory holds their sum and none of them.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        wait: Wait,
        settings: FederationSettings,
        number: int,
        purpose: str,
        length: int,
    ):
        self.mailbox, self.wait, self.settings, self.number, self.purpose = (
            mailbox,
            wait,
            settings,
            number,
            purpose,
        )
        self.total, self.examples = np.zeros(length, np.uint32), 0.0
        self.most = 0  # slices that count at most
        self.public: dict[int, list[str]] = {}  # keys, by node
        self.shared: dict[str, Member] = {}  # those who gave shares to the others, by label
        self.failures: dict[str, str] = {}  # why hospitals dropped out, by label

    def prepare(self, members: list[Member]) -> dict[str, dict]:
        """The first two stages: what the message that asks for the update says besides, by label; nothing if
        too few are left."""
        keys, self.failures = self._ask("keys", members, lambda member: {"query": Query.KEYS}, _keys)
        members = [member for member in members if member.label in keys]
        if len(members) < LEAST:
            return {}
        self.public = {member.node: keys[member.label] for member in members}
        public = {str(node): pair for node, pair in self.public.items()}
        sealed, failures = self._ask(
            "shares",
            members,
            lambda member: {"query": Query.SHARES, "keys": public},
            lambda about, member: _by_node(
                parse(SealedShares, about).sealed, "sealed", self.public.keys() - {member.node}
            ),
        )
        self.failures |= failures
        members = [member for member in members if member.label in sealed]
        if len(members) < threshold(len(self.public)):
            return {}
        self.shared = {member.label: member for member in members}
        slices = [member.facts.parts["train"].slices for member in members]
        self.most = max(1, int(max(capped(slices, self.settings.max_weight_ratio))))
        return {
            to.label: {
                "most": self.most,
                "sealed": {str(by.node): sealed[by.label][to.node] for by in members if by is not to},
            }
            for to in members
        }

    def take(self, member: Member, told: Trained, arrays: ArrayRecord | None) -> None:
        """Add a hospital's masked update to the sum. Raises MedFLError where it is none, or counts what it
        should not."""
        announced = member.facts.parts["train"].slices
        if not 0 < told.examples <= announced:
            raise MedFLError(f"its update counts {told.examples} slices, and it joined with {announced}")
        values = values_of(arrays, np.uint32)
        if len(values) != len(self.total):
            raise MedFLError(f"its update has {len(values)} weights and the model {len(self.total)}")
        self.total += values
        self.examples += min(told.examples, self.most)

    def mean(self, labels: list[str], sent: torch.Tensor, travels: torch.Tensor) -> torch.Tensor | None:
        """The last two stages: the weights, (n,) float32, with the mean change of the hospitals whose updates
        were taken; None where these are too few.

        sent: the weights, (n,) float32, that the round began with; travels: which of them are in the updates,
        (n,) bool.
        """
        hospitals = len(self.public)
        if len(labels) < max(threshold(hospitals), self.settings.quorum):
            return None  # and nothing is uncovered
        here = [self.shared[label] for label in labels]
        summed = [member.node for member in here]
        missing = [member.node for member in self.shared.values() if member.node not in summed]
        given, failures = self._ask(
            "unmask",
            here,
            lambda member: {"query": Query.UNMASK, "summed": summed, "missing": missing},
            lambda about, member: _by_node(parse(OpenShares, about).shares, "shares", {*summed, *missing}),
        )
        shares = {node: [one[node] for one in given.values()] for node in (*summed, *missing)}
        try:
            total = unmasked(self.total, shares, summed, self.public)
            change = from_sum(total, len(summed), self.settings.secure_range, hospitals)
        except MedFLError as error:
            self.failures |= failures | {
                "the sum": str(error)
            }  # without it a hospital that gave no shares is counted all the same
            return None
        weights = sent.double()
        weights[travels] += change * (self.most / self.examples)
        return weights.float()

    def _ask(
        self,
        stage: str,
        members: list[Member],
        about: Callable[[Member], dict],
        read: Callable[[dict, Member], Told],
    ) -> tuple[dict[str, Told], dict[str, str]]:
        """What members answer in a stage, and reasons for no answer, by label. read: makes it of an answer's
        text and the member, or raises MedFLError."""
        purpose = f"{self.purpose}-{stage}"
        found: dict[str, Told] = {}
        for member in members:
            self.mailbox.send([member.node], "query", purpose, about(member), STAGE_TIME)
        answers, failures = self.wait(
            purpose, members, f"round {self.number}, secure aggregation, {stage}", STAGE_TIME
        )
        for member in members:
            if member.label in answers:
                try:
                    found[member.label] = read(answers[member.label].about, member)
                except MedFLError as error:
                    failures[member.label] = str(error)
                except Exception as error:  # whatever an answer raises is its hospital's failure
                    failures[member.label] = f"its answer can't be used ({type(error).__name__})"
        return found, failures


def _keys(about: dict, member: Member) -> list[str]:
    """A hospital's two public keys, as text. Raises MedFLError where they are anything else."""
    return parse(PublicKeys, about, "its message of keys").keys


def _by_node(texts: dict[str, str], name: str, nodes: set[int]) -> dict[int, str]:
    """A text for each of these nodes. Raises MedFLError where there are others, or fewer."""
    if texts.keys() != {str(node) for node in nodes}:
        raise MedFLError(f"it sent no usable {name} in the secure aggregation")
    return {int(node): text for node, text in texts.items()}
