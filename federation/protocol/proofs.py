"""What a hospital signs with its consortium key (ECDSA P-384, SHA-384): its answers, and its public keys of a
secure aggregation.

An answer is bound to the one request that it is for, by the random ticket that came with it, to run and round,
and to what it says and holds. So nobody answers for another, no answer is used twice, and what was sent can be
shown later: the audit log keeps the signature and what it is of.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from common import MedFLError

PROOF = "proof"  # the record of a message in which ticket and signature lie
MOST_SIGNATURE = 256  # hexadecimal digits; one of P-384 has up to 208


@dataclass(frozen=True)
class Asked:
    """What an answer is bound to: the request's ticket, the run and the round, where it has them."""

    ticket: str
    run: str | None = None
    round: int | None = None


@dataclass(frozen=True)
class Proof:
    """What a hospital signed: the request, SHA-256 of its answer's text and of its update; the signature."""

    ticket: str
    run: str | None
    round: int | None
    answer: str
    update: str | None
    signature: str

    @property
    def sha256(self) -> str:
        """Of the signature."""
        return hashlib.sha256(bytes.fromhex(self.signature)).hexdigest()


def asked(about: Mapping) -> Asked:
    """What a request's text asks for."""
    return Asked(about.get("ticket", ""), about.get("run"), about.get("round"))


def keys_statement(run: str, number: int, label: str, keys: list[str]) -> dict:
    """What a hospital signs of its public keys in a round of secure aggregation."""
    return {"run": run, "round": number, "label": label, "keys": keys}


def sign(key: ec.EllipticCurvePrivateKey, kind: str, statement: Mapping) -> str:
    """The signature, in hexadecimal, of a statement of this kind."""
    return key.sign(_bytes(kind, statement), ec.ECDSA(hashes.SHA384())).hex()


def check(public: str, kind: str, statement: Mapping, signature: str) -> None:
    """Raises MedFLError where the signature is not this key's (OpenSSH's line) of this statement."""
    try:
        key = serialization.load_ssh_public_key(public.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or len(signature) > MOST_SIGNATURE:
            raise ValueError("another kind of key, or of signature")
        key.verify(bytes.fromhex(signature), _bytes(kind, statement), ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, TypeError) as error:
        raise MedFLError("it is not signed with its hospital's key") from error


def sign_answer(content: RecordDict, request: Mapping, key: ec.EllipticCurvePrivateKey) -> None:
    """Put a hospital's signature into its answer to this request."""
    one = _of_answer(content, asked(request))
    content[PROOF] = ConfigRecord({"ticket": one["ticket"], "signature": sign(key, "answer", one)})


def check_answer(content: RecordDict, of: Asked, public: str) -> Proof:
    """What the hospital of this public key (OpenSSH's line) signed. Raises MedFLError where the answer is not
    signed by it, or answers another request."""
    proof = content.get(PROOF)
    given = (
        {name: proof.get(name) for name in ("ticket", "signature")} if isinstance(proof, ConfigRecord) else {}
    )
    ticket, signature = given.get("ticket"), given.get("signature")
    if not isinstance(ticket, str) or not isinstance(signature, str):
        raise MedFLError("an answer came in its name that is not signed")
    if ticket != of.ticket:
        raise MedFLError("an answer came in its name that is to another request")
    one = _of_answer(content, of)
    try:
        check(public, "answer", one, signature)
    except MedFLError as error:
        raise MedFLError("an answer came in its name that is not signed with its key") from error
    return Proof(**one, signature=signature)


def _of_answer(content: RecordDict, of: Asked) -> dict:
    """What is signed of an answer."""
    text, arrays = content["about"]["json"], content.get("arrays")
    if not isinstance(text, str):
        raise MedFLError("an answer came without its text")
    update = update_sha256(arrays) if isinstance(arrays, ArrayRecord) else None
    return {**asdict(of), "answer": hashlib.sha256(text.encode()).hexdigest(), "update": update}


def update_sha256(arrays: ArrayRecord) -> str:
    """SHA-256 of arrays as they travel: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        head = [name, array.dtype, list(array.shape), array.stype, len(array.data)]
        digest.update(json.dumps(head).encode())
        digest.update(array.data)
    return digest.hexdigest()


def _bytes(kind: str, statement: Mapping) -> bytes:
    return f"MedFL {kind} 1\n{json.dumps(statement, sort_keys=True)}".encode()
