"""The cost of a defence: rounds of a federation on plain loopback and of a secured one, in turn.

    python benchmarks/security_cost.py gateway --data-dir data/phantoms [--rounds 5] [--repeats 2]
    python benchmarks/security_cost.py secure-aggregation

A server and two hospitals (three with secure aggregation, which needs three) run as real processes on this machine,
with `tiny` at 128 pixels. gateway: each secured one has a kit, and they stand behind nginx.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, MedFLError, run_script
from federation.runtime.admissions import admit
from federation.runtime.certificates import make_authority, make_server_certificate
from federation.runtime.hospital_kit import make_hospital_key
from federation.runtime.kit import CA, HOSPITAL_PUBLIC
from federation.runtime.processes import free_port

HOSPITALS = {"gateway": 2, "secure-aggregation": 3}
ROUND = re.compile(r"^[-\d :]+round \d+ of \d+: ([\d.]+) s, of which ([\d.]+) s", re.M)


def make_kits(folder: Path, hospitals: int) -> None:
    """Make the kits of a server and its hospitals, each of them admitted."""
    make_authority(folder / "server")
    make_server_certificate(folder / "server", ["localhost"], 1)
    for number in range(hospitals):
        kit = folder / f"hospital-{number}"
        make_hospital_key(kit, kit.name)
        admit(folder / "server", (kit / HOSPITAL_PUBLIC).read_text(encoding="utf-8"), 1)
        shutil.copyfile(folder / "server" / CA, kit / CA)


def rounds(
    defence: str | None, count: int, folder: Path, data_dir: Path, number: int
) -> list[tuple[float, float]]:
    """Seconds of each of `number` rounds of `count` hospitals, and the seconds without the longest hospital's
    work."""
    address = f"127.0.0.1:{free_port()}"

    def keys(name: str) -> list[str]:
        return ["--kit", str(folder / name)] if defence == "gateway" else []

    client = [sys.executable, str(ROOT / "run_client.py"), "--data-dir", str(data_dir), "--server", address]
    hospitals = [
        subprocess.Popen([*client, "--cid", str(k), *keys(f"hospital-{k}")], stdout=subprocess.DEVNULL)
        for k in range(count)
    ]
    server = [
        sys.executable,
        str(ROOT / "run_server.py"),
        "--overwrite",
        "--address",
        address,
        "--out",
        str(folder / "out"),
        *keys("server"),
    ]
    server += ["--secure-aggregation"] if defence == "secure-aggregation" else []
    done = subprocess.run(
        [*server, "--clients", str(count), "--rounds", str(number)], capture_output=True, text=True
    )
    for hospital in hospitals:
        hospital.wait()
    if done.returncode:
        raise MedFLError(f"the server ended with {done.returncode}: {done.stderr.strip()}")
    return [(float(seconds), float(seconds) - float(work)) for seconds, work in ROUND.findall(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("defence", choices=HOSPITALS, help="the defence to measure")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/phantoms"), help="a dataset (default data/phantoms)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each federation (default 5)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="federations of each kind, in turn (default 2)"
    )
    arguments = parser.parse_args()
    count = HOSPITALS[arguments.defence]
    measured: dict[str, list[tuple[float, float]]] = {"plain": [], "secured": []}
    with tempfile.TemporaryDirectory(prefix="medfl-benchmark-") as name:
        make_kits(Path(name), count)
        for _ in range(arguments.repeats):
            for kind, found in measured.items():
                found += rounds(
                    arguments.defence if kind == "secured" else None,
                    count,
                    Path(name),
                    arguments.data_dir,
                    arguments.rounds,
                )
                print(
                    f"{kind}: {', '.join(f'{seconds:.1f}' for seconds, _ in found[-arguments.rounds :])} s "
                    f"per round",
                    flush=True,
                )
    medians = {}
    for kind, found in measured.items():
        medians[kind] = [statistics.median(values) for values in zip(*found)]
        print(
            f"{kind:8} median round {medians[kind][0]:.1f} s, without the hospitals' work "
            f"{medians[kind][1]:.1f} s, {len(found)} rounds"
        )
    more = medians["secured"][0] - medians["plain"][0]
    print(f"{arguments.defence}: {more:+.1f} s, {100 * more / medians['plain'][0]:+.1f} % of a round")


if __name__ == "__main__":
    run_script(main)
