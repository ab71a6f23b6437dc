"""Secure aggregation: the server learns the sum of the hospitals' updates, and none of them by itself.

The protocol is SecAgg+ (Bell et al. 2020, doi 10.1145/3372297.3417885, after Bonawitz et al. 2017, doi
10.1145/3133956.3133982) in a group where all are neighbours. Its stages: hospitals send public keys; they
send each other, sealed and by way of the server, Shamir's shares of two secrets; they send updates under
masks; they give the shares that take the masks off the sum. A hospital's own mask comes off by the shares of
its seed; the masks between two hospitals cancel, and those with one that dropped out come off by the shares
of its key. What the server would need for one hospital's update is never given out together.

Keys, agreement, sealing and shares are Flower's; its `secaggplus_mod` and `SecAggPlusWorkflow` (1.41) are not
used: they fold each mask's key into 32 bits for a generator that is not cryptographic, so that masks can be
found by search; a hospital that drops out in the first two stages ends the round; values out of range are cut
and counts above a limit overflow in silence; and a hospital would give both secrets of another, if asked so.
"""

import base64
import secrets
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
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

LEAST = 3  # hospitals: of two, each knows the other's update from the sum


def threshold(hospitals: int) -> int:
    """Shares that open a secret: more than half of the hospitals.

    With half or fewer, a server could ask one half for the seed of a hospital, as if it were in the sum, and the
    other half for its key, as if it were missing. With both it would see that hospital's update. Two groups that
    are each more than half share at least one hospital, and no hospital gives both.
    """
    return hospitals // 2 + 1


def steps(hospitals: int) -> int:
    """Into how many steps the range of a value is divided, so that a sum of so many hospitals' values fits
    into 32 bits twice."""
    return 2 ** (31 - hospitals.bit_length())


def quantise(change: torch.Tensor, weight: float, limit: float, hospitals: int) -> np.ndarray:
    """A hospital's change, (n,) float32, times its weight in the mean (0 to 1), as whole numbers from 0 to
    `steps`, (n,) uint32.

    Rounded up or down at random, so that the sum is right on average. Raises MedFLError where a value is not
    finite or lies beyond the limit: a cut would falsify the mean without a word.
    """
    largest = float(change.abs().max()) if len(change) else 0.0
    if not largest <= limit:  # also for not a number
        raise MedFLError(
            f"the largest change of a weight is {largest:.3g}, and secure aggregation carries {limit:g} at "
            "most, so nothing was sent; the server's --secure-range sets the limit, and a lower --lr makes "
            "smaller changes"
        )
    if not 0 < weight <= 1:
        raise MedFLError(
            "the server weighs hospitals by fewer slices than this one trains on; nothing was sent"
        )
    scaled = change.double().numpy() * weight
    scaled += limit
    scaled *= steps(hospitals) / (2 * limit)
    scaled += np.random.default_rng().random(len(scaled))
    return scaled.astype(np.uint32)  # rounds down


def from_sum(total: np.ndarray, summands: int, limit: float, hospitals: int) -> torch.Tensor:
    """The sum of the weighted changes, (n,) float64, of a sum of quantised ones, (n,) uint32.

    Raises MedFLError where it can't be one: a mask that was not taken off gives values all over the 32 bits.
    """
    if len(total) and int(total.max()) > summands * steps(hospitals):
        raise MedFLError("the sum is still masked, because somebody gave wrong shares")
    return torch.from_numpy(total.astype(np.float64) * (2 * limit / steps(hospitals)) - summands * limit)


def mask(key: bytes, length: int) -> np.ndarray:
    """Numbers that nobody can tell from random ones without the key of 32 bytes, (length,) uint32: ChaCha20's
    stream. A key is used for one mask."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * length)), dtype="<u4")


def shared_mask(private: bytes, public: bytes, length: int) -> np.ndarray:
    """The mask between two hospitals, (length,) uint32, by one's private and the other's public key."""
    key = generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(public))
    return mask(base64.urlsafe_b64decode(key), length)


@dataclass
class Party:
    """A hospital's part: one try of one round at a time.

    stage: the last one that it took part in. given: the round for which it gave shares last, and who was
    summed. Binary values are kept as hexadecimal text, so that JSON holds them between two messages; nodes
    are keys as text. Each function raises MedFLError where the server asks for what it must not have.
    """

    node: int = 0
    stage: str = ""
    private: list[str] = field(default_factory=list)  # for masks, for sealing
    public: dict[str, list[str]] = field(default_factory=dict)
    seed: str = ""
    shares: dict[str, list[str]] = field(
        default_factory=dict
    )  # that others gave into care: of their seed, of their key
    round: list = field(
        default_factory=list
    )  # of the update that was masked: the run's name, the round's number
    given: dict = field(default_factory=dict)

    def keys(self, node: int) -> list[str]:
        """Stage 1: a new try, with new secrets; the public keys, for masks and for sealing."""
        self.__dict__.update(asdict(Party(node, given=self.given)))
        pairs = [generate_key_pairs() for _ in range(2)]
        self.private = [private_key_to_bytes(private).hex() for private, _ in pairs]
        self.seed, self.stage = secrets.token_bytes(32).hex(), "keys"
        return [public_key_to_bytes(public).hex() for _, public in pairs]

    def share(self, public: dict[str, list[str]]) -> dict[str, str]:
        """Stage 2: everybody's public keys came; for each other hospital its shares of this one's secrets,
        sealed."""
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
        self.public, self.stage = public, "shares"
        secret = [
            create_shares(bytes.fromhex(one), threshold(len(public)), len(public))
            for one in (self.seed, self.private[0])
        ]
        sealed = {}
        for node, of_seed, of_key in zip(public, *secret):
            if node == str(self.node):
                self.shares[node] = [of_seed.hex(), of_key.hex()]
            else:
                sealed[node] = encrypt(
                    self._seal(node), share_keys_plaintext_concat(self.node, int(node), of_seed, of_key)
                ).hex()
        return sealed

    def masked(
        self, sealed: dict[str, str], change: torch.Tensor, weight: float, limit: float, of: list
    ) -> np.ndarray:
        """Stage 3: the others' shares came; this hospital's weighted change under its masks, (n,) uint32. of:
        run and round."""
        self._expect("shares")
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
            except (InvalidToken, ValueError) as error:
                raise MedFLError("another hospital's shares can't be opened; nothing was sent") from error
            if (source, target) != (int(node), self.node):
                raise MedFLError("another hospital's shares were meant for somebody else; nothing was sent")
            self.shares[node] = [of_seed.hex(), of_key.hex()]
        values = quantise(change, weight, limit, len(self.public))
        values += mask(
            bytes.fromhex(self.seed), len(values)
        )  # numbers of 32 bits begin again at 0, as they should
        for node in sealed:
            between = shared_mask(
                bytes.fromhex(self.private[0]), bytes.fromhex(self.public[node][0]), len(values)
            )
            values = values + between if self.node > int(node) else values - between
        self.round, self.stage = of, "masked"
        return values

    def reveal(self, summed: list[int], missing: list[int]) -> dict[str, str]:
        """Stage 4: a share of the seed of each hospital that is in the sum, and of the key of each that is
        missing in it."""
        self._expect("masked")
        self.stage = "revealed"  # once
        known, all_of_them = {int(node) for node in self.shares}, [*summed, *missing]
        if (
            len(set(all_of_them)) < len(all_of_them)
            or set(all_of_them) != known
            or self.node not in summed
            or len(summed) < threshold(len(self.public))
        ):
            raise MedFLError(
                "the server asked for shares that together would uncover an update; nothing was given"
            )
        if self.given.get("round") == self.round and self.given["summed"] != sorted(summed):
            raise MedFLError(
                "the server asked for another sum of a round that was summed already, and two of them would "
                "differ by an update; nothing was given; let the same hospitals take part, or begin the "
                "federation again"
            )
        self.given = {"round": self.round, "summed": sorted(summed)}
        return {str(node): self.shares[str(node)][node not in summed] for node in all_of_them}

    def _expect(self, stage: str) -> None:
        if self.stage != stage:
            raise MedFLError(
                "a step of the secure aggregation came twice or out of order (this hospital may have been "
                "restarted); nothing was given"
            )

    def _seal(self, node: str) -> bytes:
        return generate_shared_key(
            bytes_to_private_key(bytes.fromhex(self.private[1])),
            bytes_to_public_key(bytes.fromhex(self.public[node][1])),
        )

    def kept(self) -> dict:
        """What is kept until the next message; after the last stage nothing secret."""
        return {"stage": self.stage, "given": self.given} if self.stage == "revealed" else asdict(self)


def unmasked(
    total: np.ndarray, shares: dict[int, list[str]], summed: list[int], public: dict[int, list[str]]
) -> np.ndarray:
    """The sum of masked vectors, (n,) uint32, without the masks.

    shares: what hospitals gave for each that shared its secrets: of the seed for those in the sum, of the key
    for those missing. Raises MedFLError where shares are too few, or don't give the key that they should.
    """
    for node, given in shares.items():
        if len(given) < threshold(len(public)):
            raise MedFLError("too few hospitals gave their shares")
        try:
            secret = combine_shares([bytes.fromhex(share) for share in given])
            if node in summed:
                total = total - mask(secret, len(total))
                continue
            if public_key_to_bytes(bytes_to_private_key(secret).public_key()).hex() != public[node][0]:
                raise ValueError("another key")
        except (ValueError, IndexError) as error:
            raise MedFLError("somebody gave wrong shares") from error
        for other in summed:
            between = shared_mask(secret, bytes.fromhex(public[other][0]), len(total))
            # the hospital in the sum has added or taken away its side of it
            total = total - between if other > node else total + between
    return total
