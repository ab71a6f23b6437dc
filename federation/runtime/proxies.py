"""Proxies between a hospital and the server, as the environment names them."""

import os

from federation.protocol.log import say
from federation.runtime.processes import is_loopback, proxy_for

NAMES = ("http_proxy", "https_proxy", "all_proxy")


def tell_proxies(host: str) -> None:
    """Print the proxy through which the host is reached, if there is one."""
    if (proxy := proxy_for(host)) is not None:
        say(f"{host} is reached through the proxy {_plain(proxy)}; --no-proxy connects directly")


def perhaps_the_proxy(host: str, port: int) -> str:
    """A hint at the proxy for the message that no server answers; empty if no proxy is used."""
    proxy = None if is_loopback(host) else proxy_for(host)
    if proxy is None:
        return ""
    return (
        f"; or the proxy {_plain(proxy)} is down or blocks the connection: it has to allow CONNECT to port "
        f"{port}, and --no-proxy bypasses it"
    )


def leave_out_odd() -> None:
    """Remove proxies that are not HTTP proxies from the environment of this process and its children, and report it.
    Desktops set SOCKS proxies there, at whose mere name the library that Flower uses would fail."""
    for name, value in list(os.environ.items()):
        if name.lower() in NAMES and "://" in value and not value.startswith(("http://", "https://")):
            say(f"{name} names {_plain(value)}, which is not an HTTP proxy; it is ignored")
            del os.environ[name]


def go_direct(host: str) -> None:
    """Make this process and its children connect to the host without a proxy."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def _plain(proxy: str) -> str:
    """A proxy's address without the user and password that it may hold."""
    scheme, _, rest = proxy.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest.rpartition("@")[2]
