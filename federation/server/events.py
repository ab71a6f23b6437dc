"""Reports a run's events to people who are not at the terminal, through a webhook and a command.

An event holds nothing about a patient. A listener can't stop a round: an error in one is reported once, and the run
continues.
"""

import json
import queue
import shlex
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import MedFLError, utc_now
from federation.protocol.log import say
from federation.server.audit import AuditLog

TOLD = {
    "joined": "a hospital joined",
    "left": "a hospital left",
    "left_out": "an update is left out",
    "failed": "a round failed",
    "collapse": "a model is taken back",
    "end": "the run is over",
    "disk": "the disk is nearly full",
    "epsilon": "the privacy budget is nearly spent",
    "expiry": "a certificate ends soon",
}
TIME = 10.0  # seconds for a webhook or a command
WAITING = 100  # events that may wait to be reported; more are dropped

Listener = Callable[[str, dict], None]


class Journal(AuditLog):
    """The audit log, with listeners that get each line that is written."""

    def __init__(self, path: Path, ends: Path | None = None):
        self.listeners: list[Listener] = []
        super().__init__(path, ends)

    def write(self, event: str, **about: Any) -> None:
        """Append a line to the log, then report it to the listeners."""
        super().write(event, **about)
        self.tell(event, about)

    def tell(self, event: str, about: dict) -> None:
        """Report an event to the listeners without writing a line."""
        for listener in list(self.listeners):
            try:
                listener(event, about)
            except Exception as error:
                self.listeners.remove(listener)
                say(f"no more events for {type(listener).__name__.lower()}: {type(error).__name__}: {error}")


class Messenger:
    """Reports events to a webhook (POST, one JSON line) and to a command (the line on its standard input), in a
    thread of its own. folder: where the command runs; a relative path to it starts there.

    Raises MedFLError for an address that is not HTTP, and for a command that does not exist.
    """

    def __init__(self, url: str | None, command: str | None, folder: Path):
        self.url, self.command, self.folder = url, shlex.split(command) if command else None, folder
        if self.command and Path(self.command[0]).name != self.command[0]:  # a path, not a name on the PATH
            self.command[0] = str(folder / self.command[0])
        if url is not None and urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise MedFLError(f"--notify is {url}; give an address that begins with https:// or http://")
        if command is not None and not (self.command and shutil.which(self.command[0])):
            raise MedFLError(f"--on-event is {command}, and there is no such program; give its path")
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._failed: set[str] = set()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __call__(self, event: str, about: dict) -> None:
        """Queue an event for reporting, if it is one of `TOLD`; returns at once."""
        if event not in TOLD:
            return
        about = {name: value for name, value in about.items() if name not in ("before", "sha256")}
        line = json.dumps({"event": event, "text": TOLD[event], "time": utc_now(), **about}, default=str)
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._complain("--notify or --on-event", "too many events at once")

    def close(self) -> None:
        """Wait a moment until all events are reported."""
        self._lines.put(None)
        self._thread.join(2 * TIME)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            for option, given, tell in (
                ("--notify", self.url, self._post),
                ("--on-event", self.command, self._start),
            ):
                if not given:
                    continue
                try:
                    tell(line + "\n")
                    self._failed.discard(option)
                except (OSError, ValueError, subprocess.SubprocessError) as error:
                    self._complain(option, _in_words(error))

    def _post(self, line: str) -> None:
        assert self.url
        request = urllib.request.Request(self.url, line.encode(), {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=TIME).close()

    def _start(self, line: str) -> None:
        assert self.command
        subprocess.run(
            self.command,
            input=line,
            text=True,
            timeout=TIME,
            check=True,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def _complain(self, option: str, why: str) -> None:
        if option not in self._failed:
            say(f"{option} failed ({why}); the run continues")
        self._failed.add(option)


def _in_words(error: Exception) -> str:
    """The reason, without a webhook's address, which may hold a secret."""
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stderr or "").strip().splitlines()
        return f"exit code {error.returncode}" + (f": {said[-1][:200]}" if said else "")
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it took more than {TIME:.0f} s"
    return type(error).__name__
