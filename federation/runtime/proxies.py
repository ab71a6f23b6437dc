"""Proxies between a hospital and the server, as the environment names them."""

import os
import urllib.request

from common import MedFLError
from federation.protocol.log import say


def proxy_for(host: str) -> str | None:
    """The proxy through which Flower's part would reach the host by HTTPS; None where it goes there directly."""
    if urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get("https") or proxies.get("all")


def tell_proxies(host: str) -> None:
    """Say through which proxy the host is reached. Raises MedFLError for one that only speaks SOCKS."""
    proxy = proxy_for(host)
    if proxy is None:
        return
    if not proxy.startswith(("http://", "https://")):
        raise MedFLError(
            f"the environment names the proxy {_plain(proxy)}, which is no HTTP proxy; start with --no-proxy, or "
            "set https_proxy to an HTTP one"
        )
    say(f"the way to {host} leads through the proxy {_plain(proxy)}; --no-proxy goes there directly")


def go_direct(host: str) -> None:
    """Keep proxies out of the way to the host, for this process and its children."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def _plain(proxy: str) -> str:
    """A proxy's address without the password that it may hold."""
    scheme, _, rest = proxy.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest.rpartition("@")[2]
