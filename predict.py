"""Segment slices: any TIFF, PNG or JPEG files, or folders of them.

    python predict.py patient_folder slice.png --checkpoint models/transunet_centralized_best.pth --out predictions

Writes <name>_mask.png (0 or 255, the slice's own size) per slice and predictions.csv (file, patient, slice,
tumour_pixels, tumour_share). Slices of one patient's name in one folder form a volume and are normalised
together, as in the evaluation; a file without a slice number is a volume of its own, and a lone slice is
segmented less surely. `*_mask.*` files are ignored.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoint import load_checkpoint
from common import ROOT, MedFLError, atomic_write, run_script
from deployment.app.card import find_checkpoints
from inference import choose_device, predict_volume, to_mask
from preprocessing import group_volumes, is_image, is_mask, read_volume, slice_number

COLUMNS = ("file", "patient", "slice", "tumour_pixels", "tumour_share")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="IN",
        help="slices, or folders of slices (also in sub-folders)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="the model, a .pth file (default: the newest *_best.pth in models/, else the phantoms' one)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="folder for the masks (default predictions)"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also write <name>_probability.png, 255 is certain"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    return parser.parse_args()


def find_slices(inputs: list[Path], out: Path) -> list[Path]:
    """The slices that files and folders name, each once, what an earlier run wrote to `out` left aside.

    Raises MedFLError for what isn't there or is no picture, and where nothing is left.
    """
    files = []
    for given in inputs:
        if given.is_dir():
            pictures = [f for f in sorted(given.rglob("*")) if f.is_file() and is_image(f)]
            below = given.resolve() in out.resolve().parents
            files += [f for f in pictures if not (below and f.resolve().is_relative_to(out.resolve()))]
        elif not given.exists():
            raise MedFLError(f"there is no {given}; check the name")
        elif is_image(given):
            files.append(given)
        elif not is_mask(given):
            raise MedFLError(f"{given} is no TIFF, PNG or JPEG; convert it first")
    if not files:
        raise MedFLError(
            "there is no slice in what was named (TIFF, PNG or JPEG, masks are ignored); name other files"
        )
    return list(dict.fromkeys(files))


def output_names(files: list[Path]) -> dict[Path, str]:
    """A name for each slice's outputs: its own, with the folder's before it where two slices share one."""
    counts = Counter(file.stem for file in files)
    names = {f: f.stem if counts[f.stem] == 1 else f"{f.parent.name}_{f.stem}_{f.suffix[1:]}" for f in files}
    if len(set(names.values())) != len(names):
        raise MedFLError("two slices would be written to one file; predict their folders one after the other")
    return names


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """(H, W) uint8 as a grey PNG."""
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def main() -> None:
    arguments = parse()
    files = find_slices(arguments.inputs, arguments.out)
    if arguments.out.resolve() in {file.parent.resolve() for file in files}:
        raise MedFLError(
            f"{arguments.out} holds slices, and masks could take the place of others there; choose another "
            f"--out"
        )
    names = output_names(files)
    path = arguments.checkpoint or find_checkpoints(ROOT / "models")[0]
    checkpoint = load_checkpoint(path, choose_device(arguments.device))
    if arguments.checkpoint is None:
        print(f"with {path}, trained on {checkpoint.metadata.get('data', {}).get('name', 'unknown data')}")
    rows: list[dict] = []
    for patient, slices in tqdm(group_volumes(files), desc="segmenting", unit="volume", disable=None):
        probabilities = predict_volume(checkpoint.model, read_volume(slices))
        for file, probability in zip(slices, probabilities):
            mask = to_mask(probability, checkpoint.threshold)
            write_picture(mask, arguments.out / f"{names[file]}_mask.png")
            if arguments.probabilities:
                write_picture(
                    (probability * 255).round().astype(np.uint8),
                    arguments.out / f"{names[file]}_probability.png",
                )
            tumour = int(np.count_nonzero(mask))
            rows.append(dict(zip(COLUMNS, (file, patient, slice_number(file), tumour, tumour / mask.size))))
    with atomic_write(arguments.out / "predictions.csv", "w") as table:
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(
        f"{len(rows)} slices segmented, tumour in {sum(row['tumour_pixels'] > 0 for row in rows)}; wrote "
        f"{arguments.out}"
    )


if __name__ == "__main__":
    run_script(main)
