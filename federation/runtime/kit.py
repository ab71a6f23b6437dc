"""Kits: the folders of keys that identify the server and the hospitals that it admits.

A server's kit is a folder with `ca.pem` (the certificate authority, which every hospital gets), `ca.key`,
`server.pem`, `server.key` (certificates.py) and `hospitals.json` (the admitted hospitals, their public keys and the
ends of their admissions: admissions.py). A hospital's kit (hospital_kit.py) is a folder with `hospital.key`, which
never leaves it, `hospital.pub`, and the server's `ca.pem`; for secure aggregation also `members.pub`, the public keys
of its consortium's hospitals. Only their owner can read private files.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common import MedFLError
from federation.protocol.answers import LABEL

CURVE = ec.SECP384R1
CA, CA_KEY, SERVER, SERVER_KEY, HOSPITALS = "ca.pem", "ca.key", "server.pem", "server.key", "hospitals.json"
HOSPITAL_KEY, HOSPITAL_PUBLIC = "hospital.key", "hospital.pub"
MEMBERS = (
    "members.pub"  # in a hospital's kit: the hospital.pub lines of its consortium, for secure aggregation
)


def now() -> datetime:
    """The present time, UTC, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def write_new(path: Path, content: bytes, private: bool = False) -> None:
    """Write a new file; only the owner can read a private one. Raises MedFLError if the file already exists."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    except FileExistsError as error:
        raise MedFLError(
            f"{path} already exists and is not overwritten; choose another --kit, or move it away"
        ) from error
    except OSError as error:
        raise MedFLError(f"{path} can't be written ({error.strerror}); choose another --kit") from error
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def check_modes(kit: Path) -> None:
    """Raises MedFLError if other users can change a kit or read its private keys."""
    if os.name != "posix" or not kit.is_dir():
        return
    for path in [kit, *sorted(kit.iterdir())]:
        mode, private = path.stat().st_mode, path.name.endswith(".key")
        if private and mode & 0o077:
            raise MedFLError(
                f"others can read {path}; run chmod 600 on it, and make a new key if somebody did"
            )
        if mode & 0o022:
            raise MedFLError(
                f"others can change {path}; check whether somebody did, then run chmod go-w on it"
            )


def check_owner(kit: Path) -> None:
    """Raises MedFLError if the kit belongs to another user. That user, who runs the server, could not read a private
    file that this user writes, and an admission or a revocation would have no effect."""
    if os.name != "posix" or not kit.is_dir():
        return
    owner = kit.stat().st_uid
    if owner != os.geteuid():
        raise MedFLError(
            f"{kit} belongs to user {owner}, who could not read what you write there; run the same command as "
            f"that user: sudo -u '#{owner}' ..."
        )


def parse_public(line: str) -> tuple[str, str]:
    """Label and key from a `hospital.pub`. The key is in canonical form, because base64 can be written in many ways and
    keys are compared as texts. Raises MedFLError for anything else."""
    parts = line.split()
    try:
        key = serialization.load_ssh_public_key(" ".join(parts[:2]).encode())
        fits = len(parts) == 3 and isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, CURVE)
    except Exception as error:  # cryptography raises many kinds for a foreign file
        raise MedFLError(
            "this is not a hospital's public key; take the hospital.pub that `provision.py hospital` wrote"
        ) from error
    if not fits or not LABEL.fullmatch(parts[2]):
        raise MedFLError(
            "this key is of another kind, or has no label; take the hospital.pub that `provision.py "
            "hospital` wrote"
        )
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return parts[2], key.public_bytes(*openssh).decode()


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate in a PEM file. Raises MedFLError if there is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise MedFLError(
            f"there is no {path} that can be read; make a kit with provision.py, or correct --kit"
        ) from error
    except ValueError as error:
        raise MedFLError(f"{path} is not a certificate; take it from the server's kit again") from error


def read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key in a file, in PEM or OpenSSH's format. Raises MedFLError if there is none."""
    try:
        content = path.read_bytes()
        load = (
            serialization.load_ssh_private_key
            if b"OPENSSH" in content
            else serialization.load_pem_private_key
        )
        key = load(content, password=None)
    except OSError as error:
        raise MedFLError(
            f"there is no {path} that can be read; make a kit with provision.py, or correct --kit"
        ) from error
    except (ValueError, TypeError) as error:
        raise MedFLError(f"{path} is not a private key; take it from the kit that it was made in") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise MedFLError(f"{path} is a key of another kind; take it from the kit that it was made in")
    return key
