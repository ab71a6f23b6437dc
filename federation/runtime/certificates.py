"""The consortium's certificate authority, and the server's certificate: made, renewed and checked."""

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import MedFLError
from federation.runtime.kit import (
    CA,
    CA_KEY,
    CURVE,
    SERVER,
    SERVER_KEY,
    check_modes,
    now,
    read_certificate,
    read_private,
    write_new,
)

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")  # the gateway reaches Flower by these
AUTHORITY_DAYS = 3_650


def make_authority(kit: Path) -> None:
    """Make the certificate authority: `ca.pem` and `ca.key`."""
    key = ec.generate_private_key(CURVE())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"MedFL consortium {now():%Y-%m-%d} {os.urandom(3).hex()}")]
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
    """Make `server.pem`, signed by the kit's authority, for these names and addresses and this machine's own, and its
    key. With `renew` existing files are kept as former-server.*; without it they raise MedFLError."""
    authority = read_certificate(kit / CA)
    signer = read_private(kit / CA_KEY)
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
                f"{path} already exists; --renew makes a new one by the same authority, or choose another "
                f"--kit"
            )
        if path.exists():
            path.replace(path.with_name(f"former-{path.name}"))
    write_new(kit / SERVER_KEY, _private_pem(key), private=True)
    write_new(kit / SERVER, certificate.public_bytes(serialization.Encoding.PEM))


def server_certificate(kit: Path) -> x509.Certificate:
    """The server's certificate, checked: the certificate and its authority are valid now, and both and the key belong
    together. Raises MedFLError if one is missing, broken, expired or mismatched."""
    check_modes(kit)
    authority, certificate = read_certificate(kit / CA), read_certificate(kit / SERVER)
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
    if read_private(kit / SERVER_KEY).public_key() != certificate.public_key():
        raise MedFLError(f"{kit / SERVER_KEY} is not the key of {kit / SERVER}; take both from one kit")
    return certificate


def read_authority(kit: Path) -> x509.Certificate:
    """The certificate of the kit's authority."""
    return read_certificate(kit / CA)


def certificate_names(certificate: x509.Certificate) -> list[str]:
    """Names and addresses that a certificate is for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if (
        not host
        or len(host) > 253
        or not host.isascii()
        or not all(part and part.replace("-", "").isalnum() for part in host.split("."))
    ):
        raise MedFLError(
            f"{host} is neither a host name nor an address; give the one by which hospitals reach the server"
        )
    return x509.DNSName(host)


def _builder(subject: x509.Name, issuer: x509.Name, public, days: int) -> x509.CertificateBuilder:
    begin = now()
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
