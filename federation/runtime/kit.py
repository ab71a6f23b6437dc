"""Keys and certificates: who the server is, and which hospitals it admits.

A server's kit is a folder with `ca.pem` (the certificate authority, which every hospital gets), `ca.key`,
`server.pem`, `server.key` and `hospitals.json` (who is admitted, with which public key, until when). A
hospital's kit is a folder with `hospital.key`, which never leaves it, `hospital.pub`, and the server's
`ca.pem`; for secure aggregation also `members.pub`, the public keys of its consortium's hospitals. Private
files can be read by their owner alone.
"""

import base64
import hashlib
import ipaddress
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import MedFLError, atomic_write
from federation.protocol.answers import LABEL

CURVE = ec.SECP384R1
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")  # the gateway and Flower speak with each other by these
AUTHORITY_DAYS = 3_650
CA, CA_KEY, SERVER, SERVER_KEY, HOSPITALS = "ca.pem", "ca.key", "server.pem", "server.key", "hospitals.json"
HOSPITAL_KEY, HOSPITAL_PUBLIC = "hospital.key", "hospital.pub"
MEMBERS = (
    "members.pub"  # in a hospital's kit: the hospital.pub lines of its consortium, for secure aggregation
)


@dataclass
class Admission:
    """A hospital that may join. public_key: OpenSSH's line without the comment; times: UTC, ISO 8601;
    revoked: when, or None; former: public keys of this label that were revoked before it had this one."""

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
        """The public key as Flower wants it."""
        key = serialization.load_ssh_public_key(self.public_key.encode())
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    @property
    def state(self) -> str:
        """admitted, revoked or expired."""
        if self.revoked:
            return "revoked"
        return "admitted" if datetime.now(UTC) < datetime.fromisoformat(self.until) else "expired"


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def write_new(path: Path, content: bytes, private: bool = False) -> None:
    """Write a file that was not there; nobody else can read a private one. Raises MedFLError where there is
    one already."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    except FileExistsError as error:
        raise MedFLError(
            f"{path} is there already and is not overwritten; choose another --kit, or move it away"
        ) from error
    except OSError as error:
        raise MedFLError(f"{path} can't be written ({error.strerror}); choose another --kit") from error
    with os.fdopen(handle, "wb") as file:
        file.write(content)


# ---- the server's side ----


def make_authority(kit: Path) -> None:
    """Make the certificate authority: `ca.pem` and `ca.key`."""
    key = ec.generate_private_key(CURVE())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"MedFL consortium {_now():%Y-%m-%d} {os.urandom(3).hex()}")]
    )
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_new(kit / CA_KEY, _private_pem(key), private=True)
    write_new(kit / CA, certificate.public_bytes(serialization.Encoding.PEM))


def make_server_certificate(kit: Path, hosts: list[str], days: int, renew: bool = False) -> None:
    """Make `server.pem` for these names and addresses (and this machine's own), signed by the kit's
    authority, and its key. Those that are there already are kept as former-server.* with `renew`, else
    MedFLError is raised."""
    authority = _read_certificate(kit / CA)
    signer = _read_private(kit / CA_KEY)
    key = ec.generate_private_key(CURVE())
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *LOCAL_NAMES])]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA384())
    )
    for path in (kit / SERVER, kit / SERVER_KEY):
        if path.exists() and not renew:
            raise MedFLError(
                f"{path} is there already; --renew makes a new one by the same authority, or choose another "
                f"--kit"
            )
        if path.exists():
            path.replace(path.with_name(f"former-{path.name}"))
    write_new(kit / SERVER_KEY, _private_pem(key), private=True)
    write_new(kit / SERVER, certificate.public_bytes(serialization.Encoding.PEM))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if (
        not host
        or len(host) > 253
        or not all(part and part.replace("-", "").isalnum() for part in host.split("."))
    ):
        raise MedFLError(
            f"{host} is no name and no address of a machine; give the one by which hospitals reach the server"
        )
    return x509.DNSName(host)


def _builder(subject: x509.Name, issuer: x509.Name, public, days: int) -> x509.CertificateBuilder:
    begin = _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - timedelta(minutes=5))
        .not_valid_after(begin + timedelta(days=days))
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def check_modes(kit: Path) -> None:
    """Raises MedFLError where others can change a kit, or read its private keys."""
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
                f"others can change {path}; run chmod go-w on it, after a look at whether somebody did"
            )


def server_certificate(kit: Path) -> x509.Certificate:
    """The server's certificate, checked: it and its authority are valid now and belong together, and so does
    its key. Raises MedFLError for what is missing, broken, expired or mismatched."""
    check_modes(kit)
    authority, certificate = _read_certificate(kit / CA), _read_certificate(kit / SERVER)
    for path, one in ((kit / CA, authority), (kit / SERVER, certificate)):
        if not one.not_valid_before_utc <= datetime.now(UTC) < one.not_valid_after_utc:
            raise MedFLError(
                f"{path} is valid from {one.not_valid_before_utc:%Y-%m-%d} to "
                f"{one.not_valid_after_utc:%Y-%m-%d}; "
                "check this machine's clock, or make a new one with `provision.py server --renew`"
            )
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise MedFLError(
            f"{kit / SERVER} was not made by the authority in {kit / CA}; take both from one kit"
        ) from error
    if _read_private(kit / SERVER_KEY).public_key() != certificate.public_key():
        raise MedFLError(f"{kit / SERVER_KEY} is not the key of {kit / SERVER}; take both from one kit")
    return certificate


def read_authority(kit: Path) -> x509.Certificate:
    """The certificate of the kit's authority."""
    return _read_certificate(kit / CA)


def certificate_names(certificate: x509.Certificate) -> list[str]:
    """Names and addresses that a certificate is for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def read_admissions(kit: Path) -> dict[str, Admission]:
    """Who is or was admitted, by label. Raises MedFLError for a damaged list."""
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
    """Admit the hospital whose `hospital.pub` holds this line; its label and admission. Raises MedFLError for
    a line that is no key of `provision.py hospital`, a label or a key that another has, and a key that was
    revoked."""
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
        _now().isoformat(),
        (_now() + timedelta(days=days)).isoformat(),
        former=[*(former.former if former else []), *replaced],
    )
    write_admissions(kit, admissions)
    return label, admissions[label]


def revoke(kit: Path, label: str) -> Admission:
    """Revoke a hospital's admission. Raises MedFLError where there is none."""
    admissions = read_admissions(kit)
    if label not in admissions:
        raise MedFLError(f"{label} is not in {kit / HOSPITALS}; `provision.py list` shows who is")
    if not admissions[label].revoked:
        admissions[label].revoked = _now().isoformat()
        write_admissions(kit, admissions)
    return admissions[label]


# ---- the hospital's side ----


def make_hospital_key(kit: Path, label: str) -> str:
    """Make a hospital's key pair; the public line to hand over."""
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
            f"{kit / HOSPITAL_PUBLIC} is there already and is not overwritten; choose another --kit"
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
    """The hospital's key, open and locked for as long as it is held; None where another process of this
    machine holds it. Where the system has no such locks nobody is held off."""
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


def parse_public(line: str) -> tuple[str, str]:
    """Label and key of a `hospital.pub`. Raises MedFLError for anything else."""
    parts = line.split()
    try:
        key = serialization.load_ssh_public_key(" ".join(parts[:2]).encode())
        fits = len(parts) == 3 and isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, CURVE)
    except Exception as error:  # cryptography raises many kinds for a foreign file
        raise MedFLError(
            "this is no hospital's public key; take the hospital.pub that `provision.py hospital` wrote"
        ) from error
    if not fits or not LABEL.fullmatch(parts[2]):
        raise MedFLError(
            "this key is of another kind, or has no label; take the hospital.pub that `provision.py "
            "hospital` wrote"
        )
    return parts[2], " ".join(parts[:2])


def hospital_label(kit: Path) -> str:
    """The label of a hospital's kit, checked: keys and the server's `ca.pem` are there and fit. Raises
    MedFLError."""
    make = "make it with `provision.py hospital`"
    for name, remedy in (
        (HOSPITAL_KEY, make),
        (HOSPITAL_PUBLIC, make),
        (CA, "ask the coordinator for it and put it there"),
    ):
        if not (kit / name).is_file():
            raise MedFLError(f"there is no {kit / name}; {remedy}")
    check_modes(kit)
    label, public = parse_public((kit / HOSPITAL_PUBLIC).read_text(encoding="utf-8", errors="replace"))
    own = _read_private(kit / HOSPITAL_KEY).public_key()
    if own != serialization.load_ssh_public_key(public.encode()):
        raise MedFLError(
            f"{kit / HOSPITAL_KEY} and {kit / HOSPITAL_PUBLIC} don't belong together; make a new kit"
        )
    _read_certificate(kit / CA)
    return label


def read_members(kit: Path) -> dict[str, str] | None:
    """Public keys (OpenSSH's lines without the label) of the consortium's hospitals by label, this one's own
    among them; None without a `members.pub`. Raises MedFLError for lines that are no keys, and for a label
    that stands there with two."""
    path = kit / MEMBERS
    if not path.is_file():
        return None
    own = (kit / HOSPITAL_PUBLIC).read_text(encoding="utf-8", errors="replace")
    members: dict[str, str] = {}
    for line in [own, *path.read_text(encoding="utf-8", errors="replace").splitlines()]:
        if not line.strip() or line.startswith("#"):
            continue
        try:
            label, public = parse_public(line)
        except MedFLError as error:
            raise MedFLError(f"{path} has a line that is no hospital's public key; {error}") from error
        if members.setdefault(label, public) != public:
            raise MedFLError(f"{path} has two keys of {label}; ask that hospital which is its own")
    if len(set(members.values())) < len(members):
        raise MedFLError(f"{path} has one key for two hospitals; ask them which is whose")
    return members


def public_lines(kit: Path) -> list[str]:
    """The `hospital.pub` lines of all who are admitted, for the hospitals' `members.pub`."""
    admitted = sorted(read_admissions(kit).items())
    return [
        f"{admission.public_key} {label}" for label, admission in admitted if admission.state == "admitted"
    ]


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise MedFLError(
            f"there is no {path} that can be read; make a kit with provision.py, or correct --kit"
        ) from error
    except ValueError as error:
        raise MedFLError(f"{path} is no certificate; take it from the server's kit again") from error


def _read_private(path: Path) -> ec.EllipticCurvePrivateKey:
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
        raise MedFLError(f"{path} is no private key; take it from the kit that it was made in") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise MedFLError(f"{path} is a key of another kind; take it from the kit that it was made in")
    return key
