"""A consortium's week in small: what happens in weeks to a federation that nobody sits beside, with real processes.

A hospital is added, one is put out, programs on both sides are killed at random moments, machines sleep, a clock
is set, disks are full, a certificate ends, a new version is installed. Whoever watches restarts what ended, as a
service manager does, and does nothing else.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from consortium import Consortium
from federations import BEST, DEADLINE, SMALL, Scene, Script, child_of, children, history, signal_tree
from running import ROOT, change
from test_trouble import own_folder

from federation.runtime import certificates

PARTS = {"mercy": slice(0, 3), "hope": slice(3, 6), "grace": slice(6, 8), "charity": slice(8, 10)}
MANY = 1000  # rounds, more than there is time for
# seconds without a heartbeat, in the place of Flower's 60, after which connections and tokens lapse
LAPSE = 37.5
PAUSE = 45.0
SMALL_FILE = 1_000_000  # bytes that a file can have on a full disk: lines find room, a model does not
SITE = """
import importlib.util, pathlib, sys
place = pathlib.Path(importlib.util.find_spec("flwr").origin).parent / "common" / "constant.py"
spec = importlib.util.spec_from_file_location("flwr.common.constant", place)
constant = sys.modules["flwr.common.constant"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(constant)
constant.HEARTBEAT_PATIENCE = {lapse} / constant.HEARTBEAT_DEFAULT_INTERVAL
"""
# a clock that is set: the time of day is moved by the seconds in a file, and no other clock, as when a real one is
# set (libfaketime 0.9.10 makes Python's sleep fail)
CLOCK = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long offset(void) {
  char text[32] = {0};
  int file = open(getenv("CLOCK_OFFSET"), O_RDONLY);
  if (file < 0) return 0;
  long size = read(file, text, sizeof text - 1);
  close(file);
  return size > 0 ? atol(text) : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = syscall(SYS_clock_gettime, clock, now);
  if (!result && clock == CLOCK_REALTIME) now->tv_sec += offset();
  return result;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return out ? (*out = now.tv_sec) : now.tv_sec;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  out->tv_sec = now.tv_sec, out->tv_usec = now.tv_nsec / 1000;
  return 0;
}
"""


class Week:
    """A consortium with a server and hospitals that run as services."""

    def __init__(self, scene: Scene, phantoms: Path, kills: int, seed: int = 0):
        self.scene, self.kills, self.random, self.root = scene, kills, random.Random(seed), ROOT
        self.consortium = Consortium(scene.folder)
        self.kits = {label: self.consortium.hospital(label, label in ("mercy", "hope")) for label in PARTS}
        self.data = {
            label: own_folder(phantoms, scene.folder / f"of-{label}", PARTS[label]) for label in PARTS
        }
        self.services: dict[str, Script] = {}
        self.observes: set[str] = set()
        self.clients, self.rounds = 3, MANY

    def day(self, what: str) -> None:
        """Say which day it is, for who reads the log."""
        print(f"{time.strftime('%H:%M:%S')} {what}: {self.done} rounds so far", file=sys.stderr, flush=True)

    # services

    def start(self, name: str) -> Script:
        """Start the server, or a hospital, as its unit does."""
        if name == "server":
            options = ("--start-or-resume", "--kit", self.consortium.kit, "--clients", self.clients)
            options += (
                "--min-clients",
                1,
                "--rounds",
                self.rounds,
                "--round-timeout",
                60,
                *SMALL,
            )
            self.services[name] = self.scene.server(*options, root=self.root)
        else:
            options = ("--own-data", self.data[name], "--kit", self.kits[name], "--wait", 600)
            observes = ("--observer",) * (name in self.observes)
            self.services[name] = self.scene.hospital(name, *options, *observes, root=self.root)
        return self.services[name]

    def stop(self, name: str) -> None:
        """Stop it, as `systemctl stop` does."""
        script = self.services.pop(name)
        script.process.send_signal(signal.SIGTERM)
        assert script.end() == 130, script.output

    def restart_what_ended(self) -> None:
        for name, script in list(self.services.items()):
            if script.process.poll() is not None:
                self.start(name)

    @property
    def hospitals(self) -> set[str]:
        """Those that train."""
        return set(self.services) - {"server"} - self.observes

    # what is seen

    @property
    def trained(self) -> dict[int, set[str]]:
        """Who has a part in each round."""
        found: dict[int, set[str]] = {}
        with contextlib.suppress(OSError):
            for row in history(self.scene.out):
                found.setdefault(int(row["round"]), set()).update({row["site"]} if row["examples"] else ())
        return found

    @property
    def done(self) -> int:
        return max(self.trained, default=0)

    def until(self, met: Callable[[], bool], what: str) -> None:
        """Watch as a service manager does until it is so."""
        end = time.monotonic() + DEADLINE
        while not met():
            said = "\n".join(f"{name}:\n{script.output[-3000:]}" for name, script in self.services.items())
            assert time.monotonic() < end, f"never: {what}\n{said}"
            self.restart_what_ended()
            time.sleep(0.2)

    def goes_on(self, without: str = "") -> None:
        """Wait for a round that began after this call, and in which all hospitals but one have a part."""
        first, who = self.done + 2, self.hospitals - {without}
        self.until(
            lambda: any(n >= first and who <= s and without not in s for n, s in self.trained.items()),
            f"round {first} or a later one with {sorted(who)} and without {without or 'nobody'}",
        )

    def says(self, name: str, sentence: str) -> None:
        """Wait until one of the starts of a service said it."""
        logs = lambda: [s.output for s in self.scene.scripts if s.name == name]  # noqa: E731
        self.until(lambda: any(sentence in log for log in logs()), f"{name} says {sentence!r}")

    # what happens

    def begin(self) -> None:
        """Fewer keys than hospitals that are waited for; a server that dies before any round; two hospitals."""
        self.day("the start")
        self.start("server").wait_for("2 keys admitted, but the run waits for 3 hospitals")
        self.services["server"].kill()
        self.clients = 2  # a run that has not begun begins with as many as the unit says now
        self.start("mercy")
        self.start("server").wait_for("listening on")
        self.start("hope")
        self.goes_on()
        twice = self.scene.hospital(
            "mercy-again", "--own-data", self.data["mercy"], "--kit", self.kits["mercy"]
        )
        assert twice.end() == 2 and "mercy is already running" in twice.output

    def add(self, label: str) -> None:
        """A hospital is admitted while the run goes on: it asks, observes, leaves, and trains."""
        self.day(f"{label} is added")
        assert label not in set().union(*self.trained.values())
        self.consortium.provision("admit", self.kits[label] / "hospital.pub", "--kit", self.consortium.kit)
        options = ("--own-data", self.data[label], "--kit", self.kits[label], "--check")
        self.says("server", "admitted: hope, mercy")
        asks = self.scene.hospital(f"{label}-asks", *options)
        assert asks.end() == 0 and "this hospital can join; nothing was trained" in asks.output, asks.output
        self.observes.add(label)
        self.start(label)
        self.until(lambda: any(r["site"] == label for r in history(self.scene.out)), f"{label} observes")
        assert not any(row["examples"] for row in history(self.scene.out) if row["site"] == label)
        self.stop(label)
        self.goes_on(without=label)
        self.observes.remove(label)
        self.start(label)
        self.goes_on()
        self.says("server", f"new from this round on: {label}")

    def put_out(self, label: str, instead: str) -> None:
        """A hospital's key is revoked, and another one takes its place."""
        self.day(f"{label} is put out, {instead} comes")
        script = self.services.pop(label)
        self.consortium.provision("revoke", label, "--kit", self.consortium.kit)
        assert script.end() == 2 and "does not admit this hospital's key" in script.output, script.output
        self.consortium.provision("admit", self.kits[instead] / "hospital.pub", "--kit", self.consortium.kit)
        self.start(instead)
        self.goes_on(without=label)

    def kill(self) -> None:
        """Programs die at random moments, some while others still come back."""
        programs = ["", "superlink", "serverapp", "nginx"], ["", "supernode", "hospital"]
        for number in range(self.kills):
            name = self.random.choice(["server", *sorted(self.hospitals)])
            program = self.random.choice(programs[name != "server"])
            time.sleep(self.random.uniform(0, 4))
            self.day(f"kill {number + 1} of {self.kills}, {name} {program}")
            self.restart_what_ended()
            with contextlib.suppress(StopIteration, ProcessLookupError):  # it is just being started again
                os.kill(self._process(self.services[name], program), signal.SIGKILL)
            if self.random.random() < 0.5:
                self.goes_on()
        self.goes_on()

    def _process(self, script: Script, program: str) -> int:
        if not program:
            return script.process.pid
        if program == "nginx":
            return next(int(c.split()[0]) for c in children(self.scene.folder) if "nginx: master" in c)
        return child_of(script, program)

    def sleep(self) -> None:
        """A hospital's laptop sleeps, then the server's machine, longer than connections and tokens live."""
        self.day("machines sleep")
        for name in ("mercy", "server"):
            top = self.services[name].process.pid
            signal_tree(top, signal.SIGSTOP)
            began = time.monotonic()
            if name == "mercy":
                self.goes_on(without=name)
            time.sleep(max(0.0, PAUSE - (time.monotonic() - began)))
            signal_tree(top, signal.SIGCONT)
            self.goes_on()

    def set_clock(self) -> None:
        """The clock of the server's machine is set an hour ahead, and back: the hospitals wait meanwhile."""
        if not (sys.platform == "linux" and shutil.which("cc")):
            self.day("no C compiler here: no clock is set")
            return
        self.day("a clock is set")
        library, offset = self.scene.folder / "clock.so", self.scene.folder / "offset"
        command = ["cc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"]
        subprocess.run(command, input=CLOCK, text=True, check=True)
        offset.write_text("0")
        self.stop("server")
        with mock.patch.dict(os.environ, LD_PRELOAD=str(library), CLOCK_OFFSET=str(offset)):
            self.start("server")
        self.goes_on()
        offset.write_text("3600")
        self.says("mercy", "the server does not accept this machine's time")
        offset.write_text("0")
        self.goes_on()
        self.stop("server")
        self.start("server")
        self.goes_on()

    def fill_disks(self) -> None:
        """A hospital's disk is full, then the server's; when there is room again all goes on."""
        self.day("disks are full")
        worker = child_of(self.services["mercy"], "hospital")
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (SMALL_FILE, resource.RLIM_INFINITY))
        self.goes_on(without="mercy")
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self.goes_on()
        app, server = child_of(self.services["server"], "serverapp"), self.services["server"]
        resource.prlimit(app, resource.RLIMIT_FSIZE, (SMALL_FILE, resource.RLIM_INFINITY))
        assert server.end() == 2 and "free the" in server.output, server.output[-3000:]
        self.goes_on()

    def let_certificate_end(self) -> None:
        """The server does not start with a certificate that has ended, and says how to make another."""
        self.day("a certificate ends")
        self.stop("server")
        certificates.make_server_certificate(self.consortium.kit, ["fl.example.org"], 0, renew=True)
        refused = self.start("server")
        assert refused.end() == 2 and "provision.py server --renew" in refused.output, refused.output
        self.consortium.provision(
            "server", "--host", "fl.example.org", "--renew", "--kit", self.consortium.kit
        )
        self.goes_on()

    def upgrade(self) -> None:
        """The server gets a new version, then the hospitals, one after the other."""
        self.day("an upgrade")
        new = self.scene.folder / "new version"
        away = shutil.ignore_patterns(".git", ".venv*", "data", "models", "tests", "docs", "__pycache__")
        shutil.copytree(ROOT, new, ignore=away)
        line = next(x for x in (new / "common.py").read_text().splitlines() if x.startswith("__version__"))
        change(new / "common.py", line, '__version__ = "99.0.0"')
        self.stop("server")
        self.root = new
        self.start("server")
        self.says("mercy", "waiting up to 600 s for a server of the same version")
        for label in self.hospitals:
            self.stop(label)
            self.start(label)
        self.goes_on()

    def end(self) -> None:
        """The run is ended where it is; everybody gets the model, and nothing is left to do."""
        self.stop("server")
        self.rounds = self.done
        hospitals = {label: self.services.pop(label) for label in self.hospitals}
        self.day("the end")
        assert self.start("server").end() == 0, self.services["server"].output
        for script in hospitals.values():
            assert script.end() == 0, script.output
        best = self.scene.out / BEST
        for label in hospitals:
            assert (
                f"the federation's best model: {self.scene.folder}/models/{label}" in hospitals[label].output
            )
        over = self.start("server")
        assert over.end() == 0 and "nothing is left to do" in over.output, over.output
        assert best.exists()
