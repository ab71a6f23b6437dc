"""The list of admissions in a server's kit: which hospitals may join."""

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from common import MedFLError
from federation.runtime.kit import HOSPITALS, now, parse_public
from storage.files import atomic_write


@dataclass
class Admission:
    """A hospital's entry in the list. public_key: OpenSSH's line without the comment; admitted, until, revoked: UTC,
    ISO 8601 (revoked: None if it was not); former: this label's earlier public keys, all revoked."""

    public_key: str
    admitted: str
    until: str
    revoked: str | None = None
    former: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key, as ssh-keygen shows it."""
        wire = base64.b64decode(self.public_key.split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(wire).digest()).decode().rstrip("=")

    @property
    def pem(self) -> bytes:
        """The public key in the form that Flower takes."""
        key = serialization.load_ssh_public_key(self.public_key.encode())
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    @property
    def state(self) -> str:
        """admitted, revoked or expired."""
        if self.revoked:
            return "revoked"
        return "admitted" if datetime.now(UTC) < datetime.fromisoformat(self.until) else "expired"


def read_admissions(kit: Path) -> dict[str, Admission]:
    """All hospitals that are or were admitted, by label. Raises MedFLError for a damaged list."""
    path = kit / HOSPITALS
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        admissions = {label: Admission(**about) for label, about in content["hospitals"].items()}
        for admission in admissions.values():
            _ = admission.pem, admission.state
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise MedFLError(
            f"{path} is damaged; put back a copy of it, or admit the hospitals again in a new kit"
        ) from error
    return admissions


def write_admissions(kit: Path, admissions: dict[str, Admission]) -> None:
    """Write the list, whole or not at all."""
    content = {
        "version": 1,
        "hospitals": {label: asdict(admission) for label, admission in sorted(admissions.items())},
    }
    with atomic_write(kit / HOSPITALS, "w", private=True) as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def admit(kit: Path, line: str, days: int) -> tuple[str, Admission]:
    """Admit the hospital whose `hospital.pub` holds this line; returns its label and admission. Raises MedFLError for a
    line that is not a key from `provision.py hospital`, for a label or a key that another hospital has, and for a key
    that was revoked."""
    label, public = parse_public(line)
    admissions = read_admissions(kit)
    for other, admission in admissions.items():
        if public in admission.former or (admission.public_key == public and admission.revoked):
            raise MedFLError(
                "this key was revoked and can't be admitted again; let the hospital make a new one in a new "
                "kit"
            )
        if admission.public_key == public and other != label:
            raise MedFLError(f"this key is admitted as {other}; each hospital needs a key of its own")
    former = admissions.get(label)
    if former and former.public_key != public and not former.revoked:
        raise MedFLError(f"{label} is admitted with another key; revoke it first, or choose another label")
    replaced = [former.public_key] if former and former.public_key != public else []
    admissions[label] = Admission(
        public,
        now().isoformat(),
        (now() + timedelta(days=days)).isoformat(),
        former=[*(former.former if former else []), *replaced],
    )
    write_admissions(kit, admissions)
    return label, admissions[label]


def revoke(kit: Path, label: str) -> Admission:
    """Revoke a hospital's admission. Raises MedFLError if there is none."""
    admissions = read_admissions(kit)
    if label not in admissions:
        raise MedFLError(f"{label} is not in {kit / HOSPITALS}; `provision.py list` shows which are")
    if not admissions[label].revoked:
        admissions[label].revoked = now().isoformat()
        write_admissions(kit, admissions)
    return admissions[label]


def public_lines(kit: Path) -> list[str]:
    """The `hospital.pub` lines of all admitted hospitals, for their `members.pub`."""
    admitted = sorted(read_admissions(kit).items())
    return [
        f"{admission.public_key} {label}" for label, admission in admitted if admission.state == "admitted"
    ]
