"""The cost of privacy of patients: Dice of a federation whose hospitals train by DP-SGD, over epsilon.

    python data/make_phantoms.py --patients 100 --slices 8 --size 64 --out data/many
    python data/make_phantoms.py --patients 12 --slices 8 --size 64 --seed 7 --out data/others
    python train_centralized.py --data-dir data/others --norm group --image-size 64 --steps 250 --out models/others
    python benchmarks/patient_privacy.py --data-dir data/many --init models/others/transunet_centralized_best.pth
    python benchmarks/patient_privacy.py --data-dir data/many --all-weights --rounds 60

The hospitals' own code runs in this process, without Flower. FedAvg runs over --hospitals hospitals, among which the
patients are divided at random. The score is on patients that nobody trained on. An epsilon of 1e9 is the same training
with almost no noise.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import THRESHOLD, load_start
from common import __version__, run_script
from dataset import load_dataset
from evaluation.scoring import score_patients
from federation.hospital.hospital import Hospital
from federation.hospital.identity import Identity
from federation.privacy import patients as patient_privacy
from federation.protocol.answers import PatientPrivacy
from federation.protocol.requests import Train
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack, unpack
from split import make_split
from training import TrainingSettings
from transunet import TransUNet


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/many"), help="a dataset (default data/many)"
    )
    parser.add_argument(
        "--init", type=Path, help="a model to begin with, trained on others with --norm group"
    )
    parser.add_argument(
        "--all-weights", action="store_true", help="train all weights, not only the last layers"
    )
    parser.add_argument("--hospitals", type=int, default=2, help="hospitals (default 2)")
    parser.add_argument("--rounds", type=int, default=12, help="rounds (default 12)")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1e9, 100, 8, 1], help="bounds to try")
    parser.add_argument("--delta", type=float, default=1e-3, help="delta of the bound (default 1e-3)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (default 3e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order (default 0)")
    return parser.parse_args()


def start(arguments: argparse.Namespace) -> TransUNet:
    """The model that a federation begins with."""
    torch.manual_seed(arguments.seed)
    return (
        load_start(arguments.init, "tiny", 64, "group").model
        if arguments.init
        else TransUNet("tiny", 64, "group")
    )


def federate(arguments: argparse.Namespace, epsilon: float, folder: Path) -> tuple[TransUNet, list[Hospital]]:
    """The last model of a federation, and its hospitals."""
    settings = FederationSettings(
        clients=arguments.hospitals, rounds=arguments.rounds, partition="iid", val_fraction=0.0
    )
    training = TrainingSettings(image_size=64, norm="group", lr=arguments.lr, seed=arguments.seed)
    people = [
        Identity(
            label=f"hospital-{cid}",
            cid=cid,
            data=arguments.data_dir,
            device="cpu",
            medfl=__version__,
            models=folder,
            code="",
            patient_privacy=PatientPrivacy(epsilon=epsilon, delta=arguments.delta),
        )
        for cid in range(arguments.hospitals)
    ]
    hospitals = [Hospital(who, training, settings, folder / "model.pt") for who in people]
    model = start(arguments)
    for number in tqdm(
        range(1, arguments.rounds + 1), desc=f"epsilon {epsilon:g}", unit="round", leave=False, disable=None
    ):
        sent, examples = pack(model.state_dict()), 0
        total = torch.zeros_like(sent, dtype=torch.float64)
        for hospital in hospitals:
            model.load_state_dict(unpack(sent, model.state_dict()))
            work, weights = hospital.train(
                model,
                Train(
                    settings="",
                    run="trial",
                    without=[],
                    round=number,
                    rate=None,
                    seconds=1e8,
                    partition=hospital.data.partition_sha256,
                ),
            )
            total, examples = total + work.examples * weights.double(), examples + work.examples
        model.load_state_dict(unpack((total / examples).float(), model.state_dict()))
    return model, hospitals


def main() -> None:
    arguments = parse()
    if arguments.all_weights:
        patient_privacy.TRAINED = ("",)
    dataset = load_dataset(arguments.data_dir)
    test = make_split({p.name: p.site for p in dataset.patients}, arguments.seed, val_fraction=0.0).test

    def dice(model: TransUNet) -> float:
        return float(np.mean([row["dice"] for row in score_patients(model, dataset, test, THRESHOLD)]))

    model = start(arguments)
    values = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith(patient_privacy.TRAINED)
    )
    print(
        f"{dataset.name}: {len(test)} patients to score on; {values:,} weights are trained, in "
        f"{arguments.rounds} rounds of "
        f"{patient_privacy.STEPS} steps; delta {arguments.delta:g}; before it Dice {dice(model):.3f}"
    )
    for epsilon in arguments.epsilons:
        with tempfile.TemporaryDirectory(prefix="medfl-trial-") as folder:
            model, hospitals = federate(arguments, epsilon, Path(folder))
        counts = ", ".join(str(len(hospital.data.split.train)) for hospital in hospitals)
        budget = hospitals[0].budget
        assert budget is not None  # every hospital here has made a promise
        print(
            f"epsilon {epsilon:g} at hospitals of {counts} patients: {budget.spent:.3g} spent, noise "
            f"{budget.done[0].multiplier:.3g} clips; Dice {dice(model):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    run_script(main)
