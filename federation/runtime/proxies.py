"""Proxies between a hospital and the server, as the environment names them."""

import os

from federation.protocol.log import say
from federation.runtime.processes import is_loopback, proxy_for

NAMES = ("http_proxy", "https_proxy", "all_proxy")


def tell_proxies(host: str) -> None:
    """Say through which proxy the host is reached, if through any."""
    if (proxy := proxy_for(host)) is not None:
        say(f"the way to {host} leads through the proxy {_plain(proxy)}; --no-proxy goes there directly")


def perhaps_the_proxy(host: str, port: int) -> str:
    """What is said besides where no server answers: nothing where no proxy stands between."""
    proxy = None if is_loopback(host) else proxy_for(host)
    if proxy is None:
        return ""
    return (
        f"; or the proxy {_plain(proxy)} is away or does not let this through: it has to allow CONNECT to port "
        f"{port}, and --no-proxy leaves it out"
    )


def leave_out_odd() -> None:
    """Take proxies of another kind than HTTP out of the environment of this process and its children, and say
    it: desktops name SOCKS there, and the library that Flower uses would fail at the mere name."""
    for name, value in list(os.environ.items()):
        if name.lower() in NAMES and "://" in value and not value.startswith(("http://", "https://")):
            say(f"{name} names {_plain(value)}, which is no HTTP proxy; it is not used")
            del os.environ[name]


def go_direct(host: str) -> None:
    """Keep proxies out of the way to the host, for this process and its children."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def _plain(proxy: str) -> str:
    """A proxy's address without the password that it may hold."""
    scheme, _, rest = proxy.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest.rpartition("@")[2]
