"""Warnings before certificates and admissions end, at the server and at the hospitals."""

import ssl
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography import x509

from federation.protocol.log import say
from federation.protocol.messages import SOON
from federation.runtime.admissions import read_admissions
from federation.runtime.certificates import read_authority, server_certificate
from federation.runtime.kit import CA
from federation.runtime.processes import is_loopback, parse_address

RENEW, ASK = "renew it before then (provision.py)", "ask the coordinator for a new one before then"


def tell_kit(kit: Path) -> list[str]:
    """Warn of everything in a server's kit that ends within 30 days: authority, certificate, admissions. Returns the
    warnings."""
    told = [
        _tell(read_authority(kit).not_valid_after_utc, "the consortium's authority"),
        _tell(server_certificate(kit).not_valid_after_utc, "the server's certificate"),
    ]
    for label, admission in sorted(read_admissions(kit).items()):
        if admission.state == "admitted":
            told.append(_tell(datetime.fromisoformat(admission.until), f"{label}'s admission"))
    return [text for text in told if text]


def tell_hospital(kit: Path, server: str) -> None:
    """The same at a hospital, for the authority in its kit and for the certificate that the server at HOST:PORT shows,
    reached through the environment's proxies. If the server does not answer, its certificate is not checked."""
    _tell(read_authority(kit).not_valid_after_utc, f"the authority in {kit}", ASK)
    context, proxies = ssl.create_default_context(cafile=kit / CA), not is_loopback(parse_address(server)[0])
    try:
        with (
            httpx.Client(verify=context, trust_env=proxies) as client,
            client.stream("GET", f"https://{server}/health") as answer,
        ):
            shown = answer.extensions["network_stream"].get_extra_info("ssl_object").getpeercert(True)
    except httpx.HTTPError:
        return
    _tell(x509.load_der_x509_certificate(shown).not_valid_after_utc, "the server's certificate", ASK)


def _tell(end: datetime, what: str, how: str = RENEW) -> str | None:
    left = end - datetime.now(UTC)
    if left > SOON:
        return None
    text = f"{what} ends on {end:%Y-%m-%d}, in {max(left.days, 0)} days; {how}"
    say(text)
    return text
