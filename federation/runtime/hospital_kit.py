"""A hospital's own kit: its key pair, which is made, checked and locked here, and the keys of its consortium."""

import sys
from pathlib import Path
from typing import IO

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common import MedFLError
from federation.protocol.answers import LABEL
from federation.runtime.kit import (
    CA,
    CURVE,
    HOSPITAL_KEY,
    HOSPITAL_PUBLIC,
    MEMBERS,
    check_modes,
    parse_public,
    read_certificate,
    read_private,
    write_new,
)
from storage.files import text_of


def make_hospital_key(kit: Path, label: str) -> str:
    """Make a hospital's key pair; returns the public line for the coordinator."""
    if not LABEL.fullmatch(label):
        raise MedFLError(f"--name is {label}; take up to 32 letters, digits, - and _")
    key = ec.generate_private_key(CURVE())
    public = (
        key.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
    )
    line = f"{public} {label}"
    if (kit / HOSPITAL_PUBLIC).exists():
        raise MedFLError(
            f"{kit / HOSPITAL_PUBLIC} already exists and is not overwritten; choose another --kit"
        )
    write_new(
        kit / HOSPITAL_KEY,
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
        private=True,
    )
    write_new(kit / HOSPITAL_PUBLIC, line.encode() + b"\n")
    return line


def hold_kit(kit: Path) -> IO | None:
    """The hospital's key file, locked for as long as it is open; None if another process on this machine has locked it.
    On systems without such locks the file is only opened."""
    file = open(kit / HOSPITAL_KEY, "rb")  # noqa: SIM115  closed with the process
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # a file system without locks
            return file
    return file


def hospital_label(kit: Path) -> str:
    """The label of a hospital's kit. Raises MedFLError if the keys or the server's `ca.pem` are missing or can't be
    used."""
    make = "make it with `provision.py hospital`"
    for name, remedy in (
        (HOSPITAL_KEY, make),
        (HOSPITAL_PUBLIC, make),
        (CA, "ask the coordinator for it and put it there"),
    ):
        if not (kit / name).is_file():
            raise MedFLError(f"there is no {kit / name}; {remedy}")
    check_modes(kit)
    label, public = parse_public(text_of(kit / HOSPITAL_PUBLIC, "replace"))
    own = read_private(kit / HOSPITAL_KEY).public_key()
    if own != serialization.load_ssh_public_key(public.encode()):
        raise MedFLError(
            f"{kit / HOSPITAL_KEY} and {kit / HOSPITAL_PUBLIC} don't belong together; make a new kit"
        )
    read_certificate(kit / CA)
    return label


def read_members(kit: Path) -> dict[str, str] | None:
    """Public keys (OpenSSH's lines without the label) of the consortium's hospitals by label, including this one's own;
    None without a `members.pub`. Raises MedFLError for lines that are not keys, for a label with two keys, and for a
    key with two labels."""
    path = kit / MEMBERS
    if not path.is_file():
        return None
    own = text_of(kit / HOSPITAL_PUBLIC, "replace")
    members: dict[str, str] = {}
    for line in [own, *text_of(path, "replace").splitlines()]:
        if not line.strip() or line.startswith("#"):
            continue
        try:
            label, public = parse_public(line)
        except MedFLError as error:
            raise MedFLError(f"{path} has a line that is not a hospital's public key; {error}") from error
        if members.setdefault(label, public) != public:
            raise MedFLError(f"{path} has two keys of {label}; ask that hospital which is its own")
    if len(set(members.values())) < len(members):
        raise MedFLError(f"{path} has one key for two hospitals; ask them whose key it is")
    return members
