"""The load that a server can carry: many of Flower's SuperNodes on one machine, with a tiny model.

    python benchmarks/many_hospitals.py [--hospitals 64] [--rounds 5]

Server and SuperNodes are those of a federation, without keys. The hospitals' own programs would each hold torch in
memory. Here only as many programs as there are cores work on all messages, each message in a fork and in its hospital's
folder. A SuperNode that ends because the server was too busy to answer is started again, as a hospital's script does.
Memory that processes share is not counted twice (Linux only).
"""

import argparse
import importlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import ROOT, __version__, run_script
from federation.hospital.identity import Identity
from federation.runtime import flower, programs
from federation.runtime.bundle import hospital_code, hospital_files
from federation.runtime.connection import FAR
from federation.runtime.processes import Child, free_port, is_healthy, parse_address
from phantoms.patients import make_phantoms

AT_ONCE = 4  # SuperNodes that start together
ROUND = re.compile(r"round (\d+) of \d+: ([\d.]+) s, of which ([\d.]+) s")


def memory(top: int) -> float:
    """MB that a process and its children hold; shared memory counts by share."""
    try:
        own = re.search(r"Pss:\s+(\d+)", Path(f"/proc/{top}/smaps_rollup").read_text())
        below = Path(f"/proc/{top}/task/{top}/children").read_text().split()
    except OSError:  # the process has ended meanwhile
        return 0.0
    return (int(own[1]) / 1024 if own else 0.0) + sum(memory(int(child)) for child in below)


def supernode(folder: Path, server: str, port: int) -> Child:
    """A hospital's SuperNode, which waits for messages like one on another machine."""
    options = [str(FAR), "--insecure", "--superlink", server, "--host", "127.0.0.1", "--port", str(port)]
    return Child("supernode", [*options, "--isolation", "process"], folder, folder / "supernode.log")


class Again(threading.Thread):
    """Restarts SuperNodes that ended, until `over` is set."""

    def __init__(self, nodes: dict[str, Child], folders: dict[str, Path], server: str):
        super().__init__(daemon=True)
        self.nodes, self.folders, self.server = nodes, folders, server
        self.over, self.restarts = threading.Event(), 0

    def run(self) -> None:
        while not self.over.wait(2):
            for address, node in self.nodes.items():
                if node.exit_code is not None:
                    port = int(address.rpartition(":")[2])
                    self.nodes[address] = supernode(self.folders[address], self.server, port)
                    self.restarts += 1


def serve(folders: dict[str, Path]) -> None:
    """Work on the messages of these SuperNodes, one after the other, until the process is killed. folders: each
    hospital's folder, by its SuperNode's address."""
    sources = {address: flower.TaskSource(address, "flwr-clientapp") for address in folders}
    while True:
        for address, source in sources.items():
            if token := source.next_token():
                os.chdir(folders[address])
                programs.run_in_fork(address, token)
        time.sleep(programs.POLL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hospitals", type=int, default=64, help="SuperNodes (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="medfl-many-") as made:
        run(Path(made), arguments.hospitals, arguments.rounds)


def run(folder: Path, hospitals: int, rounds: int) -> None:
    """Run a federation in this folder, and print its times and memory."""
    make_phantoms(folder / "data", patients=2 * hospitals, slices=4, size=64, seed=0)
    server = f"127.0.0.1:{free_port()}"
    options = {
        "clients": hospitals,
        "rounds": rounds,
        "address": server,
        "out": folder / "out",
        "model": "mini",
    }
    options |= {
        "image-size": 32,
        "partition": "iid",
        "test-fraction": 0,
        "val-fraction": 0,
        "encoder": "random",
    }
    began = time.monotonic()
    top = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "run_server.py"), *(f"--{n}={v}" for n, v in options.items())],
        stdout=subprocess.PIPE,
        text=True,
    )
    while not is_healthy(*parse_address(server)):
        time.sleep(0.5)
    nodes: dict[str, Child] = {}
    folders = {}
    for cid in range(hospitals):
        home = folder / f"hospital-{cid}"
        Identity(
            label=home.name,
            cid=cid,
            data=folder / "data",
            models=folder / "models",
            device="cpu",
            medfl=__version__,
            code=hospital_code(),
            shared_cores=1,
        ).save(home)
        port = free_port()
        address = f"127.0.0.1:{port}"
        nodes[address], folders[address] = supernode(home, server, port), home
        while cid % AT_ONCE == 0 and not is_healthy(*parse_address(address)):
            time.sleep(0.2)
    while not all(is_healthy(*parse_address(address)) for address in folders):
        time.sleep(1)
    print(f"{hospitals} SuperNodes after {time.monotonic() - began:.0f} s", flush=True)
    for module in (flower.CLIENT_APP, "flwr.supernode.runtime.run_clientapp"):
        importlib.import_module(module)  # loaded before forking: a task is given up after 30 s
    hospital_files()
    workers = []
    for number in range(cores := os.cpu_count() or 1):
        if not (worker := os.fork()):
            serve(dict(list(folders.items())[number::cores]))
        workers.append(worker)
    again = Again(nodes, folders, server)
    again.start()
    times, most = [], 0.0
    try:
        assert top.stdout is not None  # a pipe
        for line in top.stdout:
            if found := ROUND.search(line):
                times.append((float(found[2]), float(found[3])))
                most = max(most, memory(top.pid))
                print(f"round {found[1]}: {found[2]} s, server {memory(top.pid):.0f} MB", flush=True)
        code = top.wait()
    finally:
        again.over.set()
        again.join()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        each = statistics.median(memory(node.process.pid) for node in nodes.values())
        for node in nodes.values():
            node.stop()
    print(
        f"{hospitals} hospitals: {statistics.median(t for t, _ in times):.1f} s per round (median), server at most "
        f"{most:.0f} MB, a SuperNode {each:.0f} MB, {again.restarts} of them started again; exit code {code}"
    )


if __name__ == "__main__":
    run_script(main)
