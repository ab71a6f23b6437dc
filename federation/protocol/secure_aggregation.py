"""Secure aggregation: the server learns the sum of the hospitals' updates, but no single update.

The protocol is SecAgg+ (Bell et al. 2020, doi 10.1145/3372297.3417885, after Bonawitz et al. 2017, doi
10.1145/3133956.3133982) in which every hospital is a neighbour of every other. It has five stages:

1. Hospitals send public keys.
2. Through the server they send each other sealed Shamir shares of two secrets: a seed and a private key.
3. They send updates under masks.
4. They tell each other whose updates are in the sum.
5. They give the shares with which the server removes the masks from the sum.

A hospital's own mask is removed with the shares of its seed. The masks between two hospitals in the sum cancel.
The masks shared with a hospital that dropped out are removed with the shares of that hospital's key. For no
hospital does the server get the shares of both secrets, which together would open its update.

A server may tell hospitals different things. Therefore every mask is derived from a hash that each hospital
computes itself, of run, round, total, model, settings, rate and participants (`binding`). If two hospitals were
told different values, their masks don't cancel. Shares are sealed under keys that depend on the participants, so
hospitals that were told others can't open them. A hospital also gives no share before more than half of the
hospitals have confirmed, under keys that the server doesn't have, that they were told the same members of the sum
(`Party.agree`; the consistency check of Bonawitz et al.). Otherwise, with five hospitals or more, a server that
told each of them different members could gather the shares for a whole update. Hashes of all shares
(`Party.promised`) show who gave wrong ones.

Keys, key agreement, sealing and shares are Flower's. Flower's `secaggplus_mod` and `SecAggPlusWorkflow` (1.41) are
not used, for four reasons. They fold each mask's key into 32 bits for a generator that is not cryptographic, so
masks can be found by search. A hospital that drops out in the first two stages ends the round. Values out of range
are cut, and counts above a limit overflow, both in silence. And a hospital would give both secrets of another
hospital if asked for them.
"""

import base64
import hashlib
import hmac
import json
import secrets
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import (
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from common import MedFLError
from federation.protocol.masks import binding, bound_key, mask, quantise, sha256_of, shared_mask

LEAST = 3  # hospitals in a sum: from a sum of two, each can work out the other's update


class WrongShares(MedFLError):
    """Shares or codes that are not what they should be. node: the hospital that made them."""

    def __init__(self, sentence: str, node: int):
        super().__init__(sentence)
        self.node = node


def threshold(hospitals: int) -> int:
    """How many shares open a secret: more than half of the hospitals.

    If half were enough, a server could ask one half of the hospitals for the seed of a hospital, as if it were in
    the sum, and the other half for its key, as if it were missing. With both it would see that hospital's update.
    Two groups that are each more than half have at least one hospital in common, and no hospital gives both.
    """
    return hospitals // 2 + 1


@dataclass
class Party:
    """A hospital's part in the protocol: one attempt at one round at a time.

    stage: the last one that it took part in. names: the hospitals' names, by node. promised: SHA-256 of the
    shares that it made of its seed and of its key, by node. given: what was summed in each round for which
    it gave shares (`_account`), by round, as JSON of the run's name and the round's number. Binary values are kept
    as hexadecimal text and nodes as text, so that JSON can hold them between two messages. Each function
    raises MedFLError if the server asks for something that it must not have.
    """

    node: int = 0
    stage: str = ""
    private: list[str] = field(default_factory=list)  # one key for masks, one for sealing
    public: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    promised: dict[str, list[str]] = field(default_factory=dict)
    seed: str = ""
    shares: dict[str, list[str]] = field(
        default_factory=dict
    )  # that others entrusted to it: of their seed, of their key
    round: list = field(default_factory=list)  # that the keys are for: the run's name, the round's number
    # SHA-256 of the total that slices are divided by, the settings and the rate; then that of what training began with
    counted: str = ""
    sum: list[list[int]] = field(default_factory=list)  # as agreed: hospitals in the sum, hospitals missing
    given: dict[str, list[str]] = field(default_factory=dict)

    def keys(self, node: int) -> list[str]:
        """Stage 1: start a new attempt with new secrets. Returns the public keys, for masks and for sealing."""
        self.__dict__.update(asdict(Party(node, given=self.given)))
        pairs = [generate_key_pairs() for _ in range(2)]
        self.private = [private_key_to_bytes(private).hex() for private, _ in pairs]
        self.seed, self.stage = secrets.token_bytes(32).hex(), "keys"
        return [public_key_to_bytes(public).hex() for _, public in pairs]

    def share(
        self, public: dict[str, list[str]], names: dict[str, str] | None = None, of: list | None = None
    ) -> dict[str, str]:
        """Stage 2: the shares of this hospital's secrets, sealed for each other hospital, by node.

        Args:
            public: everybody's public keys, by node.
            names: the hospitals' names, by node.
            of: the run and the round that the keys are for.
        """
        self._expect("keys")
        own = [
            public_key_to_bytes(bytes_to_private_key(bytes.fromhex(key)).public_key()).hex()
            for key in self.private
        ]
        everything = [key for keys in public.values() for key in keys]
        if len(public) < LEAST or len(set(everything)) < len(everything) or public.get(str(self.node)) != own:
            raise MedFLError(
                f"the server's list of keys is not what it should be ({len(public)} hospitals); nothing was "
                f"given"
            )
        self.public, self.names, self.round, self.stage = public, names or {}, of or [], "shares"
        secret = [
            create_shares(bytes.fromhex(one), threshold(len(public)), len(public))
            for one in (self.seed, self.private[0])
        ]
        sealed = {}
        for node, of_seed, of_key in zip(public, *secret):
            self.promised[node] = [sha256_of(share.hex()) for share in (of_seed, of_key)]
            if node == str(self.node):
                self.shares[node] = [of_seed.hex(), of_key.hex()]
            else:
                sealed[node] = encrypt(
                    self._seal(node), share_keys_plaintext_concat(self.node, int(node), of_seed, of_key)
                ).hex()
        return sealed

    def masked(
        self,
        sealed: dict[str, str],
        change: torch.Tensor,
        weight: float,
        limit: float,
        of: list,
        promised: dict[str, list[str]] | None = None,
        begun: str = "",
    ) -> np.ndarray:
        """Stage 3: this hospital's weighted change under its masks, (n,) uint32.

        Args:
            sealed: the other hospitals' sealed shares, by node.
            of: run, round, and what else the masks are bound to (`binding`).
            promised: SHA-256 of the shares that are sealed.
            begun: SHA-256 of what only this hospital's training began with.

        Raises:
            WrongShares: a share is not what it should be.
        """
        self._expect("shares")
        # once in an attempt: asked again, it would mask with other hospitals than those whose shares it holds. The
        # server could combine the answers so that only a missing hospital's masks, which it can remove, are left
        self.stage = "revealed"
        self._open_shares(sealed, promised)
        if self.round and self.round != of[:2]:
            raise MedFLError("the server asked for the update of another round than the keys are for")
        run_and_round, most, settings_and_rate = of[:2], of[2:3], of[4:]
        counted = f"{hashlib.sha256(json.dumps([most, settings_and_rate]).encode()).hexdigest()} {begun}"
        # a different update of the same round would give away its difference from the first one: the shares to open
        # it would come from the others, without this hospital's consent. A different total needs no check here: all
        # hospitals see it, and give no shares
        if self.given.get(json.dumps(run_and_round), [counted])[-1].split(" ")[-1] != begun:
            raise MedFLError(
                "the server asked again for an update of a round that was summed already, and this hospital would now "
                "begin it otherwise; nothing was sent"
            )
        bound = binding(of, self.public, self.names)
        values = quantise(change, weight, limit, len(self.public))
        # unsigned 32-bit numbers wrap around to 0, as intended
        values += mask(bound_key(bytes.fromhex(self.seed), bound), len(values))
        for node in sealed:
            between = shared_mask(
                bytes.fromhex(self.private[0]), bytes.fromhex(self.public[node][0]), len(values), bound
            )
            values = values + between if self.node > int(node) else values - between
        self.round, self.counted, self.stage = run_and_round, counted, "masked"
        return values

    def _open_shares(self, sealed: dict[str, str], promised: dict[str, list[str]] | None) -> None:
        """Open the other hospitals' shares, and keep them. Raises as `masked` says."""
        others = self.public.keys() - {str(self.node)}
        if not sealed.keys() <= others or len(sealed) + 1 < threshold(len(self.public)):
            raise MedFLError(
                "the server brought shares of too few hospitals, or of unknown ones; nothing was sent"
            )
        for node, text in sealed.items():
            try:
                source, target, of_seed, of_key = share_keys_plaintext_separate(
                    decrypt(self._seal(node), bytes.fromhex(text))
                )
            except Exception as error:  # bytes from elsewhere
                raise WrongShares(
                    "another hospital's shares can't be opened; nothing was sent", int(node)
                ) from error
            if (source, target) != (int(node), self.node):
                raise WrongShares(
                    "another hospital's shares were meant for somebody else; nothing was sent", int(node)
                )
            self.shares[node] = [of_seed.hex(), of_key.hex()]
            if promised and promised.get(node) != [sha256_of(share) for share in self.shares[node]]:
                raise WrongShares(
                    "another hospital's shares are not those that it promised; nothing was sent", int(node)
                )

    def agree(self, summed: list[int], missing: list[int]) -> dict[str, str]:
        """Stage 4: a code (HMAC-SHA256) for each other hospital, by node.

        The code confirms, to that hospital only, which updates this hospital was told are in the sum and which
        are missing. It is given once in an attempt, so that no two majorities agree to different sums.
        """
        self._expect("masked")
        self.stage = "revealed"  # replaced below if all checks pass
        known, all_of_them = {int(node) for node in self.shares}, [*summed, *missing]
        if (
            len(set(all_of_them)) < len(all_of_them)
            or set(all_of_them) != known
            or self.node not in summed
            or len(summed) < max(LEAST, threshold(len(self.public)))
        ):
            raise MedFLError(
                "the server asked for shares that together would uncover an update; nothing was given"
            )
        self._expect_no_other_sum(summed)
        self.sum, self.stage = [sorted(summed), sorted(missing)], "agreed"
        return {node: self._code(self.node, node, node) for node in self.public if node != str(self.node)}

    def reveal(self, summed: list[int], missing: list[int], agreed: dict[str, str]) -> dict[str, str]:
        """Stage 5: a share of the seed of each hospital in the sum, and of the key of each missing hospital, by
        node. agreed: the other hospitals' codes for this one, by node."""
        self._expect("agreed")
        self.stage = "revealed"  # once
        self._expect_no_other_sum(summed)  # another attempt may have opened one in the meantime
        others = [node for node in agreed if node in self.public and node != str(self.node)]
        unlike = [
            node
            for node in others
            if not hmac.compare_digest(agreed[node], self._code(int(node), str(self.node), node))
        ]
        agreeing = 1 + len(others) - len(unlike)
        if [sorted(summed), sorted(missing)] != self.sum or agreeing < threshold(len(self.public)):
            sentence = (
                "the hospitals were not told the same members of the sum, and different sums could uncover an "
                "update; nothing was given"
            )
            raise WrongShares(sentence, int(unlike[0])) if unlike else MedFLError(sentence)
        self.given = {**self.given, json.dumps(self.round): self._account(summed)}
        return {str(node): self.shares[str(node)][node not in summed] for node in (*summed, *missing)}

    def _expect_no_other_sum(self, summed: list[int]) -> None:
        kept = self._account(summed)
        if self.given.get(json.dumps(self.round), kept) != kept:
            raise MedFLError(
                "the server asked for another sum of a round that was summed already, and two of them would "
                "differ by an update; nothing was given; let the same hospitals take part, or begin the "
                "federation again"
            )

    def _account(self, summed: list[int]) -> list[str]:
        """What is remembered of a sum: the names of the hospitals in it, and hashes of what decides how much each
        of them counts and how this one trained.

        Two sums of one round over the same hospitals could still reveal something. With two different totals they
        would differ by a multiple of the smallest hospital's update. If one hospital trained differently in
        between, because what it keeps from round to round was changed or forgotten, they would differ by the effect
        on its update only.
        """
        return [*sorted(self.names.get(str(node), str(node)) for node in summed), self.counted]

    def _code(self, by: int, to: str, other: str) -> str:
        """The code by which hospital `by` confirms the agreed sum to hospital `to`. other: the one of the two that
        is not this hospital."""
        key = HKDF(hashes.SHA256(), 32, salt=None, info=b"MedFL sum 1").derive(self._seal(other))
        said = json.dumps([self.round, by, int(to), *self.sum]).encode()
        return hmac.new(key, said, hashlib.sha256).hexdigest()

    def _expect(self, stage: str) -> None:
        if self.stage != stage:
            raise MedFLError(
                "a step of the secure aggregation came twice or out of order (this hospital may have been "
                "restarted); nothing was given"
            )

    def _seal(self, node: str) -> bytes:
        """The key between this hospital and another one that was told the same participants.

        Without that a server could tell two of seven hospitals a list with a third, get the third one's key from the
        other four as that of a missing hospital, and open the sum of the two.
        """
        between = generate_shared_key(
            bytes_to_private_key(bytes.fromhex(self.private[1])),
            bytes_to_public_key(bytes.fromhex(self.public[node][1])),
        )
        alike = binding(["participants"], self.public, self.names)
        return base64.urlsafe_b64encode(bound_key(between, alike))

    def kept(self) -> dict:
        """What is kept until the next message. After the last stage it holds no secret."""
        return {"stage": self.stage, "given": self.given} if self.stage == "revealed" else asdict(self)


def unmasked(
    total: np.ndarray,
    shares: dict[int, list[str]],
    summed: list[int],
    public: dict[int, list[str]],
    bound: bytes,
    seeds: dict[int, str] | None = None,
) -> np.ndarray:
    """The sum of masked vectors, (n,) uint32, without the masks.

    Args:
        shares: the shares that hospitals gave, by the node whose secret they open: its seed if it is in the sum,
            its key if it is missing.
        bound: what the masks are bound to (`binding`).
        seeds: SHA-256 of the seeds, as far as they are known.

    Raises:
        MedFLError: there are too few shares.
        WrongShares: shares don't give the secret that they should.
    """
    for node, given in shares.items():
        if len(given) < threshold(len(public)):
            raise MedFLError("too few hospitals gave their shares")
        try:
            secret = combine_shares([bytes.fromhex(share) for share in given])
            found = hashlib.sha256(secret).hexdigest()
            if node in summed:
                if (seeds or {}).get(node, found) != found:
                    raise ValueError("another seed")
                total = total - mask(bound_key(secret, bound), len(total))
                continue
            if public_key_to_bytes(bytes_to_private_key(secret).public_key()).hex() != public[node][0]:
                raise ValueError("another key")
        except Exception as error:  # bytes from elsewhere: Flower and cryptography raise their own kinds
            raise WrongShares("somebody gave wrong shares", node) from error
        for other in summed:
            between = shared_mask(secret, bytes.fromhex(public[other][0]), len(total), bound)
            # the hospital in the sum added or subtracted its side of the mask
            total = total - between if other > node else total + between
    return total
