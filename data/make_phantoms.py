"""Make synthetic patients in the layout of the LGG MRI download, for tests and first attempts without real
scans.

    python data/make_phantoms.py --patients 24 --out data/phantoms

A phantom is painted, not measured: a score on phantoms says nothing about real patients.
"""

import argparse
from pathlib import Path

from common import counted, run_script, typed
from phantoms.patients import make_phantoms


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make synthetic patients in the layout of the LGG MRI download."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/phantoms"), help="folder for kaggle_3m (default data/phantoms)"
    )
    for option, default, text in (
        ("--patients", 24, "number of patients"),
        ("--slices", 24, "slices per patient, on average"),
        ("--size", 256, "width and height in pixels"),
        ("--seed", 0, "seed of all random numbers"),
    ):
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )
    arguments = parser.parse_args()
    root = make_phantoms(**vars(arguments), progress=True)
    print(f"{counted(arguments.patients, 'phantom')} in {root}")
    print(f"next: python train_centralized.py --data-dir {typed(arguments.out)}")


if __name__ == "__main__":
    run_script(main)
