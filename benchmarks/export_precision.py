"""The cost of half precision in the exported weights: masks and Dice of both exports on the patients of a folder.

    python benchmarks/export_precision.py --checkpoint models/transunet_centralized_best.pth --data-dir data

Each patient's slices go through the graph with weights in single and in half precision (onnxruntime, on the
CPU). It prints how many mask pixels differ, and how the volume Dice differs.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from tqdm import tqdm

from checkpoint import load_checkpoint
from common import run_script
from dataset import load_dataset
from deployment.export_onnx import export
from evaluation.metrics import counts, dice
from inference import BLOCK, to_mask


def masks(session: onnxruntime.InferenceSession, volume: np.ndarray, threshold: float) -> np.ndarray:
    """The mask of a volume (S, H, W, 3) uint8, block by block: (S, H, W) uint8, 0 or 255."""
    blocks = []
    for first in range(0, len(volume), BLOCK):
        count = min(BLOCK, len(volume) - first)
        feeds = {"volume": volume, "first": np.array(first), "count": np.array(count)}
        blocks.append(session.run(["probability"], feeds)[0])
    return to_mask(np.concatenate(blocks), threshold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model, a .pth file")
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of patients")
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.checkpoint)
    files = [export(checkpoint, half)[0] for half in (False, True)]
    sessions = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files]
    dataset = load_dataset(arguments.data_dir)
    different, pixels, scores = 0, 0, []
    for patient in tqdm(dataset.patients, unit=" patients"):
        volume, truth = dataset.volume(patient.name)
        single, half = (masks(session, np.array(volume), checkpoint.threshold) for session in sessions)
        different, pixels = different + int(np.count_nonzero(single != half)), pixels + single.size
        scores.append([dice(*counts(mask, truth)) for mask in (single, half)])
    apart = np.diff(scores)[:, 0]
    print(f"size: {len(files[0]) / 1e6:.1f} MB single, {len(files[1]) / 1e6:.1f} MB half")
    print(f"masks: {different} of {pixels:,} pixels differ, {1e4 * different / pixels:.3f} in 10,000")
    print(
        f"volume Dice of {len(scores)} patients: {np.mean(scores, axis=0)[0]:.5f} single, half differs by "
        f"{apart.mean():+.1e} on average and by at most {np.abs(apart).max():.1e}"
    )


if __name__ == "__main__":
    run_script(main)
