"""Child processes: started so that they end with this process, watched and stopped; and the addresses that they listen
on."""

import contextlib
import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from common import ROOT, MedFLError
from federation.runtime.programs import PROGRAM

GRACE = 5.0  # seconds between asking a child to end and killing it
MOST_LOG = 20_000_000  # bytes of a log, about 200,000 calls at the gateway, before it is rotated
LAST_LINES = 15  # of a child's log, shown when it ended by itself
# For programs that hold weights but don't train: glibc returns every array above 1 MiB to the system as soon as it is
# freed. By default glibc keeps them, and the holes between them make a server grow with every round.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "2"}
TRAINING = (
    "hospital",
    "clientapp",
)  # here it would slow the training to ask the system for each array
# TLS errors that another try does not cure: the other side speaks another version, or no TLS at all. A connection that
# was cut is not one of them: a server that is starting or dying behind a forwarder looks like that.
NOT_TLS = {
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "NO_PROTOCOLS_AVAILABLE",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
    "TLSV1_UNRECOGNIZED_NAME",
    "UNKNOWN_PROTOCOL",
    "UNSUPPORTED_PROTOCOL",
    "WRONG_SSL_VERSION",
    "WRONG_VERSION_NUMBER",
}
ALERTS = ("PROTOCOL", "HANDSHAKE", "CERT", "NAME", "UNKNOWN_CA", "SECURITY")  # words in alerts that are final
if sys.platform == "win32":
    OWN_GROUP = subprocess.CREATE_NEW_PROCESS_GROUP
else:
    OWN_GROUP = 0  # a session of its own is one


def environment(home: Path) -> dict[str, str]:
    """The environment for Flower's programs: this MedFL, a folder of their own, no telemetry or update check, and no
    proxy between processes of this machine."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        **no_proxy(),
        "PYTHONPATH": path,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOG_LEVEL": "WARNING",
        "PYTHONUNBUFFERED": "1",
    }


def no_proxy() -> dict[str, str]:
    """Environment variables that keep a hospital's usual proxy out of connections within this machine. Hosts that
    either spelling exempts stay exempt."""
    told = [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), "127.0.0.1,localhost,::1"]
    local = ",".join(dict.fromkeys(host for part in told if part for host in part.split(",")))
    return {"NO_PROXY": local, "no_proxy": local}


class NotTls(MedFLError):
    """The other side speaks no TLS, or a version that is too old."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a server could have a hospital ask any machine of the hospital's network."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Child:
    """One of the programs in programs.py. It has a process group of its own, so that Ctrl-C reaches only this process,
    which then stops the child.

    folder: where it runs and keeps its files. log: the file for its output; None leaves the output on the terminal.
    secret: a line for its standard input, where no list of processes shows it.
    """

    def __init__(
        self,
        program: str,
        options: list[str],
        folder: Path,
        log: Path | None = None,
        secret: str | None = None,
    ):
        self.program, self.log = program, log
        command = [*PROGRAM, str(os.getpid()), program, *options]
        output = open(log, "ab") if log else None  # noqa: SIM115  the child keeps it
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder / "flower") | ({} if program in TRAINING else GIVE_BACK),
            stdout=output,
            stderr=output,
            stdin=subprocess.PIPE if secret else subprocess.DEVNULL,
            creationflags=OWN_GROUP,
            start_new_session=sys.platform != "win32",
        )
        if output:
            output.close()
        if secret and self.process.stdin:
            with contextlib.suppress(BrokenPipeError):  # it ended at once, which the caller notices
                self.process.stdin.write(secret.encode() + b"\n")
                self.process.stdin.close()

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while the child runs."""
        return self.process.poll()

    def stop(self) -> None:
        """End the child, by force if it does not end when asked, and any process left in its group (nginx's workers, if
        nginx was killed)."""
        if self.exit_code is None:
            self.process.terminate()
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log and self.log.exists() else []
        return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])


def rotate(log: Path) -> None:
    """Rotate a log that has grown long: it replaces the one before it (NAME.1) and starts again empty. It is copied and
    truncated, because its writer has it open. On a full disk it stays as it is."""
    if not log.exists() or log.stat().st_size <= MOST_LOG:
        return
    aside = log.with_name(f"{log.name}.1")
    try:
        shutil.copyfile(log, aside)
    except OSError:
        aside.unlink(missing_ok=True)
    else:
        os.truncate(log, 0)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises MedFLError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise MedFLError(f"{address} is not an address; write it as HOST:PORT, such as 127.0.0.1:8080")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise MedFLError(
            f"in {address} it is not clear which part is the port; write an IPv6 address in brackets, such as "
            "[2001:db8::1]:8443"
        )
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with the brackets that IPv6 needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def proxy_for(host: str) -> str | None:
    """The proxy through which Flower would reach the host by HTTPS; None if it connects directly."""
    if urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get("https") or proxies.get("all")


def is_loopback(host: str) -> bool:
    """Whether every address that the name resolves to is this machine's own. Raises MedFLError for an unknown name,
    unless a proxy is used for it, which may know the name."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as error:
        if proxy_for(host):
            return False
        raise MedFLError(f"the host {host} is not known here; check the name") from error
    return all(str(address[0]).startswith("127.") or address[0] == "::1" for *_, address in found)


def is_healthy(host: str, port: int, timeout: float = 2.0, ca: Path | None = None) -> bool | None:
    """Whether Flower answers there: True, False if the connection is refused or cut, or None if no answer came in time,
    because the server may be busy. ca: the authority that must have made the server's certificate, if it speaks TLS.

    Raises MedFLError if another server answers, or if the certificate is for another name or has expired.
    """
    here = host == "localhost" or host.startswith("127.") or host == "::1"
    # to another machine by the same way as Flower
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.ProxyHandler({} if here else None),
        _NoRedirect(),
    ]
    if ca:
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        handlers.append(urllib.request.HTTPSHandler(context=context))
    where = f"{'https' if ca else 'http'}://{join_address(host, port)}/health"
    try:
        with urllib.request.build_opener(*handlers).open(where, timeout=timeout) as answer:
            return answer.status == 200
    except urllib.error.HTTPError:
        return None  # a gateway whose server is not there yet, or is gone
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            _refuse_tls(error.reason, join_address(host, port))
            return False
        return False if isinstance(error.reason, ConnectionError) else None
    except ssl.SSLError:  # cut while the answer came
        return False
    except (OSError, http.client.HTTPException) as error:
        return False if isinstance(error, ConnectionError) else None


def _refuse_tls(error: ssl.SSLError, where: str) -> None:
    """Raises MedFLError if TLS failed for good; returns if the connection was only cut."""
    if isinstance(error, ssl.SSLCertVerificationError):
        raise MedFLError(
            f"the server at {where} is not the one of this kit ({error.verify_message}); nothing was sent to "
            "it: check --server, --kit and this machine's clock, and ask the coordinator for the right ca.pem"
        ) from error
    reason = error.reason or ""
    if reason in NOT_TLS or "_ALERT_" in reason and any(word in reason for word in ALERTS):
        raise NotTls(
            f"the program at {where} does not speak TLS 1.3 ({reason}); check --server, or ask the "
            "coordinator"
        ) from error


def speaks_tls(host: str, port: int, timeout: float = 5.0) -> bool:
    """Whether a TLS server answers there, whatever its certificate is."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=timeout) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except (OSError, ValueError):  # ssl's errors are OSErrors
        return False
