"""How often data/prepare_hospital.py would doubt that two series are aligned: for real pairs as they are, and
moved.

    python benchmarks/alignment_check.py --data-dir data

The dataset's pre- and post-contrast channels are aligned with FLAIR. Each pair is checked as it is and with the
channel moved sideways; a channel that FLAIR replaces is left out. The slices don't state their pixel size, so
0.94 mm is assumed (240 mm in 256 pixels), and 5 mm between slices. Needs requirements-dicom.txt.
"""

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from common import run_script
from dataset import load_dataset
from radiology.geometry import POOR, agreement, resample

PIXEL, BETWEEN = 0.94, 5.0  # mm
MOVES = (0.0, 5.0, 10.0)  # mm


def image_of(plane: np.ndarray) -> sitk.Image:
    """A channel, (S, H, W) uint8, as an image."""
    image = sitk.GetImageFromArray(plane.astype(np.float32))
    image.SetSpacing((PIXEL, PIXEL, BETWEEN))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="a dataset (default data)")
    dataset = load_dataset(parser.parse_args().data_dir)
    found: dict[float, list[float]] = {move: [] for move in MOVES}
    for patient in dataset.patients:
        volume, _ = dataset.volume(patient.name)
        fixed = image_of(volume[..., 1])
        for channel in (0, 2):
            if np.array_equal(volume[..., channel], volume[..., 1]):
                continue
            moving = image_of(volume[..., channel])
            for move in MOVES:
                found[move].append(
                    agreement(resample(moving, fixed, sitk.TranslationTransform(3, (move, 0.0, 0.0))), fixed)
                )
    for move, values in found.items():
        doubted = sum(value < POOR for value in values)
        print(
            f"moved by {move:g} mm: {doubted} of {len(values)} pairs doubted, agreement "
            f"{np.median(values):.2f} in the median"
        )


if __name__ == "__main__":
    run_script(main)
