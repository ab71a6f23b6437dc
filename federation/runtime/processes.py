"""The care of child processes: started so that they end with us, watched, stopped; and the ports that they
listen on."""

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from common import ROOT, MedFLError
from federation.runtime.programs import PROGRAM

GRACE = 5.0  # seconds between asking a child to end and making it
LAST_LINES = 15  # of a child's log, shown when it ended unasked
# For programs that hold weights but don't train: glibc gives every array above 1 MiB back to the system as soon
# as it is freed. By its own rule it keeps them, and the holes between them let a server grow with every round.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "2"}
TRAINING = (
    "hospital",
    "clientapp",
)  # where asking the system for each array would take time from the training
# what TLS says where asking again does not help: the other side speaks another version, or no TLS at all. A
# connection that was cut is none of these: a server that starts or dies behind a forwarder looks like that.
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
    """Our environment for Flower's programs: this MedFL, a folder of their own, no contact with Flower's
    makers, and no proxy between processes of this machine."""
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
    """Environment variables that keep a proxy, usual in hospitals, out of
    what this machine says to itself. What either spelling exempts stays exempt."""
    told = [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), "127.0.0.1,localhost,::1"]
    local = ",".join(dict.fromkeys(host for part in told if part for host in part.split(",")))
    return {"NO_PROXY": local, "no_proxy": local}


class NotTls(MedFLError):
    """What answers speaks no TLS, or none that is new enough."""


class Child:
    """One of the programs in programs.py, in its own process group, so that Ctrl-C reaches us alone and we stop
    it.

    folder: where it runs and keeps its files. log: what it prints goes there; None leaves it on our terminal.
    secret: a line that it gets on its standard input, where no list of processes shows it.
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
            with contextlib.suppress(BrokenPipeError):  # it ended at once; whoever watches it will see
                self.process.stdin.write(secret.encode() + b"\n")
                self.process.stdin.close()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        """End it, by force if it does not end by itself, and what it may have left in its group (nginx'
        workers, if nginx was killed)."""
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


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises MedFLError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise MedFLError(f"{address} is no address; write it as HOST:PORT, such as 127.0.0.1:8080")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise MedFLError(
            f"in {address} it can't be told which part is the port; write an IPv6 address in brackets, such as "
            "[2001:db8::1]:8443"
        )
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with the brackets that IPv6 needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def proxy_for(host: str) -> str | None:
    """The proxy through which Flower's part would reach the host by HTTPS; None where it goes there directly."""
    if urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get("https") or proxies.get("all")


def is_loopback(host: str) -> bool:
    """Whether every address that the name stands for is this machine's own. Raises MedFLError for a name that
    is not known, unless a proxy leads there, which may know it."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as error:
        if proxy_for(host):
            return False
        raise MedFLError(f"the host {host} is not known here; check the name") from error
    return all(str(address[0]).startswith("127.") or address[0] == "::1" for *_, address in found)


def is_healthy(host: str, port: int, timeout: float = 2.0, ca: Path | None = None) -> bool | None:
    """Whether Flower answers there: True, False if the connection is refused or cut, None if no answer came
    in time: it may be busy. ca: the authority that must have made the server's certificate, where it speaks
    TLS.

    Raises MedFLError where another server answers, or one whose certificate is not for that name, or expired.
    """
    here = host == "localhost" or host.startswith("127.") or host == "::1"
    # to another machine the way that Flower's part takes as well
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({} if here else None)]
    if ca:
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        handlers.append(urllib.request.HTTPSHandler(context=context))
    where = f"{'https' if ca else 'http'}://{join_address(host, port)}/health"
    try:
        with urllib.request.build_opener(*handlers).open(where, timeout=timeout) as answer:
            return answer.status == 200
    except urllib.error.HTTPError:
        return None  # a gateway whose server is not there yet, or anymore
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
    """Raises MedFLError where TLS failed for good; a connection that was only cut passes."""
    if isinstance(error, ssl.SSLCertVerificationError):
        raise MedFLError(
            f"the server at {where} is not the one of this kit ({error.verify_message}); nothing was sent to "
            "it: check --server, --kit and this machine's clock, and ask the coordinator for the right ca.pem"
        ) from error
    reason = error.reason or ""
    if reason in NOT_TLS or "_ALERT_" in reason and any(word in reason for word in ALERTS):
        raise NotTls(
            f"what answers at {where} does not speak TLS 1.3 ({reason}); check --server, or ask the "
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
