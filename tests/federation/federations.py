"""Federations of real processes for the tests: started as a user starts them, watched, and nothing left
behind."""

import contextlib
import csv
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT

SMALL = ("--model", "mini", "--image-size", 32, "--batch-size", 8)  # so that rounds are quick
BEST, LAST = "transunet_federated_best.pth", "transunet_federated_last.pth"
DEADLINE = 480.0  # seconds for an event on a busy machine; nothing waits this long unless it fails


class Script:
    """A running script whose output goes to a file that can be waited on."""

    def __init__(self, folder: Path, name: str, *command: object, root: Path = ROOT):
        self.name, self.folder, self.log = name, folder, folder / f"{name}-{time.monotonic_ns()}.log"
        environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(root / command[0]), *map(str, command[1:])],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, count: int = 1) -> None:
        """Wait until the pattern was printed `count` times."""
        until = time.monotonic() + DEADLINE
        while len(re.findall(pattern, self.output)) < count:
            assert time.monotonic() < until, f"{self.name} never said {pattern!r}:\n{self.output}"
            assert self.process.poll() is None or len(re.findall(pattern, self.output)) >= count, (
                f"{self.name} ended without saying {pattern!r}:\n{self.output}"
            )
            time.sleep(0.05)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end:\n{self.output}") from None

    def kill(self) -> None:
        """As the out-of-memory killer would: this process alone, without a chance to clean up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Scene:
    """A folder, a free port, and the scripts that run on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.out = folder / "models"
        self.scripts: list[Script] = []

    def server(self, *options: object, root: Path = ROOT) -> Script:
        script = Script(
            self.folder,
            "server",
            "run_server.py",
            "--address",
            self.address,
            "--out",
            self.out,
            *options,
            root=root,
        )
        self.scripts.append(script)
        return script

    def hospital(self, name: str, *options: object, address: str | None = None, root: Path = ROOT) -> Script:
        script = Script(
            self.folder, name, "run_client.py", "--server", address or self.address, *options, root=root
        )
        self.scripts.append(script)
        return script

    def close(self) -> list[str]:
        """Kill what still runs, and name the processes that outlive their scripts by more than 10 s."""
        for script in self.scripts:
            if script.process.poll() is None:
                script.kill()
        return left_running(self.folder)


@pytest.fixture
def scene(home, tmp_path) -> Iterator[Scene]:
    """A folder and a free port for a federation; at the end nothing of it may run on."""
    made = Scene(tmp_path)
    yield made
    assert made.close() == []


def history(out: Path) -> list[dict]:
    """The rows of a server's history."""
    with open(out / "federated_history.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def children(folder: Path) -> list[str]:
    """The processes whose working folder lies in `folder`: "pid command line"."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            where = os.readlink(process / "cwd")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if where.startswith(str(folder)) and command:
            found.append(f"{process.name} {command}")
    return found


def left_running(folder: Path, seconds: float = 10.0) -> list[str]:
    """The processes that are still there after `seconds`."""
    until = time.monotonic() + seconds
    while (found := children(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def child_of(script: Script, program: str) -> int:
    """The process id of one of a script's programs."""
    command = f"federation.runtime.programs {script.process.pid} {program}"
    return next(int(c.split()[0]) for c in children(script.folder) if command in c)


def signal_tree(top: int, what: signal.Signals) -> None:
    """Send a signal to a process and everything below it."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    tree, before = {top}, 0
    while len(tree) != before:
        before = len(tree)
        tree |= {child for child, parent in parents.items() if parent in tree}
    for process in sorted(tree):
        os.kill(process, what)


class Wiretap:
    """Passes connections on to an address and keeps every byte that goes through: what the caller said, and
    the rest."""

    def __init__(self, target: str):
        self.host, port = target.split(":")
        self.port = int(port)
        self.said, self.answered = bytearray(), bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((self.host, self.port), timeout=5)
            except OSError:
                # nobody listens there: the caller is to see the same
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                near.close()
                continue
            far.settimeout(None)
            for one, other, kept in ((near, far, self.said), (far, near, self.answered)):
                threading.Thread(target=self._pass_on, args=(one, other, kept), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, kept: bytearray) -> None:
        try:
            while data := one.recv(1 << 16):
                kept += data
                other.sendall(data)
        except OSError:
            pass
        finally:
            for end in (one, other):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
