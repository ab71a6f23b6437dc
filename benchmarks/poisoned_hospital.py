"""The effect of one hostile hospital on the model, attack by attack, with the server's defences and without
them.

    python benchmarks/poisoned_hospital.py --data-dir data/forty --init models/transunet_centralized_best.pth
    python benchmarks/poisoned_hospital.py --data-dir data --partition site --clients 4 --attacks none

The hospitals run in one process, with the product's own round loop and training. First all are honest for --warm-up
rounds. From that model on, each attack runs in every one of --rounds rounds, and the result is compared with that of
honest hospitals over the same rounds. The attackers know the rules and all honest updates of the round. The score is
the mean volume Dice of the run's last model over the test patients, whom nobody trains on.
"""

import argparse
import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.attacks import ATTACKS, UNDEFENDED, Attack, Hostile, spoiled_copy
from benchmarks.local_federation import LocalHospital, run
from checkpoint import THRESHOLD, load_start
from common import run_script
from dataset import Dataset, load_dataset
from evaluation.scoring import score_patients
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack, unpack
from partition import KINDS
from split import make_split
from training import TrainingSettings

HONEST, WITHOUT = "all honest", ", undefended"  # names of rows
LINES = ("-", "--", ":", "-.")


class Bench:
    """The federations of this benchmark, and their scores."""

    def __init__(
        self, dataset: Dataset, training: TrainingSettings, settings: FederationSettings, folder: Path
    ):
        self.dataset, self.training, self.settings, self.folder = dataset, training, settings, folder
        self.split = make_split(
            {p.name: p.site for p in dataset.patients},
            training.seed,
            settings.val_fraction,
            settings.test_fraction,
        )
        self.model = training.network()

    def score(self, weights: torch.Tensor) -> float:
        """Mean volume Dice over the test patients."""
        self.model.load_state_dict(unpack(weights, self.model.state_dict()))
        return float(
            np.mean(
                [row["dice"] for row in score_patients(self.model, self.dataset, self.split.test, THRESHOLD)]
            )
        )

    def federate(
        self,
        name: str,
        attack: Attack | None,
        rounds: int,
        start: torch.Tensor | None,
        bounds: dict | None = None,
    ) -> tuple[torch.Tensor, list[float], list[dict]]:
        """Weights at the end, the hospitals' mean validation Dice after each round, and the audit log's entries about
        the attack."""
        out = self.folder / name.replace(" ", "-")
        hostile = Hostile(attack, self.model) if attack else None
        data = (
            spoiled_copy(self.dataset, attack.slices, out / "data")
            if attack and attack.slices
            else self.dataset.root
        )
        last = self.settings.clients - 1
        hospitals = [
            LocalHospital(
                out,
                cid,
                data if cid == last else self.dataset.root,
                None if hostile is None else hostile.spoil if cid == last else hostile.watch(str(cid)),
            )
            for cid in range(last + 1)
        ]
        settings = replace(self.settings, rounds=rounds, **(bounds or {}))
        lines: list[str] = []
        state, events = run(hospitals, self.training, settings, out, start, lines.append)
        rows = [
            row
            for row in state.progress.rows
            if row["val_dice"] is not None and row["site"] != f"hospital-{last}"
        ]
        curve = [
            float(np.mean([row["val_dice"] for row in rows if row["round"] == number]))
            for number in range(2, rounds + 2)
        ]
        return (
            state.final_weights,
            curve,
            [event for event in events if event["event"] in ("left_out", "collapse")],
        )


def draw(curves: dict[str, list[float]], data: str, path: Path) -> None:
    """Write a PNG of the Dice over the rounds: with the defences, and without them if that was asked for."""
    kinds = {"with the defences": {n: c for n, c in curves.items() if not n.endswith(WITHOUT)}}
    if len(kinds["with the defences"]) < len(curves):
        without = {n.removesuffix(WITHOUT): c for n, c in curves.items() if n.endswith(WITHOUT)}
        kinds["without screening, cut and bound"] = {HONEST: curves[HONEST], **without}
    figure = Figure(figsize=(4.5 * len(kinds) + 0.5, 5.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, (title, shown) in zip(panels, kinds.items()):
        for number, (name, values) in enumerate(shown.items()):
            style = (
                {"color": "black", "linewidth": 2.5}
                if name == HONEST
                else {"linestyle": LINES[number % len(LINES)]}
            )
            axes.plot(range(1, len(values) + 1), values, label=name, **style)
        axes.set(title=title, xlabel="round of the attack", ylim=(0, 1))
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"mean validation Dice ({data})")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", frameon=False, ncols=len(kinds), fontsize=7)
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/phantoms"), help="a dataset (default data/phantoms)"
    )
    parser.add_argument(
        "--warm-up", type=int, default=12, help="honest rounds before the attack (default 12)"
    )
    parser.add_argument(
        "--init", type=Path, help="begin the attacks from this checkpoint, instead of honest rounds"
    )
    parser.add_argument("--rounds", type=int, default=8, help="rounds of the attack (default 8)")
    parser.add_argument(
        "--image-size", type=int, default=64, help="side of the network's input in pixels (default 64)"
    )
    parser.add_argument(
        "--norm", default="batch", choices=("batch", "group"), help="normalisation (default batch)"
    )
    parser.add_argument(
        "--partition", default="iid", choices=KINDS, help="how the dataset is divided (default iid)"
    )
    parser.add_argument("--clients", type=int, default=5, help="hospitals (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order (default 0)")
    parser.add_argument(
        "--attacks",
        nargs="+",
        default=list(ATTACKS),
        choices=[*ATTACKS, "none"],
        help="the attacks (default all)",
    )
    parser.add_argument(
        "--undefended", action="store_true", help="also run without screening, cut and the bound on weights"
    )
    parser.add_argument("--plot", type=Path, help="draw the Dice over the rounds into this PNG")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    return parser.parse_args()


def begin(bench: Bench, arguments: argparse.Namespace) -> torch.Tensor:
    """The weights that the attacks begin with: those of a checkpoint, or those after honest rounds."""
    if arguments.init:
        training = bench.training
        model = load_start(arguments.init, training.model, training.image_size, training.norm).model
        start = pack(model.state_dict())
        print(f"start, {arguments.init.name}: Dice {bench.score(start):.3f}", flush=True)
        return start
    start, _, unlike = bench.federate("start", None, arguments.warm_up, None)
    print(
        f"start, after {arguments.warm_up} honest rounds: Dice {bench.score(start):.3f}; left out "
        f"or taken back: {unlike}",
        flush=True,
    )
    return start


def main() -> None:
    arguments = parse()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dataset = load_dataset(arguments.data_dir)
    training = TrainingSettings(
        image_size=arguments.image_size, seed=arguments.seed, norm=arguments.norm, precision="float32"
    )
    settings = FederationSettings(
        clients=arguments.clients, partition=arguments.partition, round_timeout=3_600.0, val_fraction=0.25
    )
    attacks = [ATTACKS[name] for name in arguments.attacks if name != "none"]
    cases: list[tuple[str, Attack | None, dict | None]] = [
        (HONEST, None, None),
        *((attack.name, attack, None) for attack in attacks),
    ]
    if arguments.undefended:
        cases += [(f"{attack.name}{WITHOUT}", attack, UNDEFENDED) for attack in attacks]
    curves: dict[str, list[float]] = {}
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="medfl-poison-") as folder:
        bench = Bench(dataset, training, settings, Path(folder))
        start = begin(bench, arguments)
        for name, attack, bounds in cases:
            weights, curves[name], events = bench.federate(name, attack, arguments.rounds, start, bounds)
            honest = figures[HONEST]["dice"] if figures else None
            dice = bench.score(weights) if bool(torch.isfinite(weights).all()) else 0.0
            figures[name] = {
                "dice": dice,
                "of honest": dice / honest if honest else 1.0,
                "left out": sum(event["event"] == "left_out" for event in events),
                "collapses": sum(event["event"] == "collapse" for event in events),
            }
            told = {key: round(value, 3) for key, value in figures[name].items()}
            print(f"{name:55} {json.dumps(told)}", flush=True)
    if arguments.plot:
        draw(curves, dataset.name, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
