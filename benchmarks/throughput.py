"""Measure training on this machine: images per second compared with a U-Net, memory, and the input pipeline's share of
a step.

    python benchmarks/throughput.py [--data-dir data/phantoms] [--side 256] [--batch-size 16] [--steps 5]

The U-Net is that of segmentation_models_pytorch with a ResNet-34, random weights and plain float32; ours is `tiny`
with its defaults. Both do the same step in turn, so that a noisy machine affects both, and medians are compared.
Only forward, backward and the optimiser's step are measured; augmentation is timed separately.
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch

from batches import TrainingBatches
from common import run_script
from dataset import load_dataset
from training import Learner, TrainingSettings, segmentation_loss
from transunet import TransUNet


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def unet_step(images: torch.Tensor, masks: torch.Tensor):
    """A function that trains smp's U-Net by one step on this batch."""
    import segmentation_models_pytorch as smp  # after transunet, which lets torchvision load

    unet = smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=1).train()
    optimiser = torch.optim.AdamW(unet.parameters(), 1e-3)

    def step() -> None:
        optimiser.zero_grad()
        segmentation_loss(unet(images), masks)[0].backward()
        optimiser.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/phantoms"), help="a dataset (default data/phantoms)"
    )
    parser.add_argument("--side", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="slices (default 16)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (default 5)")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data_dir)
    patients = tuple(p.name for p in dataset.patients)
    settings = TrainingSettings(image_size=arguments.side, batch_size=arguments.batch_size)
    batches = TrainingBatches(dataset, patients, arguments.side, arguments.batch_size, seed=0)
    for _ in batches.epoch(1):  # the first pass reads the cache from disk
        pass
    learner = Learner(TransUNet("tiny", arguments.side), settings, torch.device("cpu"))
    source = batches.epoch(2)
    batch = next(source)
    learner.train_epoch([batch])  # warm-up
    inputs = [seconds(lambda: next(source)) for _ in range(min(arguments.steps, len(batches) - 1))]
    alone = [seconds(lambda: learner.train_epoch([batch])) for _ in range(arguments.steps)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    step = unet_step(*batch)
    step()
    pairs = [(seconds(lambda: learner.train_epoch([batch])), seconds(step)) for _ in range(arguments.steps)]
    ours, theirs = (arguments.batch_size / statistics.median(times) for times in zip(*pairs))
    share = statistics.median(inputs) / (statistics.median(inputs) + statistics.median(alone))
    print(
        f"tiny at {arguments.side} pixels, batch {arguments.batch_size}, {str(learner.precision)[6:]}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"  {ours:.1f} images/s against {theirs:.1f} of the U-Net: {ours / theirs:.2f} times")
    print(f"  input pipeline {100 * share:.1f} % of a step after the first pass")
    print(f"  peak memory of the process before the U-Net was made: {memory:.2f} GiB")


if __name__ == "__main__":
    run_script(main)
