"""What data/prepare_hospital.py wrote, for the tests of it."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = "data/prepare_hospital.py"


def report(archive: Path) -> list[dict]:
    """The rows of the report on an archive."""
    with open(
        archive.parent / f"{archive.name}_private" / "report.csv", encoding="utf-8", newline=""
    ) as file:
        return list(csv.DictReader(file))


def pixels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A prepared study's slices and masks in order."""
    count = len(list(folder.glob("*_mask.tif")))
    return tuple(
        np.stack([np.asarray(Image.open(folder / f"{folder.name}_{n + 1}{end}.tif")) for n in range(count)])
        for end in ("", "_mask")
    )
