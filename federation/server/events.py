"""What happens in a run, told to who is not at the terminal: a webhook and a command.

Every event is a line of the audit log, so nothing of a patient is in it. Who listens can't stop a round: what
goes wrong there is said once and forgotten.
"""

import json
import queue
import shlex
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import MedFLError, utc_now
from federation.protocol.log import say
from federation.server.audit import AuditLog

TOLD = {
    "joined": "a hospital is there",
    "left": "a hospital is gone",
    "left_out": "an update is left out",
    "failed": "a round failed",
    "collapse": "a model is taken back",
    "end": "the run is over",
    "disk": "the disk is nearly full",
    "epsilon": "the privacy budget is nearly spent",
    "expiry": "a certificate ends soon",
}
TIME = 10.0  # seconds for a webhook or a command
WAITING = 100  # events that may wait to be told; more are dropped

Listener = Callable[[str, dict], None]


class Journal(AuditLog):
    """The audit log, and those who listen to what is written there."""

    def __init__(self, path: Path, ends: Path | None = None):
        self.listeners: list[Listener] = []
        super().__init__(path, ends)

    def write(self, event: str, **about: Any) -> None:
        """Append a line to the log, then tell it."""
        super().write(event, **about)
        self.tell(event, about)

    def tell(self, event: str, about: dict) -> None:
        """Tell it only."""
        for listener in list(self.listeners):
            try:
                listener(event, about)
            except Exception as error:
                self.listeners.remove(listener)
                say(f"no more is told by {type(listener).__name__.lower()}: {type(error).__name__}: {error}")


class Messenger:
    """Tells a webhook (POST, one JSON line) and a command (the line on its standard input) of events, in a
    thread of its own.

    Raises MedFLError for an address that is none of HTTP, and a command that is not there.
    """

    def __init__(self, url: str | None, command: str | None):
        self.url, self.command = url, shlex.split(command) if command else None
        if url is not None and urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise MedFLError(f"--notify is {url}; give an address that begins with https:// or http://")
        if command is not None and not (self.command and shutil.which(self.command[0])):
            raise MedFLError(f"--on-event is {command}, and there is no such program; give its path")
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __call__(self, event: str, about: dict) -> None:
        """Tell of an event, if it is one that is told; returns at once."""
        if event not in TOLD:
            return
        about = {name: value for name, value in about.items() if name not in ("before", "sha256")}
        line = json.dumps({"event": event, "text": TOLD[event], "time": utc_now(), **about}, default=str)
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._complain("more events than it takes")

    def close(self) -> None:
        """Wait a moment until all is told."""
        self._lines.put(None)
        self._thread.join(2 * TIME)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                if self.url:
                    request = urllib.request.Request(
                        self.url, (line + "\n").encode(), {"Content-Type": "application/json"}
                    )
                    urllib.request.urlopen(request, timeout=TIME).close()
                if self.command:
                    subprocess.run(
                        self.command,
                        input=line + "\n",
                        text=True,
                        timeout=TIME,
                        check=True,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                self._failed = False
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                self._complain(type(error).__name__)

    def _complain(self, why: str) -> None:
        if not self._failed:
            say(f"--notify or --on-event could not be told ({why}); the run goes on")
        self._failed = True
