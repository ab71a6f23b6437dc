"""A hospital's connection to the server: Flower's SuperNode and the hospital's app, kept running until the
federation is over."""

import json
import time
from pathlib import Path

from common import MedFLError
from federation.hospital.identity import ENDED, WAITING
from federation.protocol.log import say
from federation.runtime.asking import Asker
from federation.runtime.expiry import tell_hospital
from federation.runtime.flower import ask_admission
from federation.runtime.kit import CA, HOSPITAL_KEY
from federation.runtime.processes import (
    Child,
    NotTls,
    free_port,
    is_healthy,
    is_loopback,
    join_address,
    parse_address,
    rotate,
    speaks_tls,
)

LOG = "supernode.log"  # of the connection
LOOK = 0.5  # seconds between two looks at children and server
PARTING = 5.0  # seconds for the last answer to reach the server, unless the server is gone before
RESTARTS = 5  # of the connection in a row, before it is given up
QUIET = 120.0  # seconds; a connection that has worked for longer ends such a row
DAY = 86_400.0  # seconds between two looks at certificates that end soon
CLOCK = "the server does not accept this machine's time; set the clock, it may be 5 s ahead at most"
REFUSED = "[code: 2004]"  # of Flower's SuperNode: its activation was not accepted
# seconds for which a server may keep the connection of a hospital that was killed; Flower keeps it for about 60
LINGERS = 120.0
AGAIN = 5.0  # seconds between two tries during that time
# seconds between two looks for a message: Flower's own, and less for a server on this machine, where looks cost
# nothing
FAR, NEAR = 3.0, 0.2


class ServerGone(MedFLError):
    """The server was there, and has been gone for longer than the hospital waits."""


class Connection:
    """Flower's SuperNode and the program that handles its messages, started and stopped together."""

    def __init__(self, server: str, kit: Path | None, folder: Path):
        port, log = str(free_port()), folder / LOG
        log.unlink(missing_ok=True)  # the former connection's log says nothing about this one
        transport = (
            ["--insecure"]
            if kit is None
            else [
                "--root-certificates",
                str((kit / CA).resolve()),
                "--auth-supernode-private-key",
                str((kit / HOSPITAL_KEY).resolve()),
            ]
        )
        self.supernode = Child(
            "supernode",
            [
                str(NEAR if is_loopback(parse_address(server)[0]) else FAR),
                *transport,
                "--superlink",
                server,
                "--host",
                "127.0.0.1",
                "--port",
                port,
                "--isolation",
                "process",
            ],
            folder,
            log,
        )
        self.hospital = Child("hospital", [f"127.0.0.1:{port}"], folder)
        self.began = time.monotonic()

    @property
    def broken(self) -> bool:
        """Whether one of the two has ended, which neither does by itself."""
        return self.supernode.exit_code is not None or self.hospital.exit_code is not None

    @property
    def refused(self) -> bool:
        """Whether the server refused this key: it does not know the key, or still holds a former connection."""
        return self.supernode.exit_code is not None and REFUSED in self.supernode.last_words()

    def stop(self) -> None:
        """End both."""
        self.hospital.stop()
        self.supernode.stop()


class Watch:
    """Keeps a hospital connected until the federation is over."""

    def __init__(
        self,
        server: str,
        host: str,
        port: int,
        kit: Path | None,
        folder: Path,
        wait: float,
        patient: bool = True,
    ):
        """patient: whether to wait also while the server has another version."""
        self.server, self.host, self.port, self.kit, self.folder, self.wait = (
            server,
            host,
            port,
            kit,
            folder,
            wait,
        )
        self.patient = patient
        self.connection: Connection | None = None
        self.seen = time.monotonic()  # when the server was last there
        self.was_there, self.was_gone = False, False
        self.answers: bool | None = None  # the last result of `is_healthy`
        self.differs_from: float | None = None  # since when the server's code has differed
        self.restarts = 0
        self.told_at: float | None = None  # when certificates that end soon were last reported
        # since when the server has refused this key: because of a former connection, and because of the clock
        self.lingered_from: float | None = None
        self.late_from: float | None = None
        self._asks_health: Asker[bool | None] = Asker()
        self._asks_admission: Asker[str] = Asker()
        self._asks_certificate: Asker[None] = Asker()

    def run(self) -> tuple[int, str]:
        """Stay connected until the end; returns the exit code and a closing sentence."""
        ended = self.folder / ENDED
        began = time.monotonic()
        try:
            while not ended.exists() or (self.folder / WAITING).exists():
                if not self.patient and time.monotonic() - began > self.wait:
                    raise MedFLError(
                        f"the server did not say within {self.wait:.0f} s whether this hospital could join; it may "
                        "be at the end of a round: try again"
                    )
                self._look_at_server()
                self._look_at_children()
                self._look_at_difference()
                rotate(self.folder / LOG)  # a hostile server could make it fill the disk
                time.sleep(LOOK)
            about = json.loads(ended.read_text(encoding="utf-8"))
            until = time.monotonic() + PARTING
            while self._health() is not False and time.monotonic() < until:
                time.sleep(LOOK)
            return about["exit"], about["sentence"]
        finally:
            if self.connection:
                self.connection.stop()

    def _health(self) -> bool | None:
        try:
            return self._asks_health(lambda: is_healthy(self.host, self.port, ca=self.kit and self.kit / CA))
        except NotTls:
            if (
                self.was_there
            ):  # something else, such as a forwarder's page, answers in place of a server that is away
                return False
            raise

    def _look_at_server(self) -> None:
        """Start the connection when the server is there, and a new one when the server was gone, because it does not
        know the old one."""
        state, now = self._health(), time.monotonic()
        self.answers = state
        if not state and not self.was_there:
            require_kit(self.host, self.port, self.kit)
        if state:
            self.seen = now
            if self.kit and self.patient and (self.told_at is None or now - self.told_at > DAY):
                self.told_at = now
                kit = self.kit
                self._asks_certificate(lambda: tell_hospital(kit, self.server))
            if self.connection is None:
                self.connection = Connection(self.server, self.kit, self.folder)
            elif self.was_gone:
                self._renew(self.connection, "the server is back")
            self.was_there, self.was_gone = True, False
        elif now - self.seen > self.wait:
            if not self.was_there:
                raise MedFLError(
                    f"no server at {self.server} within {self.wait:.0f} s; start it with run_server.py, "
                    "or wait longer with --wait"
                )
            raise ServerGone(
                f"the server at {self.server} has been gone for {self.wait:.0f} s; start this hospital again "
                "when it is back"
            )
        elif state is False and not self.was_gone:
            self.was_gone = True
            yet = "any more" if self.was_there else "yet"
            say(f"no server at {self.server} {yet}; waiting up to {self.wait:.0f} s")

    def _look_at_children(self) -> None:
        connection = self.connection
        if connection is None or not self.answers:  # without a server no connection lasts
            return
        if connection.broken and self.kit:
            ca, key = self.kit / CA, self.kit / HOSPITAL_KEY
            said = self._asks_admission(lambda: ask_admission(self.server, ca, key)) or ""
            if said == "clock" and self.patient:
                return self._wait_for_the_clock(connection)
            refuse(said)
            if connection.refused:
                return self._wait_for_the_former(connection)
        if not connection.broken and time.monotonic() - connection.began > QUIET:
            self.restarts, self.lingered_from, self.late_from = 0, None, None  # the connection works
        if connection.broken:
            self.restarts += 1
            if self.restarts > RESTARTS:
                raise MedFLError(
                    f"the connection ended {self.restarts} times in a row; the last lines of Flower's "
                    f"SuperNode:\n"
                    f"{connection.supernode.last_words()}"
                )
            self._renew(connection, "the connection ended")

    def _look_at_difference(self) -> None:
        """Give up if the server's code has differed for longer than this hospital waits."""
        waiting = self.folder / WAITING
        if not waiting.exists():
            self.differs_from = None
            return
        sentence = json.loads(waiting.read_text(encoding="utf-8"))["sentence"]
        if not self.patient:
            raise MedFLError(sentence)
        if self.differs_from is None:
            self.differs_from = time.monotonic()
            say(f"waiting up to {self.wait:.0f} s for a server of the same version")
        if time.monotonic() - self.differs_from > self.wait:
            raise MedFLError(sentence)

    def _wait_for_the_former(self, refused: Connection) -> None:
        """Another process uses this key, or used it and was killed: try again until the server drops its connection."""
        if self.lingered_from is None:
            self.lingered_from = time.monotonic()
            say(
                f"the server still holds a connection of this hospital; trying again for up to "
                f"{LINGERS:.0f} s"
            )
        if time.monotonic() - self.lingered_from > LINGERS:
            raise MedFLError("another process takes part with this hospital's key; end it, or start only one")
        time.sleep(AGAIN)
        refused.stop()
        self.connection = Connection(self.server, self.kit, self.folder)

    def _wait_for_the_clock(self, refused: Connection) -> None:
        """One of the two clocks was set, or has to be set. Try again for as long as this hospital waits."""
        now = time.monotonic()
        if self.late_from is None:
            self.late_from = now
            say(f"{CLOCK}; trying again for up to {self.wait:.0f} s")
        if now - self.late_from > self.wait:
            refuse("clock")
        time.sleep(AGAIN)
        refused.stop()
        self.connection = Connection(self.server, self.kit, self.folder)

    def _renew(self, former: Connection, why: str) -> None:
        say(f"{why}; connecting again")
        former.stop()
        self.connection = Connection(self.server, self.kit, self.folder)


def require_kit(host: str, port: int, kit: Path | None) -> None:
    """Raises MedFLError if a hospital without keys connects to a server that asks for keys."""
    if kit is None and speaks_tls(host, port):
        raise MedFLError(
            f"the server at {join_address(host, port)} speaks TLS and asks for keys; give this hospital's "
            "keys with --kit"
        )


def refuse(said: str) -> None:
    """Raises MedFLError if `said`, from `ask_admission`, means that the server refuses this hospital."""
    if said == "unknown":
        raise MedFLError(
            "the server does not admit this hospital's key: it was never admitted, or its admission has ended "
            "or was revoked; ask the coordinator"
        )
    if said == "clock":
        raise MedFLError(CLOCK)
