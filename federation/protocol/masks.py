"""The arithmetic of secure aggregation: changes of weights as whole numbers, and the masks over them.

What masks are bound to, and who may learn what, is in `secure_aggregation`."""

import base64
import hashlib
import json

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
)

from common import MedFLError


def steps(hospitals: int) -> int:
    """The number of steps into which the range of a value is divided: the sum of this many hospitals' values
    fits into 32 bits twice."""
    return 2 ** (31 - hospitals.bit_length())


def quantise(change: torch.Tensor, weight: float, limit: float, hospitals: int) -> np.ndarray:
    """A hospital's change, (n,) float32, times its weight in the mean (0 to 1), as whole numbers from 0 to
    `steps`, (n,) uint32.

    They are rounded up or down at random, so that the sum is right on average. Raises MedFLError if a value is not
    finite or lies beyond the limit: cutting it would silently falsify the mean.
    """
    largest = float(change.abs().max()) if len(change) else 0.0
    if not largest <= limit:  # also true for NaN
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
    """The sum of the weighted changes, (n,) float64, from the sum of their quantised values, (n,) uint32.

    Raises MedFLError if the total can't be such a sum: a mask that was not removed gives values anywhere in the
    32 bits.
    """
    if len(total) and int(total.max()) > summands * steps(hospitals):
        raise MedFLError("the sum is still masked, because somebody sent no masked update, or wrong shares")
    return torch.from_numpy(total.astype(np.float64) * (2 * limit / steps(hospitals)) - summands * limit)


def binding(of: list, public: dict[str, list[str]], names: dict[str, str]) -> bytes:
    """What the masks of a round are bound to: one SHA-256 of `of` and of all participants.

    of: run, round, the total that counts are divided by, the model's hash, settings and rate. Of each participant
    its node, its public keys and the hospital's name are hashed.
    """
    who = sorted([names.get(node, ""), node, *keys] for node, keys in public.items())
    return hashlib.sha256(json.dumps([*of, who]).encode()).digest()


def bound_key(secret: bytes, bound: bytes) -> bytes:
    """A mask's key, 32 bytes, derived from a secret and from what the mask is bound to (HKDF, RFC 5869)."""
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"MedFL mask 1" + bound).derive(secret)


def check_keys(keys: list[str]) -> None:
    """Raises MedFLError if a hospital's public keys, hexadecimal, can't be read, are of another curve, or are
    the same key twice."""
    try:
        curves = [bytes_to_public_key(bytes.fromhex(key)).curve for key in keys]
    except Exception as error:  # cryptography raises many kinds of error for text that is no key
        raise MedFLError("it sent keys for the secure aggregation that are none") from error
    if len(set(keys)) < len(keys) or not all(isinstance(curve, ec.SECP384R1) for curve in curves):
        raise MedFLError("it sent keys for the secure aggregation that can't be used")


def sha256_of(share: str) -> str:
    """SHA-256 of a share or secret, both in hexadecimal."""
    return hashlib.sha256(bytes.fromhex(share)).hexdigest()


def mask(key: bytes, length: int) -> np.ndarray:
    """ChaCha20's stream, (length,) uint32: without the key of 32 bytes nobody can tell it from random numbers.
    A key is used for one mask only."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * length)), dtype="<u4")


def shared_mask(private: bytes, public: bytes, length: int, bound: bytes) -> np.ndarray:
    """The mask between two hospitals, (length,) uint32, from the private key of one and the public key of the
    other. bound: what it is bound to (`binding`)."""
    key = generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(public))
    return mask(bound_key(base64.urlsafe_b64decode(key), bound), length)
