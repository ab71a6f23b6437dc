"""What makes a federation learn as well as one central model? Compares variants of its recipe after the same passes
over the same patients.

    python benchmarks/federated_recipe.py --data-dir data --rounds 30 --seeds 1 --out models/recipe
    python benchmarks/federated_recipe.py --data-dir data --rounds 60 --seeds 1 2 3 --variants default --out models/60

Half of the patients are for training, at four hospitals by site, and half for the test. There are no validation
patients, so each run ends with its last averaged model. A variant is a name and options of run_server.py. The central
model is that of train_centralized.py after as many epochs as there are rounds; a hospital alone is the same with only
its own patients. Federations run in one process, with the product's round loop and hospitals. A finished run is not
repeated. Writes a JSON for each run into --out, and prints mean and median volume Dice over the test patients, its
ratio to the central model's mean, and the paired difference to the central model.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.local_federation import LocalHospital, run
from checkpoint import THRESHOLD, load_checkpoint
from common import run_script
from dataset import Dataset, load_dataset
from evaluation.comparison import ALL, Row, draw_table, table_of
from evaluation.metrics import paired_difference, summarise
from evaluation.scoring import score_patients
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import unpack
from runs.usage import choose_device
from split import make_split
from storage.files import write_json
from training import TrainingSettings
from transunet import TransUNet

TEST = 0.5  # of the patients
# options of the federation, and of the training; --batch-size is of all four hospitals together
BEFORE = {"lr_factor": 1.0, "batch_size": 64}
VARIANTS: dict[str, dict] = {
    "central": {},
    "moments reset, 16 slices each": {**BEFORE, "moments": "reset"},
    "moments kept, 16 slices each": BEFORE,
    "the same, server momentum 0.6": {**BEFORE, "strategy": "fedavgm", "server_momentum": 0.6},
    "the same, twice the rate": {"batch_size": 64},
    "moments kept, 8 slices each": {**BEFORE, "batch_size": 32},
    "moments kept, 4 slices each": {**BEFORE, "batch_size": 16},
    "default": {},
    "default, moments reset": {"moments": "reset"},
    "default, GroupNorm": {"norm": "group"},
    "default, 20 steps a round": {"local_steps": 20},
    "default, server momentum 0.6": {"strategy": "fedavgm", "server_momentum": 0.6},
    **{f"hospital-{cid} alone": {"cid": cid} for cid in range(4)},
}
OF_TRAINING = ("batch_size", "norm")


def federated(
    dataset: Dataset, options: dict, rounds: int, seed: int, side: int, folder: Path, device: str
) -> TransUNet:
    """The last model of a federation of four hospitals by site."""
    training = TrainingSettings(
        encoder="random",
        image_size=side,
        seed=seed,
        **{name: options[name] for name in OF_TRAINING if name in options},
    )
    settings = FederationSettings(
        clients=4,
        rounds=rounds,
        val_fraction=0.0,
        test_fraction=TEST,
        round_timeout=1e6,
        **{name: value for name, value in options.items() if name not in OF_TRAINING},
    )
    hospitals = [LocalHospital(folder, cid, dataset.root, device=device) for cid in range(4)]
    with contextlib.redirect_stdout(io.StringIO()):  # the hospitals' output
        state, _ = run(
            hospitals,
            training,
            settings,
            folder,
            say=lambda line: print(line.splitlines()[0], file=sys.stderr),
        )
    state.model.load_state_dict(unpack(state.final_weights, state.model.state_dict()))
    return state.model


def central(
    dataset: Dataset, options: dict, rounds: int, seed: int, side: int, folder: Path, device: str
) -> TransUNet:
    """The model of one training in one place, on all patients or on those of the hospital options["cid"]."""
    script = Path(__file__).parent.parent / "train_centralized.py"
    own = ["--partition", "site", "--clients", "4", "--cid", str(options["cid"])] if options else []
    subprocess.run(
        [
            sys.executable,
            str(script),
            "--overwrite",
            "--data-dir",
            str(dataset.root),
            "--out",
            str(folder),
            "--encoder",
            "random",
            "--epochs",
            str(rounds),
            "--seed",
            str(seed),
            "--image-size",
            str(side),
            "--val-fraction",
            "0",
            "--test-fraction",
            str(TEST),
            "--device",
            device,
            *own,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return load_checkpoint(folder / f"transunet_{'local' if own else 'centralized'}_best.pth").model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="a dataset (default data)")
    parser.add_argument(
        "--out", type=Path, default=Path("models/recipe"), help="folder for results (default models/recipe)"
    )
    parser.add_argument("--rounds", type=int, default=30, help="rounds of one epoch, and epochs (default 30)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="seeds of split, weights and order (default 1)"
    )
    parser.add_argument(
        "--image-size", type=int, default=64, help="side of the network's input in pixels (default 64)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="variants to run in addition to the central model",
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps (default cpu)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--plot", type=Path, help="draw the means with their intervals into this PNG")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dataset = load_dataset(arguments.data_dir)
    found: dict[str, list[dict]] = {}
    for name in dict.fromkeys(["central", *arguments.variants]):
        for seed in arguments.seeds:
            folder = arguments.out / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
            scores = folder / "scores.json"
            if not scores.exists():
                began = time.monotonic()
                make = central if name == "central" or name.endswith("alone") else federated
                options, rounds, side = VARIANTS[name], arguments.rounds, arguments.image_size
                model = make(dataset, options, rounds, seed, side, folder, arguments.device)
                split = make_split({p.name: p.site for p in dataset.patients}, seed, 0.0, TEST)
                model.to(choose_device(arguments.device))
                rows = score_patients(model, dataset, split.test, THRESHOLD)
                write_json(
                    scores,
                    {"seconds": round(time.monotonic() - began, 1), "options": VARIANTS[name], "rows": rows},
                )
            # a patient in the test of several seeds counts once for each
            found.setdefault(name, []).extend(
                {**row, "patient": f"{row['patient']} {seed}"}
                for row in json.loads(scores.read_text(encoding="utf-8"))["rows"]
            )
        dice, whole = (
            summarise(found[name])["volume_dice"],
            summarise(found["central"])["volume_dice"]["mean"],
        )
        against = paired_difference(found["central"], found[name])
        print(
            f"{name:34} mean {dice['mean']:.3f}  median {dice['median']:.3f}  {dice['mean'] / whole:.3f} of "
            f"central  paired "
            f"{against['mean']:+.3f} ({against['ci95'][0]:+.3f} to {against['ci95'][1]:+.3f})",
            flush=True,
        )
    if arguments.plot:
        patients = tuple(row["patient"] for row in found["central"])
        lines = [Row(name.replace("default", "federated"), scored) for name, scored in found.items()]
        table = table_of(lines, {ALL: patients})
        seeds = ", ".join(map(str, arguments.seeds))
        title = f"{dataset.name}, 4 hospitals by site, {arguments.rounds} rounds or epochs, seeds {seeds}"
        draw_table(table, arguments.plot, title)


if __name__ == "__main__":
    run_script(main)
