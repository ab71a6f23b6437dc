"""A small hospital archive: Orthanc with phantoms, whose studies are prepared, predicted and sent back.

    python benchmarks/archive_demo.py --checkpoint models/demo/transunet_centralized_best.pth     (make archive-demo)

Ends with Ctrl-C; the archive is then deleted. Needs Debian's orthanc and orthanc-dicomweb.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, MedFLError, run_script
from tests.dicom_phantoms import phantom, scan, write_series
from tests.orthanc import PASSWORD, USER, Orthanc, need_orthanc

SAGITTAL = [[0, 0, -1], [1, 0, 0], [0, -1, 0]]
STUDY = "1.2.840.99.{}"


def write_phantoms(folder: Path, patients: int) -> None:
    """Write patients with pre-contrast, FLAIR and post-contrast; every second one has a sagittal 3-D FLAIR."""
    for number in range(1, patients + 1):
        images, _ = phantom(number, slices=16)
        who = {
            "PatientID": f"DEMO{number}",
            "PatientName": f"Phantom^Number {number}",
            "StudyID": str(number),
        }
        for channel, name in enumerate(("AX T1", "FLAIR", "AX T1 GD"), 1):
            sagittal = name == "FLAIR" and number % 2 == 0
            image = scan(images[channel - 1], 192, 96, SAGITTAL) if sagittal else images[channel - 1]
            write_series(
                folder / str(number) / name,
                image,
                who,
                study=STUDY.format(number),
                frame=STUDY.format(f"{number}.9"),
                SeriesDescription=f"SAG {name} 3D" if sagittal else name,
                SeriesNumber=channel,
                StudyDate=f"2026010{number}",
            )


def call(script: str, *options: object) -> None:
    """Run a script as a user does, and show the command."""
    command = [script, *map(str, options)]
    print("\n$ python " + " ".join(command), flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise MedFLError(f"{script} failed; see its message above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model, a .pth file")
    parser.add_argument("--patients", type=int, default=2, help="patients in the archive, 1 to 9 (default 2)")
    parser.add_argument(
        "--end", action="store_true", help="end when everything is sent, without waiting for Ctrl-C"
    )
    arguments = parser.parse_args()
    need_orthanc()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"painting {arguments.patients} patients", flush=True)
        write_phantoms(folder / "scans", arguments.patients)
        archive = Orthanc(folder / "orthanc").start()
        try:
            archive.add(folder / "scans")
            about = ["--dicomweb", archive.url, "--login", archive.write_login(folder)]
            call("data/prepare_hospital.py", *about, "--out", folder / "prepared")
            for number in range(1, arguments.patients + 1):
                study = STUDY.format(number)
                call(
                    "predict.py", *about, "--study", study, "--rtstruct", "--checkpoint", arguments.checkpoint
                )
            print(
                f"\nlook at the archive: {archive.root}/app/explorer.html (user {USER}, password {PASSWORD}); "
                f"DICOMweb for a viewer: {archive.url}\nprepared: {folder / 'prepared' / 'index.html'}\n"
                "Ctrl-C ends it, and deletes the archive and what was prepared",
                flush=True,
            )
            while not arguments.end:
                time.sleep(3600)
        finally:
            archive.kill()


if __name__ == "__main__":
    run_script(main)
