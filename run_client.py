"""Run a hospital of a federation.

    python run_client.py --cid 0                                  share 0 of the dataset in data/, server on this machine
    python run_client.py --own-data scans --name mercy            everything in the folder is this hospital's
    python run_client.py --own-data scans --name mercy --check    look at the data and the connection, train nothing
    python run_client.py --own-data scans --kit kit --server fl.example.org:8443    a server on another machine (provision.py)

The scans stay here. The hospital waits for the server (--wait), takes part in its rounds and ends with it. A hospital with
own data keeps its split in models/NAME_split.json. Exit codes: 0 done, 2 bad input or refused, 3 the server is gone or too
few hospitals are left, 130 stopped.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common import EXIT_NO_QUORUM, MedFLError, __version__, run_script, write_json
from dataset import load_dataset
from federation.hospital.identity import identity as describe_hospital
from federation.privacy.accountant import Promise
from federation.protocol.answers import LABEL
from federation.runtime.bundle import make_bundle
from federation.runtime.flower import ask_admission
from federation.runtime.kit import CA, HOSPITAL_KEY, hospital_label
from federation.runtime.processes import Child, free_port, is_healthy, is_loopback, join_address, parse_address

LOOK = 0.5  # seconds between two looks at children and server
PARTING = 5.0  # seconds in which the last answer reaches the server, unless it has gone before
RESTARTS = 5  # of the connection in a row, without it working for QUIET seconds, before it is given up
QUIET = 120.0
REFUSED = "[code: 2004]"  # of Flower's SuperNode: its activation was not accepted
LINGERS = 120.0  # seconds for which a server may hold a connection whose hospital was killed; Flower's own are about 60
AGAIN = 5.0  # seconds between two tries meanwhile
DELTA = 1e-5  # of a promise to patients that names none
HASH = re.compile("[0-9a-f]{64}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cid", type=int, help="number of the simulated hospital, from 0: takes that share of --data-dir")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="the dataset to share (default data)")
    parser.add_argument("--own-data", type=Path, help="folder of own patients, a folder each, images and _mask files")
    parser.add_argument("--name", help="this hospital's label, needed with --own-data")
    parser.add_argument("--server", default="127.0.0.1:8080", help="the server's HOST:PORT (default 127.0.0.1:8080)")
    parser.add_argument("--kit", type=Path, help="folder of this hospital's keys, from provision.py; needed for another machine")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds to wait for a server that is not there (default 300)")
    parser.add_argument("--approve", nargs="*", metavar="HASH", help="train only with code and settings of these hashes, or "
                        "of those in this file, a line each; without any: say what the server wants, and leave")
    parser.add_argument("--dp-sgd-epsilon", type=float, help="differential privacy of this hospital's patients: what all its "
                        "rounds together may tell of one; for a server with --norm group and --init (requirements-privacy.txt)")
    parser.add_argument("--dp-sgd-delta", type=float, help="of --dp-sgd-epsilon: chance that the bound does not "
                        "hold; far below 1 / patients (default 1e-5)")
    parser.add_argument("--check", action="store_true", help="look at data and connection, train nothing")
    return parser.parse_args()


def identity(arguments: argparse.Namespace) -> dict:
    """Who this hospital is. Raises MedFLError for options that don't go together and data that can't be used."""
    own = arguments.own_data is not None
    if own == (arguments.cid is not None):
        raise MedFLError("give either --cid K, for a share of one dataset, or --own-data FOLDER with --name")
    keys = hospital_label(arguments.kit) if arguments.kit else None
    if own and not (arguments.name or keys):
        raise MedFLError("a hospital with --own-data needs a label; give one with --name")
    if not own and arguments.name:
        raise MedFLError("--name goes with --own-data; a hospital with --cid K is called hospital-K")
    if not own and arguments.cid < 0:
        raise MedFLError(f"--cid is {arguments.cid}; hospitals are numbered from 0")
    label = arguments.name or (keys if own else f"hospital-{arguments.cid}")
    if keys not in (None, label):
        raise MedFLError(f"the kit in {arguments.kit} is {keys}'s and this hospital is called {label}; give the kit of that name")
    if not LABEL.fullmatch(label):
        raise MedFLError(f"--name is {label}; take up to 32 letters, digits, - and _")
    folder = arguments.own_data if own else arguments.data_dir
    dataset = load_dataset(folder, label if own else None)
    slices = int(dataset.table["slices"].sum())
    print(f"{label}: {dataset.name} in {dataset.root}, {len(dataset.patients)} patients, {slices} slices"
          + ("" if own else ", of which the server's partition says which are this hospital's"), flush=True)
    promise = None
    if arguments.dp_sgd_epsilon is not None:
        delta = DELTA if arguments.dp_sgd_delta is None else arguments.dp_sgd_delta
        promise = {"epsilon": arguments.dp_sgd_epsilon, "delta": delta}
    elif arguments.dp_sgd_delta is not None:
        raise MedFLError("--dp-sgd-delta goes with --dp-sgd-epsilon; give both, or none")
    if arguments.device not in ("auto", "cpu"):
        from inference import choose_device  # the network's library, which this process does without
        choose_device(arguments.device)
    who = describe_hospital(label, arguments.cid, folder, arguments.device, __version__, Path("models"),
                            shared_cores=None if own else os.cpu_count() or 1, code=hashlib.sha256(make_bundle()).hexdigest(),
                            approved=None if arguments.approve is None else approved(arguments.approve), promise=promise)
    ledger = Path(who["privacy_file"])
    if promise:
        Promise(**promise, ledger=ledger)  # complains of what can't be kept
    elif ledger.exists():
        raise MedFLError(f"{label} promised its patients privacy ({ledger}), and a round without it would break the promise; give "
                         "--dp-sgd-epsilon, or move that file away if the promise no longer holds")
    return who


def approved(given: list[str]) -> list[str]:
    """The hashes that the option names. Raises MedFLError for what is neither a hash nor a file of hashes."""
    hashes = []
    for entry in given:
        lines = Path(entry).read_text(encoding="utf-8").splitlines() if Path(entry).is_file() else [entry]
        hashes += [line.split("#")[0].strip() for line in lines]
    hashes = [entry for entry in hashes if entry]
    if wrong := [entry for entry in hashes if not HASH.fullmatch(entry)]:
        raise MedFLError(f"--approve got {wrong[0]}, which is no hash of 64 digits from 0 to f and no file; copy the one that the "
                         "server or this hospital printed")
    return hashes


class Connection:
    """Flower's SuperNode and the program that handles its messages, started and stopped together."""

    def __init__(self, server: str, kit: Path | None, folder: Path):
        port, log = str(free_port()), folder / "supernode.log"
        log.unlink(missing_ok=True)  # what a former connection said is no sign of how this one does
        transport = ["--insecure"] if kit is None else ["--root-certificates", str((kit / CA).resolve()),
                                                        "--auth-supernode-private-key", str((kit / HOSPITAL_KEY).resolve())]
        self.supernode = Child("supernode", [*transport, "--superlink", server, "--host", "127.0.0.1", "--port", port,
                                             "--isolation", "process"], folder, log)
        self.hospital = Child("hospital", [f"127.0.0.1:{port}"], folder)
        self.began = time.monotonic()

    @property
    def broken(self) -> bool:
        """Whether one of the two has ended; neither does so unasked."""
        return self.supernode.exit_code is not None or self.hospital.exit_code is not None

    @property
    def refused(self) -> bool:
        """Whether the server did not let this key in: it doesn't know it, or still holds a former connection."""
        return self.supernode.exit_code is not None and REFUSED in self.supernode.last_words()

    def stop(self) -> None:
        """End both."""
        self.hospital.stop()
        self.supernode.stop()


class Watch:
    """Keeps a hospital connected until the federation is over."""

    def __init__(self, server: str, host: str, port: int, kit: Path | None, folder: Path, wait: float):
        self.server, self.host, self.port, self.kit, self.folder, self.wait = server, host, port, kit, folder, wait
        self.connection: Connection | None = None
        self.seen = time.monotonic()  # the server, last time
        self.was_there, self.was_gone = False, False
        self.restarts = 0
        self.lingered_from: float | None = None  # since when the server refuses this key because of a former connection

    def run(self) -> tuple[int, str]:
        """Exit code and closing sentence."""
        ended = self.folder / "ended.json"
        try:
            while not ended.exists():
                self._look_at_server()
                self._look_at_children()
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
        return is_healthy(self.host, self.port, ca=self.kit and self.kit / CA)

    def _look_at_server(self) -> None:
        """Start the connection when the server is there, and anew when it was gone: it does not know the old one."""
        state, now = self._health(), time.monotonic()
        if state:
            self.seen = now
            if self.connection is None:
                self.connection = Connection(self.server, self.kit, self.folder)
            elif self.was_gone:
                self._renew("the server is back")
            self.was_there, self.was_gone = True, False
        elif now - self.seen > self.wait:
            if not self.was_there:
                raise MedFLError(f"no server at {self.server} within {self.wait:.0f} s; start it with run_server.py, "
                                 "or wait longer with --wait")
            print(f"the server at {self.server} has been gone for {self.wait:.0f} s; start this hospital again when it is back",
                  file=sys.stderr)
            sys.exit(EXIT_NO_QUORUM)
        elif state is False and not self.was_gone:
            self.was_gone = True
            yet = "any more" if self.was_there else "yet"
            print(f"no server at {self.server} {yet}; waiting up to {self.wait:.0f} s", flush=True)

    def _look_at_children(self) -> None:
        if self.connection and self.connection.broken and self.kit and not self.was_gone:
            refuse(ask_admission(self.server, self.kit / CA, self.kit / HOSPITAL_KEY))
            if self.connection.refused:
                return self._wait_for_the_former()
        if self.connection and not self.connection.broken and time.monotonic() - self.connection.began > QUIET:
            self.restarts, self.lingered_from = 0, None  # it works
        if self.connection and self.connection.broken and not self.was_gone:
            self.restarts += 1
            if self.restarts > RESTARTS:
                raise MedFLError(f"the connection ended {self.restarts} times in a row; the last lines of Flower's SuperNode:\n"
                                 f"{self.connection.supernode.last_words()}")
            self._renew("the connection ended")

    def _wait_for_the_former(self) -> None:
        """Another process has this key, or had it and was killed: try again until the server lets go of it."""
        if self.lingered_from is None:
            self.lingered_from = time.monotonic()
            print(f"the server still holds a connection of this hospital; trying again for up to {LINGERS:.0f} s", flush=True)
        if time.monotonic() - self.lingered_from > LINGERS:
            raise MedFLError("another process takes part with this hospital's key; end it, or start only one")
        time.sleep(AGAIN)
        self.connection.stop()
        self.connection = Connection(self.server, self.kit, self.folder)

    def _renew(self, why: str) -> None:
        print(f"{why}; connecting again", flush=True)
        self.connection.stop()
        self.connection = Connection(self.server, self.kit, self.folder)


def check(host: str, port: int, server: str, kit: Path | None) -> None:
    """Say whether the server can be reached. Raises MedFLError if not."""
    if not is_healthy(host, port, timeout=10, ca=kit and kit / CA):
        raise MedFLError(f"the data are fine, but no server answers at {server}; start it with run_server.py, or check the address")
    if kit:
        refuse(ask_admission(server, kit / CA, kit / HOSPITAL_KEY))
    print(f"the server at {server} answers{' and admits this key' if kit else ''}; nothing was trained")


def refuse(said: str) -> None:
    """Raises MedFLError where the server said that it does not let this hospital's key in."""
    if said == "unknown":
        raise MedFLError("the server does not admit this hospital's key: it was never admitted, or its admission is over or "
                         "revoked; ask the coordinator")
    if said == "clock":
        raise MedFLError("the server does not accept this machine's time; set the clock, it may be 5 s ahead at most")


def main() -> None:
    arguments = parse()
    host, port = parse_address(arguments.server)
    if not is_loopback(host) and arguments.kit is None:
        raise MedFLError(f"{host} is another machine, and what scans taught a model does not travel unencrypted; make this "
                         "hospital's keys with `python provision.py hospital --name LABEL`, and give them with --kit")
    who = identity(arguments)
    if arguments.check:
        return check(host, port, arguments.server, arguments.kit)
    folder = Path(tempfile.mkdtemp(prefix="medfl-hospital-"))
    try:
        write_json(folder / "hospital.json", who)
        code, sentence = Watch(join_address(host, port), host, port, arguments.kit, folder, arguments.wait).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{who['label']}: {sentence}", file=sys.stderr if code else sys.stdout, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    run_script(main)
