"""The cost of a federation beyond training: seconds and bytes per round, and whether the server's memory grows.

    python benchmarks/federated_rounds.py [--data-dir data/phantoms] [--rounds 20] [--clients 2] [--image-size 128]

Runs a server and its hospitals as real processes on this machine. The overhead of a round is its time minus
the longest hospital's own work. Memory is the resident memory of all processes of the server together, after
each round (Linux only).
"""

import argparse
import csv
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, run_script
from federation.runtime.processes import free_port

ROUND = re.compile(r"round (\d+) of \d+: ([\d.]+) s, of which ([\d.]+) s")


def resident(process: int) -> float:
    """GiB that a process and its children hold."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 2**30 + sum(resident(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/phantoms"), help="a dataset (default data/phantoms)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds (default 20)")
    parser.add_argument("--clients", type=int, default=2, help="hospitals (default 2)")
    parser.add_argument(
        "--image-size", type=int, default=128, help="side of the network's input in pixels (default 128)"
    )
    arguments = parser.parse_args()
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="medfl-benchmark-") as out:
        client = [
            sys.executable,
            str(ROOT / "run_client.py"),
            "--data-dir",
            str(arguments.data_dir),
            "--server",
            address,
        ]
        hospitals = [
            subprocess.Popen([*client, "--cid", str(k)], stdout=subprocess.DEVNULL)
            for k in range(arguments.clients)
        ]
        options = {
            "clients": arguments.clients,
            "address": address,
            "out": out,
            "rounds": arguments.rounds,
            "image-size": arguments.image_size,
        }
        server = subprocess.Popen(
            [
                sys.executable,
                "-u",
                str(ROOT / "run_server.py"),
                "--overwrite",
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        overheads, memory = [], []
        assert server.stdout is not None  # a pipe
        for line in server.stdout:
            if found := ROUND.search(line):
                overheads.append(float(found[2]) - float(found[3]))
                memory.append(resident(server.pid))
                print(
                    f"round {found[1]}: {found[2]} s, overhead {overheads[-1]:.1f} s, server "
                    f"{memory[-1]:.2f} GiB",
                    flush=True,
                )
        if server.wait():
            sys.exit(server.returncode)
        for hospital in hospitals:
            hospital.wait()
        with open(Path(out) / "federated_history.csv", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["examples"]]
    print(f"overhead of a round: median {statistics.median(overheads):.1f} s, longest {max(overheads):.1f} s")
    print(f"bytes per hospital and round: {rows[0]['bytes_sent']} out, {rows[0]['bytes_received']} in")
    third = max(1, len(memory) // 3)
    first, last = statistics.median(memory[:third]), statistics.median(memory[-third:])
    growth = 1024 * (last - first) / max(1, len(memory) - third)
    print(
        f"server's memory, median: first third {first:.2f} GiB, last third {last:.2f} GiB, "
        f"so {growth:+.1f} MiB per round"
    )


if __name__ == "__main__":
    run_script(main)
