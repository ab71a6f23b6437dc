"""How long data/prepare_hospital.py takes for a study, and how much memory it needs, with one patient and with
several.

    python benchmarks/prepare_speed.py [--patients 4]

A study is three DICOM series of 512×512×40 of a phantom that moved between them, and a mask as DICOM SEG.
Memory is the largest resident set of the script's process. Linux and macOS.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import SimpleITK as sitk

from common import ROOT, MedFLError, run_script
from radiology.segmentation import write_segmentation
from radiology.series import find_series
from tests.dicom_phantoms import phantom, scan, turn, write_series

SIDE, SLICES = 512, 40
KIBIBYTE = 1 if sys.platform == "darwin" else 1024  # the unit in which the system counts a resident set


def write_study(folder: Path, number: int) -> None:
    """Write one patient's three series and mask."""
    images, truth = phantom(number, slices=24)
    who = {"PatientID": f"patient {number}"}
    for image, name in zip(images, ("AX T1", "AX FLAIR", "AX T1 +C")):
        moved = None if name == "AX FLAIR" else turn(image, (2, -3, 4), (3, 4, -2))
        seen = scan(image, SIDE, SLICES, moved=moved)
        paths = write_series(folder / name, seen, who, study=f"1.2.{number}", SeriesDescription=name)
        if name == "AX FLAIR":
            (series,), _ = find_series(paths)
            write_segmentation(
                sitk.GetArrayFromImage(scan(truth, SIDE, SLICES, nearest=True)), series, folder / "seg"
            )


def measure(source: list[str], out: Path) -> tuple[float, float]:
    """Seconds and peak MiB of a preparation. source: the script's options for it. Raises MedFLError if it fails."""
    command = [
        sys.executable,
        str(ROOT / "data" / "prepare_hospital.py"),
        *source,
        "--out",
        str(out),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise MedFLError("the preparation failed; see its message above")
    return time.perf_counter() - began, used.ru_maxrss * KIBIBYTE / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=4, help="patients in the larger archive (default 4)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, arguments.patients):
            archive = Path(folder) / f"export{count}"
            for number in range(count):
                write_study(archive / str(number), number)
            seconds, memory = measure(["--dicom", str(archive)], Path(folder) / f"out{count}")
            print(
                f"{count} patient(s): {seconds:.1f} s, {seconds / count:.1f} s per study, at most "
                f"{memory:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    run_script(main)
