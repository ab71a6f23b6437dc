"""How often the app doubts real patients without reason, and how often it accepts pictures that show no brain.

    python benchmarks/plausibility_rates.py [--data-dir data]

Patients are divided 50 times at random: 70 % give the statistics that a model would carry, and 30 % are checked, as
whole volumes and as single slices. The other pictures are photographs and microscopy from scikit-learn and
scikit-image, other anatomy and other modalities from pydicom's test files, and noise. The benchmark counts the
sentences which say that a picture does not look like the training scans.
"""

import argparse
import warnings
from pathlib import Path
from typing import cast

import numpy as np
import pydicom
import pydicom.data
import skimage
from PIL import Image
from sklearn.datasets import load_sample_images

from appearance.doubts import SIDES, doubts
from common import run_script
from dataset import load_dataset

DRAWS = 50
EVERY = 4  # every fourth slice is also checked by itself
PICTURES = (".png", ".jpg")
ANATOMY = (
    "CT_small.dcm",
    "MR_small.dcm",
    "693_J2KI.dcm",
    "JPEG2000.dcm",
    "examples_overlay.dcm",
    "examples_palette.dcm",
    "J2K_pixelrep_mismatch.dcm",
    "liver_1frame.dcm",
    "examples_rgb_color.dcm",
    "examples_jpeg2k.dcm",
)


def strange(volume: np.ndarray, statistics: dict | None) -> bool:
    """Whether the page would say that this differs from the training scans: in words, or as blank or inverted."""
    return any(
        word in doubt
        for doubt in doubts(volume, statistics)
        for word in ("look like the", "same value", "inverted")
    )


def other_pictures() -> dict[str, np.ndarray]:
    """Pictures that are no brain MRI, (1, H, W, 3) uint8, by name."""
    found = {f"photograph {k}": image for k, image in enumerate(load_sample_images().images)}
    for path in sorted((Path(skimage.__file__).parent / "data").iterdir()):
        if path.suffix in PICTURES:
            found[path.name] = np.asarray(Image.open(path).convert("RGB"))
    for name in ANATOMY:
        stored = cast(str, pydicom.data.get_testdata_file(name, download=False))
        values = pydicom.dcmread(stored).pixel_array.astype(np.float64)
        low, high = np.percentile(values, [0.5, 99.5])
        pixels = ((values - low) / max(high - low, 1e-9) * 255).clip(0, 255).astype(np.uint8)
        found[name] = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    found["noise"] = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    return {name: pixels[None] for name, pixels in found.items() if min(pixels.shape[:2]) >= SIDES[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="a dataset (default data)")
    dataset = load_dataset(parser.parse_args().data_dir)
    warnings.simplefilter("ignore")  # from pydicom, about test files that are odd on purpose
    names, others, random = [p.name for p in dataset.patients], other_pictures(), np.random.default_rng(0)
    volumes, slices, missed = [], [], {name: 0 for name in others}
    for _ in range(DRAWS):
        order = random.permutation(names)
        cut = round(0.7 * len(order))
        statistics = dataset.image_statistics(tuple(order[:cut]))
        for name in order[cut:]:
            volume = dataset.volume(name)[0]
            volumes.append(strange(volume, statistics))
            slices += [strange(volume[k : k + 1], statistics) for k in range(0, len(volume), EVERY)]
        for name, picture in others.items():
            missed[name] += not strange(picture, statistics)
    print(
        f"{dataset.name}, {len(names)} patients, {DRAWS} draws: doubted without reason "
        f"{100 * np.mean(volumes):.1f} % of the volumes, {100 * np.mean(slices):.1f} % of the single slices"
    )
    believed = {name: count for name, count in missed.items() if count}
    print(
        f"{len(others)} other pictures: accepted in "
        f"{100 * sum(missed.values()) / (DRAWS * len(others)):.1f} % of the cases"
        + "".join(f"\n  {name}: in {count} of {DRAWS} draws" for name, count in believed.items())
    )


if __name__ == "__main__":
    run_script(main)
