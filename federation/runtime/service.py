"""The server's processes: Flower's SuperLink, the gateway in front of it and the server's app. They are started
together, watched, and restarted if one of them ends unexpectedly."""

import json
import os
import time
from pathlib import Path
from typing import NoReturn

from common import MedFLError
from federation.protocol.log import say
from federation.runtime.bundle import make_bundle
from federation.runtime.expiry import tell_kit
from federation.runtime.flower import Control, TaskSource
from federation.runtime.gateway import start_gateway
from federation.runtime.kit import CA, SERVER, SERVER_KEY
from federation.runtime.processes import Child, free_port, is_healthy, join_address, no_proxy, rotate
from federation.runtime.proxies import go_direct
from federation.runtime.registrar import Registrar
from federation.server.events import Messenger
from federation.server.state import LAST
from storage.files import write_json

START_TIME = 90.0  # seconds for Flower's SuperLink to answer
DAY = 86_400.0  # seconds between two checks of the kit for certificates and admissions that end soon
STARTS = 5  # in a row without a new round, before a run is given up


class Broken(MedFLError):
    """One of the server's processes ended before the run did."""


class Service:
    """A run's processes on HOST:PORT, from the first start to the run's end.

    kit: the folder of keys, None on loopback without keys. gated: whether our own nginx runs in front of Flower. job:
    the input of the server's app. folder: an empty folder for all processes. told: gets the warnings of certificates
    and admissions that end soon.
    """

    def __init__(
        self,
        host: str,
        port: int,
        kit: Path | None,
        gated: bool,
        job: dict,
        folder: Path,
        told: Messenger | None = None,
    ):
        self.host, self.port, self.kit, self.gated, self.job, self.folder = (
            host,
            port,
            kit,
            gated,
            job,
            folder,
        )
        self.out = Path(job["out"])
        self.gateway_log = self.out / "gateway.log"
        self.starts, self.told, self.told_at = 0, told, 0.0
        self.children: list[Child] = []

    def run(self, announcement: str) -> int:
        """Start everything and wait for the run's end; returns its exit code. announcement: printed when everything has
        started.

        If a process ends unexpectedly (because a machine slept, a clock was set or memory ran out), the others are
        ended too, and all start again after the last complete round. Raises MedFLError after five starts in a row
        without a new round.
        """
        while True:
            rounds = self._rounds()
            try:
                return self._run_once(self.folder / f"start-{self.starts}", announcement)
            except Broken as error:
                in_a_row = 1 if self._rounds() != rounds else self.starts + 1
                if in_a_row >= STARTS:
                    raise MedFLError(
                        f"{error}\nthis happened {STARTS} times in a row; the rounds so far are kept, continue with "
                        "--resume"
                    ) from error
                self.starts = in_a_row
                self.job["resume"] = (self.out / LAST).exists()
                say(f"{error}\nstarting again after the last complete round")
            finally:
                for child in reversed(self.children):
                    child.stop()
                self.children = []

    def _rounds(self) -> int:
        """A number that changes with each complete round: the time at which the run's file was written."""
        last = self.out / LAST
        return last.stat().st_mtime_ns if last.exists() else 0

    def _run_once(self, folder: Path, announcement: str) -> int:
        folder.mkdir(exist_ok=True)
        write_json(folder / "job.json", self.job)
        outcome = folder / "outcome.json"
        outcome.unlink(missing_ok=True)
        inner_host, inner_port = ("127.0.0.1", free_port()) if self.gated else (self.host, self.port)
        self.children.append(start_superlink(inner_host, inner_port, self.kit, folder))
        inner, ca = join_address(inner_host, inner_port), self.kit and self.kit / CA
        go_direct(self.host)  # the server reaches its own gateway without the environment's proxy
        os.environ.update(no_proxy())
        control = Control(inner, ca)
        registrar = Registrar(control, self.kit, folder, say) if self.kit else None
        if self.gated and self.kit:
            self.children.append(
                start_gateway(self.host, self.port, inner_port, self.kit, folder, self.gateway_log)
            )
        say(announcement)
        source = TaskSource(inner, "flwr-serverapp", ca)
        control.submit(make_bundle())
        while (token := source.next_token()) is None:
            time.sleep(0.1)
        app = Child("serverapp", [inner, *([str(ca.resolve())] if ca else [])], folder, secret=token)
        self.children.append(app)
        self._wait_for(app, registrar)
        if not outcome.exists():
            raise Broken("the server's program ended before the run was over")
        return json.loads(outcome.read_text(encoding="utf-8"))["exit"]

    def _wait_for(self, app: Child, registrar: Registrar | None) -> None:
        """Wait for the app's end. Meanwhile newly admitted hospitals are registered and revoked ones removed."""
        while app.exit_code is None:
            for child in self.children[:-1]:
                if child.exit_code is not None:
                    self._broke(child)
            if registrar:
                registrar.update()
                self._tell_expiry()
            for log in [self.gateway_log, *(child.log for child in self.children if child.log)]:
                rotate(log)  # a stranger can make each of them grow
            time.sleep(0.2)

    def _tell_expiry(self) -> None:
        """Warn once a day of certificates and admissions in the kit that end soon."""
        if self.kit and time.time() - self.told_at > DAY:
            self.told_at = time.time()
            for text in tell_kit(self.kit):
                if self.told:
                    self.told("expiry", {"what": text})

    def _broke(self, child: Child) -> NoReturn:
        words = child.last_words()
        raise Broken(f"the {child.program} ended" + (f"; its last lines:\n{words}" if words else ""))


def start_superlink(host: str, port: int, kit: Path | None, folder: Path) -> Child:
    """Start Flower's SuperLink and wait until it answers. With a kit it speaks TLS and asks every hospital for its key.
    Raises MedFLError if it ends or does not answer."""
    if kit is None:
        transport = ["--insecure"]
    else:
        files = {"--ssl-certfile": SERVER, "--ssl-keyfile": SERVER_KEY, "--ssl-ca-certfile": CA}
        transport = [part for option, name in files.items() for part in (option, str((kit / name).resolve()))]
        transport.append("--enable-supernode-auth")
    child = Child(
        "superlink",
        [
            *transport,
            "--host",
            host,
            "--port",
            str(port),
            "--isolation",
            "process",
            "--disable-runtime-dependency-installation",
        ],
        folder,
        folder / "superlink.log",
    )
    until = time.monotonic() + START_TIME
    while not is_healthy(host, port, ca=kit and kit / CA):
        if child.exit_code is not None or time.monotonic() > until:
            child.stop()
            raise MedFLError(f"Flower's SuperLink did not start; its last lines:\n{child.last_words()}")
        time.sleep(0.1)
    return child
