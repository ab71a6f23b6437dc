"""Preparation from an archive compared with preparation from a folder: time, memory, and whether memory grows.

    python benchmarks/archive_speed.py [--patients 4] [--growth 200]

Needs Debian's orthanc and orthanc-dicomweb. A study is three DICOM series of 512×512×40 and a mask, as in
benchmarks/prepare_speed.py. Growth is measured with small studies (only FLAIR, 64×64×4), by the resident set of the
script while it runs. Linux.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pydicom

from benchmarks.prepare_speed import measure, write_study
from common import ROOT, MedFLError, run_script
from tests.dicom_phantoms import phantom, write_series
from tests.orthanc import Orthanc, need_orthanc


def make_foreign(folder: Path) -> None:
    """Give the masks another maker than MedFL: preparation from an archive does not accept MedFL's own masks as
    truth."""
    for path in folder.rglob("seg"):
        mask = pydicom.dcmread(path)
        mask.Manufacturer = "A reader's workstation"
        mask.save_as(path)


def resident(pid: int) -> float:
    """MiB that a process holds in memory now."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def growth(source: list[str], out: Path, studies: int) -> list[tuple[int, float]]:
    """The finished studies and MiB in memory, several times during a preparation. Raises MedFLError if it fails."""
    command = [sys.executable, str(ROOT / "data" / "prepare_hospital.py"), *source, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ledger, told, points = out.parent / f"{out.name}_private" / "archive.jsonl", -1, []
    while process.poll() is None:
        done = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
        if done // max(1, studies // 10) > told:
            told = done // max(1, studies // 10)
            points.append((done, resident(process.pid)))
        time.sleep(0.1)
    if process.returncode:
        raise MedFLError("the preparation failed; run it by hand")
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--patients", type=int, default=4, help="patients with three series of 512×512×40 (default 4)"
    )
    parser.add_argument(
        "--growth", type=int, default=200, help="small studies one after the other (default 200)"
    )
    arguments = parser.parse_args()
    need_orthanc()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(arguments.patients):
            write_study(folder / "export" / str(number), number)
        make_foreign(folder / "export")
        for number in range(arguments.growth):
            images, _ = phantom(number % 4, slices=4, size=64)
            who = {"PatientID": f"small {number}"}
            write_series(
                folder / "small" / str(number),
                images[1],
                who,
                study=f"1.3.{number}",
                SeriesDescription="FLAIR",
            )
        archive = Orthanc(folder / "orthanc").start()
        try:
            archive.add(folder / "export", folder / "small")
            login = str(archive.write_login(folder))
            asked = ["--dicomweb", archive.url, "--login", login]
            sources = {
                "folder": ["--dicom", str(folder / "export")],
                "DICOMweb": [*asked, "--query", "PatientID=patient*"],
                "C-GET": ["--dimse", archive.dimse, "--query", "PatientID=patient*"],
            }
            usual = 0.0
            for name, source in sources.items() if arguments.patients else ():
                seconds, memory = measure(source, folder / f"out_{name}")
                usual = usual or seconds
                print(
                    f"{name}: {seconds:.1f} s for {arguments.patients} studies, {seconds / usual:.2f} times "
                    f"the folder's, at most {memory:.0f} MiB",
                    flush=True,
                )
            small = [*asked, "--query", "PatientID=small*"]
            for done, memory in (
                growth(small, folder / "out_small", arguments.growth) if arguments.growth else ()
            ):
                print(f"after {done} small studies: {memory:.0f} MiB")
        finally:
            archive.kill()


if __name__ == "__main__":
    run_script(main)
