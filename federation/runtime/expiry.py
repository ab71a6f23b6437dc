"""Certificates that end soon, told before they do."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from federation.protocol.log import say
from federation.runtime.kit import read_admissions, read_authority, server_certificate

SOON = timedelta(days=30)


def tell_expiry(certificate: x509.Certificate, what: str) -> str | None:
    """Say it where a certificate ends within 30 days; what was said."""
    return _tell(certificate.not_valid_after_utc, what)


def tell_kit(kit: Path) -> list[str]:
    """The same of everything in a server's kit: authority, certificate, admissions."""
    told = [
        tell_expiry(read_authority(kit), "the consortium's authority"),
        tell_expiry(server_certificate(kit), "the server's certificate"),
    ]
    for label, admission in sorted(read_admissions(kit).items()):
        if admission.state == "admitted":
            told.append(_tell(datetime.fromisoformat(admission.until), f"{label}'s admission"))
    return [text for text in told if text]


def _tell(end: datetime, what: str) -> str | None:
    left = end - datetime.now(UTC)
    if left > SOON:
        return None
    text = f"{what} ends on {end:%Y-%m-%d}, in {max(left.days, 0)} days; renew it before (provision.py)"
    say(text)
    return text
