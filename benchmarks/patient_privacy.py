"""Can a hospital promise its patients differential privacy (DP-SGD), and still train? Dice against epsilon.

    python data/make_phantoms.py --patients 100 --slices 8 --size 64 --out data/many
    python benchmarks/patient_privacy.py --data-dir data/many [--epsilons inf 1e4 1000 100 8] [--steps 300]
    python benchmarks/patient_privacy.py --data-dir data/many --init MODEL --last-layers

DP-SGD (Abadi et al. 2016, arXiv:1607.00133) whose unit is the patient: each takes part in a step with a fixed chance; the
gradient over eight of its slices is cut to --clip; noise is added to their sum. With GroupNorm, because BatchNorm mixes
patients. Not an option of run_client.py yet: SECURITY.md says what came of the trial.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse  # noqa: E402
import math  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, rdp  # noqa: E402
from dp_accounting.mechanism_calibration import calibrate_dp_mechanism  # noqa: E402
from tqdm import tqdm  # noqa: E402

from batches import TrainingBatches  # noqa: E402
from checkpoint import THRESHOLD, load_start  # noqa: E402
from common import run_script  # noqa: E402
from dataset import load_dataset  # noqa: E402
from split import make_split  # noqa: E402
from training import rate_scale, score_patients, segmentation_loss  # noqa: E402
from transunet import TransUNet  # noqa: E402

SLICES = 8  # of a patient in a step
LAST_LAYERS = ("head.", "decoder.2")


def noise_for(epsilon: float, delta: float, chance: float, steps: int) -> float:
    """The least noise, in clips, with which so many steps spend no more than epsilon; 0 for no bound."""
    if math.isinf(epsilon):
        return 0.0

    def all_steps(multiplier: float) -> SelfComposedDpEvent:
        return SelfComposedDpEvent(PoissonSampledDpEvent(chance, GaussianDpEvent(multiplier)), steps)

    return float(calibrate_dp_mechanism(rdp.RdpAccountant, all_steps, epsilon, delta))


def train(model: TransUNet, weights: list[torch.Tensor], batches: list[TrainingBatches], noise: float,
          arguments: argparse.Namespace, title: str) -> None:
    """Train these weights of the model by DP-SGD over the patients' batches."""
    random = np.random.default_rng(arguments.seed)
    optimiser = torch.optim.Adam(weights, lr=arguments.lr)
    expected = arguments.chance * len(batches)
    model.train()
    for step in tqdm(range(arguments.steps), desc=title, unit="step", leave=False, disable=None):
        total = [torch.zeros_like(weight) for weight in weights]
        for patient in np.flatnonzero(random.random(len(batches)) < arguments.chance):
            images, masks = next(batches[patient].epoch(step + 1))
            loss, _ = segmentation_loss(model(images), masks)
            gradients = torch.autograd.grad(loss, weights)
            length = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
            for one, gradient in zip(total, gradients):
                one.add_(gradient, alpha=min(1.0, arguments.clip / max(length, 1e-12)))
        for weight, one in zip(weights, total):
            weight.grad = (one + torch.randn_like(one) * noise * arguments.clip) / expected
        for group in optimiser.param_groups:
            group["lr"] = arguments.lr * rate_scale(step / arguments.steps, step, arguments.steps // 20)
        optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/many"), help="a dataset (default data/many)")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[math.inf, 1e4, 1000, 100, 8], help="bounds to try")
    parser.add_argument("--steps", type=int, default=300, help="steps (default 300)")
    parser.add_argument("--chance", type=float, default=0.2, help="of a patient to be in a step (default 0.2)")
    parser.add_argument("--clip", type=float, default=0.5, help="length of a patient's gradient (default 0.5)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 1e-3)")
    parser.add_argument("--delta", type=float, default=1e-3, help="of the bound (default 1e-3)")
    parser.add_argument("--init", type=Path, help="a model to start from, trained on others with --norm group")
    parser.add_argument("--last-layers", action="store_true", help="train the head and the decoder's last stage alone")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order (default 0)")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data_dir)
    split = make_split({p.name: p.site for p in dataset.patients}, arguments.seed, val_fraction=0.0)
    batches = [TrainingBatches(dataset, (patient,), 64, SLICES, arguments.seed) for patient in split.train]
    print(f"{dataset.name}: {len(batches)} patients to train on, {arguments.steps} steps, each patient in {arguments.chance:g} of "
          f"them; scored on {len(split.test)}; delta {arguments.delta:g}")
    for epsilon in arguments.epsilons:
        torch.manual_seed(arguments.seed)
        model = load_start(arguments.init, "tiny", 64, "group").model if arguments.init else TransUNet("tiny", 64, "group")
        weights = [p for name, p in model.named_parameters() if not arguments.last_layers or name.startswith(LAST_LAYERS)]
        noise = noise_for(epsilon, arguments.delta, arguments.chance, arguments.steps)
        if epsilon == arguments.epsilons[0] and arguments.init:
            print(f"the model to start from: Dice {dice_of(model, dataset, split.test):.3f}")
        train(model, weights, batches, noise, arguments, f"epsilon {epsilon:g}")
        values = sum(weight.numel() for weight in weights)
        ratio = noise * math.sqrt(values) / (arguments.chance * len(batches))
        print(f"epsilon {epsilon:g}: noise {noise:.2f} clips on {values:,} weights, {ratio:.3g} times the longest mean gradient; "
              f"Dice {dice_of(model, dataset, split.test):.3f}", flush=True)


def dice_of(model: TransUNet, dataset, patients: tuple[str, ...]) -> float:
    """Mean volume Dice."""
    return float(np.mean([row["dice"] for row in score_patients(model, dataset, patients, THRESHOLD)]))


if __name__ == "__main__":
    run_script(main)
