"""What one hostile hospital does to the model, attack by attack, behind the server's defences and without
them.

    python benchmarks/poisoned_hospital.py --data-dir data/forty --init models/transunet_centralized_best.pth
    python benchmarks/poisoned_hospital.py --data-dir data --partition site --clients 4 --attacks none

Hospitals of one process, with the product's own round loop and training. First all are honest, for --warm-up
rounds; from the model that they have then, each attack goes on for --rounds rounds, in every one of them, and
the result is compared with that of honest hospitals over the same rounds. The attackers know the rules and
all honest updates of the round. The score is the mean volume Dice over the test patients, whom nobody trains
on, of the model that the run ends with.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.local_federation import LocalHospital, run
from checkpoint import THRESHOLD, load_start
from common import run_script
from dataset import Dataset, load_dataset
from evaluation.scoring import score_patients
from federation.protocol.messages import message, read
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import from_record, pack, statistics_mask, to_record, unpack, variance_mask
from partition import KINDS
from split import make_split
from training import TrainingSettings
from transunet import TransUNet

UNDEFENDED = {
    "max_update_norm_ratio": 1e9,
    "cut_update_norm_ratio": 1e9,
    "min_update_cosine": -1.0,
    "max_weight_ratio": 1e9,
}


@dataclass
class Round:
    """What an attacker knows in a round: the model that was sent, its own honest change, and those of all
    others, (n,) float32."""

    own: torch.Tensor
    others: list[torch.Tensor]
    is_statistic: torch.Tensor
    variances: torch.Tensor
    sent: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        return torch.stack(self.others).mean(dim=0)

    def allowed(self, change: torch.Tensor) -> torch.Tensor:
        """The change with variances that stay above 0, so that it is not refused for them."""
        return torch.where(self.variances, torch.maximum(change, 1e-6 - self.sent), change)

    def long(self, change: torch.Tensor, times: float) -> torch.Tensor:
        """The change, its trained weights as long as so many medians of the others'."""
        trained = ~self.is_statistic
        median = torch.stack([one[trained].norm() for one in self.others]).median()
        change = change.clone()
        change[trained] *= times * median / change[trained].norm().clamp(min=1e-12)
        return change


def turned(now: Round) -> torch.Tensor:
    """Trained weights turned round, five times as long, with honest statistics."""
    return torch.where(now.is_statistic, now.own, -5 * now.own)


def inside_the_length(now: Round) -> torch.Tensor:
    """Against the others, just inside the length at which an update is left out."""
    return torch.where(now.is_statistic, now.own, now.long(-now.mean, 9.5))


def above_the_cosine(now: Round) -> torch.Tensor:
    """As far against the others as the cosine's bound lets, as long as nothing is cut."""
    trained = ~now.is_statistic
    way = now.mean[trained] / now.mean[trained].norm()
    across = now.own[trained] - (now.own[trained] @ way) * way
    change = now.own.clone()
    change[trained] = -0.45 * way + 0.89 * across / across.norm()
    return now.long(change, 2.0)


def a_little(now: Round) -> torch.Tensor:
    """A little is enough (Baruch et al. 2019, arXiv:1902.06156): the others' mean less a deviation, value by
    value."""
    others = torch.stack(now.others)
    return torch.where(now.is_statistic, now.own, others.mean(dim=0) - others.std(dim=0))


def replaced(now: Round) -> torch.Tensor:
    """Model replacement (Bagdasaryan et al. 2020, arXiv:1807.00459): so long that the mean of all becomes the
    opposite."""
    return now.allowed(-(len(now.others) + 1) * 2 * now.mean)


def variances(now: Round) -> torch.Tensor:
    """Statistics moved 9.5 times as far as they should, honest weights; variances stay above 0."""
    return now.allowed(torch.where(now.is_statistic, 9.5 * now.own, now.own))


def below_zero(now: Round) -> torch.Tensor:
    """Three running variances far below 0, all else honest."""
    change, places = now.own.clone(), now.variances.nonzero().flatten()
    least = places[now.sent[places].argsort()[:3]]
    change[least] = -9 * now.sent[least] - 0.05
    return change


def times(factor: float) -> Callable[[Round], torch.Tensor]:
    """Its own change, so many times as long."""
    return lambda now: now.allowed(factor * now.own)


def empty(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return image, np.zeros_like(mask)


def flipped(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return image, 255 - mask


def back_door(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A bright square in a corner, and the whole slice a tumour where it is."""
    side = image.shape[0] // 8
    image = image.copy()
    image[:side, :side] = 255
    return image, np.full_like(mask, 255)


@dataclass(frozen=True)
class Attack:
    """change: what becomes of the update; slices: what the hostile hospital trains on; claims: how many times
    its slices it counts."""

    name: str
    change: Callable[[Round], torch.Tensor] | None = None
    slices: Callable | None = None
    claims: int = 1


ATTACKS = {
    "turned": Attack("weights turned round, times 5, honest statistics", turned),
    "length": Attack("against the others, just inside the length", inside_the_length),
    "cosine": Attack("just above the cosine's bound", above_the_cosine),
    "little": Attack("a little is enough", a_little),
    "back-door": Attack("a back door, times 5", times(5), back_door),
    "empty": Attack("empty masks, times 9.5", times(9.5), empty),
    "variances": Attack("statistics times 9.5", variances),
    "below-zero": Attack("three running variances below 0", below_zero),
    "flips": Attack("flipped labels and 100 times the slices", None, flipped, 100),
    "replaced": Attack("model replacement", replaced),
}


class Hostile:
    """Changes what the last hospital answers; others: the honest updates of the round, as they pass."""

    def __init__(self, attack: Attack, model: TransUNet):
        self.attack = attack
        self.others: dict[str, torch.Tensor] = {}
        self.sent: torch.Tensor  # from the first honest answer on
        self.is_statistic, self.variances = statistics_mask(model), variance_mask(model)

    def watch(self, label: str) -> Callable[[Message, Message], Message]:
        """Keep a hospital's honest change."""

        def change(incoming: Message, reply: Message) -> Message:
            if "round" in read(incoming.content) and reply.content.get("arrays") is not None:
                self.sent = from_record(incoming.content["arrays"])
                self.others[label] = from_record(reply.content["arrays"]) - self.sent
            return reply

        return change

    def spoil(self, incoming: Message, reply: Message) -> Message:
        """What the hostile hospital answers instead."""
        told = read(reply.content)
        if "parts" in told:
            told["parts"]["train"]["slices"] *= self.attack.claims
            return Message(message(told), reply_to=incoming)
        if "round" not in told or reply.content.get("arrays") is None:
            return reply
        told["examples"] *= self.attack.claims
        weights = from_record(reply.content["arrays"])
        if self.attack.change:
            now = Round(
                weights - self.sent, list(self.others.values()), self.is_statistic, self.variances, self.sent
            )
            weights = self.sent + self.attack.change(now)
        return Message(message(told, to_record(weights)), reply_to=incoming)


def spoiled_copy(dataset: Dataset, how: Callable, out: Path) -> Path:
    """The dataset with other slices and masks."""
    for patient in dataset.patients:
        (out / patient.name).mkdir(parents=True)
        for number, (image, mask) in enumerate(zip(*dataset.volume(patient.name)), 1):
            for name, pixels in zip(
                (f"{patient.name}_{number}.png", f"{patient.name}_{number}_mask.png"), how(image, mask)
            ):
                Image.fromarray(pixels).save(out / patient.name / name)
    return out


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
        self.model = TransUNet(training.model, training.image_size, training.norm)

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
        """Weights at the end, the hospitals' mean validation Dice after each round, and what the audit log
        says of the attack."""
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
    """Write a PNG of the Dice over the rounds."""
    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(curves.items()):
        style = (
            {"color": "black", "linewidth": 2.5}
            if name == "all honest"
            else {"linestyle": ("-", "--", ":", "-.")[number % 4]}
        )
        axes.plot(range(1, len(values) + 1), values, label=name, **style)
    axes.set(xlabel="round of the attack", ylabel=f"mean validation Dice ({data})", ylim=(0, 1))
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, ncols=2, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
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
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order (default 0)")
    parser.add_argument(
        "--attacks", nargs="+", default=list(ATTACKS), choices=[*ATTACKS, "none"], help="which (default all)"
    )
    parser.add_argument(
        "--undefended", action="store_true", help="also without screening, cut and weights' bound"
    )
    parser.add_argument("--plot", type=Path, help="draw the Dice over the rounds into this PNG")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dataset = load_dataset(arguments.data_dir)
    training = TrainingSettings(
        image_size=arguments.image_size, seed=arguments.seed, norm=arguments.norm, precision="float32"
    )
    settings = FederationSettings(
        clients=arguments.clients, partition=arguments.partition, round_timeout=3_600.0, val_fraction=0.25
    )
    curves: dict[str, list[float]] = {}
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="medfl-poison-") as folder:
        bench = Bench(dataset, training, settings, Path(folder))
        if arguments.init:
            start = pack(
                load_start(
                    arguments.init, training.model, training.image_size, training.norm
                ).model.state_dict()
            )
            print(f"start, {arguments.init.name}: Dice {bench.score(start):.3f}", flush=True)
        else:
            start, _, unlike = bench.federate("start", None, arguments.warm_up, None)
            print(
                f"start, after {arguments.warm_up} honest rounds: Dice {bench.score(start):.3f}; left out "
                f"or taken back: {unlike}",
                flush=True,
            )
        attacks = [ATTACKS[name] for name in arguments.attacks if name != "none"]
        cases: list[tuple[str, Attack | None, dict | None]] = [
            ("all honest", None, None),
            *((attack.name, attack, None) for attack in attacks),
        ]
        if arguments.undefended:
            cases += [(f"{attack.name}, undefended", attack, UNDEFENDED) for _, attack, _ in cases if attack]
        for name, attack, bounds in cases:
            weights, curves[name], events = bench.federate(name, attack, arguments.rounds, start, bounds)
            honest = figures["all honest"]["dice"] if figures else None
            dice = bench.score(weights) if bool(torch.isfinite(weights).all()) else 0.0
            figures[name] = {
                "dice": dice,
                "of honest": dice / honest if honest else 1.0,
                "left out": sum(event["event"] == "left_out" for event in events),
                "collapses": sum(event["event"] == "collapse" for event in events),
            }
            print(
                f"{name:55} {json.dumps({key: round(value, 3) for key, value in figures[name].items()})}",
                flush=True,
            )
    if arguments.plot:
        draw(curves, dataset.name, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
