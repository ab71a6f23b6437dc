"""The server's side of a round with secure aggregation: it relays keys and sealed shares, adds up the masked
updates and unmasks the sum."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord

from common import MedFLError
from federation.protocol.answers import Agreed, OpenShares, PublicKeys, SealedShares, Trained, parse
from federation.protocol.masks import binding, check_keys, from_sum, sha256_of
from federation.protocol.messages import FAILURES, Failure, Query
from federation.protocol.proofs import check, keys_statement
from federation.protocol.secure_aggregation import LEAST, WrongShares, threshold, unmasked
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import MASKED, values_of
from federation.server.mailbox import Answer, Mailbox
from federation.server.membership import Member
from federation.server.updates import capped

STAGE_TIME = 60.0  # seconds for an answer in the stages in which nobody trains, also on a busy machine

Told = TypeVar("Told")  # what an answer is read into
Wait = Callable[[str, list[Member], str, float], tuple[dict[str, Answer], dict[str, str]]]


class SecureRound:
    """One attempt at one round.

    Masked updates are added up as they come, so memory holds their sum and no single update.

    Args:
        wait: waits for members' answers to a purpose, with a title and a limit in seconds; returns the answers, and
            the reasons where there is none, by label.
        purpose: a name that no other attempt has.
        length: the number of values in an update.
        run: the run's name.
        model: SHA-256 of the weights that are sent.
        told: the settings as they are sent, and the rate.
        signers: public keys (OpenSSH's lines), by node, that must have signed the hospitals' keys; None without kits.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        wait: Wait,
        settings: FederationSettings,
        number: int,
        purpose: str,
        length: int,
        run: str,
        model: str,
        told: list,
        signers: dict[int, str] | None,
    ):
        self.mailbox, self.wait, self.settings, self.number, self.purpose = (
            mailbox,
            wait,
            settings,
            number,
            purpose,
        )
        self.run, self.model, self.told, self.signers = run, model, told, signers
        self.total, self.examples = np.zeros(length, np.uint32), 0.0
        self.most = 0  # the most slices that one hospital counts for
        self.public: dict[int, list[str]] = {}  # keys, by node
        self.names: dict[str, str] = {}  # labels, by node
        self.promised: dict[int, SealedShares] = {}  # what hospitals promised about their shares, by node
        self.shared: dict[str, Member] = {}  # those who gave shares to the others, by label
        self.failures: dict[str, str] = {}  # why hospitals dropped out, by label
        self.lost = False  # shares were given without a sum; hospitals give none of this round again
        # who broke the protocol after its update was taken, and how, by label; shown by what it sent
        self.blamed: dict[str, str] = {}
        self.silent: set[str] = set()  # who left the sum with too few codes; excluded from the next attempt

    def prepare(self, members: list[Member]) -> dict[str, dict]:
        """The first two stages. Returns what is added to the message that asks for the update, by label; nothing
        if too few hospitals are left."""
        this = {"run": self.run, "round": self.number}
        keys, self.failures = self._ask(
            "keys", members, lambda member: {"query": Query.KEYS, **this}, self._keys
        )
        for label in _alike(keys):
            self.failures[label] = "it sent keys for the secure aggregation that another hospital has"
            del keys[label]
        members = [member for member in members if member.label in keys]
        if len(members) < LEAST:
            return {}
        self.public = {member.node: keys[member.label].keys for member in members}
        self.names = {str(member.node): member.label for member in members}
        participants = {
            str(member.node): {"label": member.label, **keys[member.label].model_dump()} for member in members
        }
        promised, failures = self._ask(
            "shares",
            members,
            lambda member: {"query": Query.SHARES, "keys": participants, **this},
            lambda about, member: _sealed(about, self.public.keys(), member.node),
        )
        self.failures |= failures
        members = [member for member in members if member.label in promised]
        if len(members) < threshold(len(self.public)):
            return {}
        self.shared = {member.label: member for member in members}
        self.promised = {member.node: promised[member.label] for member in members}
        slices = [member.facts.parts["train"].slices for member in members]
        self.most = max(1, int(max(capped(slices, self.settings.max_weight_ratio))))
        return {to.label: {"most": self.most, **self._for(to.node)} for to in members}

    def _for(self, node: int) -> dict[str, dict]:
        """The sealed shares that the others entrust to this node, and the hashes that they promised for them."""
        others = {str(by): promised for by, promised in self.promised.items() if by != node}
        return {
            "sealed": {by: promised.sealed[str(node)] for by, promised in others.items()},
            "promised": {by: promised.promised[str(node)] for by, promised in others.items()},
        }

    def take(self, member: Member, told: Trained, arrays: ArrayRecord | None) -> None:
        """Add a hospital's masked update to the sum. Raises MedFLError if it is no masked update, or if its count
        of slices is not allowed."""
        announced = member.facts.parts["train"].slices
        if not 0 < told.examples <= announced:
            raise MedFLError(f"its update counts {told.examples} slices, and it joined with {announced}")
        values = values_of(arrays, MASKED)
        if len(values) != len(self.total):
            raise MedFLError(f"its update has {len(values)} weights and the model {len(self.total)}")
        self.total += values
        self.examples += min(told.examples, self.most)

    def mean(self, labels: list[str], sent: torch.Tensor, travels: torch.Tensor) -> torch.Tensor | None:
        """The last three stages: the weights, (n,) float32, with the mean change of the hospitals whose updates
        were taken; None if there is no sum.

        sent: the weights, (n,) float32, that the round began with; travels: which of them are in the updates,
        (n,) bool.
        """
        hospitals = len(self.public)
        if len(labels) < max(threshold(hospitals), self.settings.quorum, LEAST):
            return None  # nothing is opened
        here = [self.shared[label] for label in labels]
        summed = [member.node for member in here]
        missing = [member.node for member in self.shared.values() if member.node not in summed]
        sum_ = {"summed": summed, "missing": missing}
        agreed, failures = self._ask(
            "agree", here, lambda member: {"query": Query.AGREE, **sum_}, self._codes, blames=True
        )
        here = [member for member in here if member.label in agreed]
        if len(here) < threshold(hospitals):
            self.failures |= failures
            # a refusal: shares of this round were given before, for a sum with hospitals that are not here
            self.lost = FAILURES[Failure.PROTOCOL] in failures.values()
            self.silent = set(failures)
            return None
        codes = {self.shared[label].node: one for label, one in agreed.items()}
        given, failures = self._ask(
            "unmask",
            here,
            lambda member: {
                "query": Query.UNMASK,
                "agreed": {str(by): one[member.node] for by, one in codes.items() if by != member.node},
                **sum_,
            },
            lambda about, member: self._opened(about, member, summed, missing),
            blames=True,
        )
        shares = {node: [one[node] for one in given.values()] for node in (*summed, *missing)}
        seeds = {node: promised.seed for node, promised in self.promised.items()}
        try:
            total = unmasked(self.total, shares, summed, self.public, self._bound, seeds)
            change = from_sum(total, len(summed), self.settings.secure_range, hospitals)
        except MedFLError as error:
            self.failures |= failures | {
                "the sum": str(error)
            }  # without it a hospital that gave no shares is counted all the same
            self.lost = True
            if isinstance(error, WrongShares):
                self.blamed[self.names[str(error.node)]] = "the secret that its shares give is not its own"
            return None
        weights = sent.double()
        weights[travels] += change * (self.most / self.examples)
        return weights.float()

    @property
    def _bound(self) -> bytes:
        """What the hospitals' masks are bound to (`binding`)."""
        of = [self.run, self.number, self.most, self.model, *self.told]
        return binding(of, {str(node): keys for node, keys in self.public.items()}, self.names)

    def _keys(self, about: dict, member: Member) -> PublicKeys:
        """A hospital's two public keys. Raises MedFLError if they can't be used or are not signed by it, because the
        other hospitals would refuse the whole list."""
        keys = parse(PublicKeys, about, "its message of keys")
        check_keys(keys.keys)
        if self.signers is not None:
            statement = keys_statement(self.run, self.number, member.label, keys.keys)
            try:
                check(self.signers.get(member.node, ""), "keys", statement, keys.signature or "")
            except MedFLError as error:
                raise MedFLError("it sent keys for the secure aggregation that it did not sign") from error
        return keys

    def _codes(self, about: dict, member: Member) -> dict[int, str]:
        """A hospital's codes for the other hospitals, which confirm the sum, by node. Raises MedFLError for anything
        else."""
        return _by_node(parse(Agreed, about).codes, "codes", {*self.public} - {member.node})

    def _opened(self, about: dict, member: Member, summed: list[int], missing: list[int]) -> dict[int, str]:
        """The shares that a hospital gives, by the node whose secret each belongs to. Raises MedFLError if one is not
        the share that was entrusted to it."""
        shares = _by_node(parse(OpenShares, about).shares, "shares", {*summed, *missing})
        for node, share in shares.items():
            if sha256_of(share) != self.promised[node].promised[str(member.node)][node in missing]:
                raise MedFLError(f"it gave another share of {self.names[str(node)]} than it had got")
        return shares

    def _ask(
        self,
        stage: str,
        members: list[Member],
        about: Callable[[Member], dict],
        read: Callable[[dict, Member], Told],
        blames: bool = False,
    ) -> tuple[dict[str, Told], dict[str, str]]:
        """The members' answers in a stage, and the reasons where there is none, by label.

        read: reads an answer's text for a member, or raises MedFLError. blames: whether a member whose answer can't be
        right is noted in `blamed`. A member that refuses or is late is not, because another hospital may have caused
        that.
        """
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
                except Exception as error:  # any error while reading an answer is its hospital's failure
                    failures[member.label] = f"its answer can't be used ({type(error).__name__})"
                if blames and member.label in failures:
                    self.blamed[member.label] = failures[member.label]
        return found, failures


def _alike(keys: dict[str, PublicKeys]) -> list[str]:
    """The labels of the hospitals that sent a key which another one sent as well."""
    count = Counter(key for one in keys.values() for key in one.keys)
    return [label for label, one in keys.items() if any(count[key] > 1 for key in one.keys)]


def _sealed(about: dict, nodes: Collection[int], own: int) -> SealedShares:
    """The sealed shares that a hospital entrusts to the others. Raises MedFLError if any node's is missing or extra."""
    given = parse(SealedShares, about, "its message of sealed shares")
    _by_node(given.sealed, "sealed", {*nodes} - {own})
    if given.promised.keys() != {str(node) for node in nodes}:
        raise MedFLError("it sent no usable promises in the secure aggregation")
    return given


def _by_node(texts: dict[str, str], name: str, nodes: set[int]) -> dict[int, str]:
    """A text for each of these nodes. Raises MedFLError if any node is missing or extra."""
    if texts.keys() != {str(node) for node in nodes}:
        raise MedFLError(f"it sent no usable {name} in the secure aggregation")
    return {int(node): text for node, text in texts.items()}
