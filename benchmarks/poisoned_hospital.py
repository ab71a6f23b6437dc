"""What one hostile hospital of five does to the model, against each defence, and how unlike honest ones are.

    python benchmarks/poisoned_hospital.py --data-dir data/phantoms --rounds 16 [--plot docs/poisoned.png]
    python benchmarks/poisoned_hospital.py --data-dir data --partition site --clients 4 --image-size 128 --rounds 12 --seed 1

Hospitals of one process, on the same shares, weights and order of slices each time: all honest; the last of them sends its
update turned round and five times as long, averaged plainly (FedAvg), screened (FedAvg behind federation/screening.py, with
the server's defaults), and met with the robust strategies alone, where the hospitals are enough for them. The score is the
mean volume Dice over the validation and test patients, whom nobody trains on. Lengths (in medians) and cosines are those that
the screening compares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse  # noqa: E402
import logging  # noqa: E402
from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from batches import TrainingBatches  # noqa: E402
from checkpoint import THRESHOLD  # noqa: E402
from common import MedFLError, run_script  # noqa: E402
from dataset import Dataset, load_dataset  # noqa: E402
from federation.aggregation import Aggregator  # noqa: E402
from federation.screening import Update, changes, cosines, lengths, outliers  # noqa: E402
from federation.settings import FederationSettings  # noqa: E402
from federation.weights import pack, statistics_mask, unpack  # noqa: E402
from partition import KINDS, make_partition  # noqa: E402
from split import make_split  # noqa: E402
from training import Learner, TrainingSettings, rate_scale, score_patients  # noqa: E402
from transunet import TransUNet  # noqa: E402

FACTOR = -5.0  # of the hostile update
CASES = {  # strategy, whether one is hostile, whether updates are screened
    "all honest": ("fedavg", False, False),
    "one hostile, averaged plainly": ("fedavg", True, False),
    "one hostile, screened": ("fedavg", True, True),
    "one hostile, median": ("fedmedian", True, False),
    "one hostile, trimmed mean": ("fedtrimmedavg", True, False),
    "one hostile, Krum": ("krum", True, False),
}
STYLES = ("-", ":", "--", "-.", (0, (5, 1)), (0, (1, 3)))


def train(model: TransUNet, dataset: Dataset, patients: tuple[str, ...], settings: TrainingSettings, hospital: int, number: int,
          rounds: int) -> int:
    """One round's work of a hospital, in place; its training slices."""
    learner = Learner(model, replace(settings, ema_decay=0.0), torch.device("cpu"))
    batches = TrainingBatches(dataset, patients, settings.image_size, settings.batch_size, settings.seed * 1_000 + hospital)

    def before_step(step: int) -> bool:
        done = number - 1 + step / len(batches)
        learner.set_rate(rate_scale(done / rounds, int(done * len(batches)), settings.warmup_steps))
        return True

    learner.train_epoch(batches.epoch(number), before_step, None)
    return batches.slices


def federate(dataset: Dataset, case: str, settings: TrainingSettings, federation: FederationSettings) -> list[float]:
    """The Dice after each round."""
    _, hostile, screened = CASES[case]
    split = make_split({p.name: p.site for p in dataset.patients}, settings.seed, federation.val_fraction, federation.test_fraction)
    partition = make_partition(dataset.table, split, federation.partition, federation.clients, federation.alpha, settings.seed)
    torch.manual_seed(settings.seed)
    model = TransUNet(settings.model, settings.image_size, settings.norm)
    like, weights, scores = model.state_dict(), pack(model.state_dict()), []
    aggregator = Aggregator(federation, statistics_mask(model))
    for number in range(1, federation.rounds + 1):
        updates = []
        for hospital, share in enumerate(partition.hospitals):
            model.load_state_dict(unpack(weights, like))
            slices = train(model, dataset, share.train, settings, hospital, number, federation.rounds)
            after = pack(model.state_dict())
            if hostile and hospital == federation.clients - 1:
                after = weights + FACTOR * (after - weights)
            updates.append(Update(f"hospital-{hospital}", after, slices))
        changed = changes(updates, weights)
        longest, lowest = max(lengths(changed).values()), min(cosines(changed).values())
        left_out = outliers(updates, weights, federation) if screened else {}
        weights = aggregator(number, [update for update in updates if update.label not in left_out], weights)
        model.load_state_dict(unpack(weights, like))
        finite = bool(torch.isfinite(weights).all())
        rows = score_patients(model, dataset, split.val + split.test, THRESHOLD) if finite else [{"dice": 0.0}]
        scores.append(float(np.mean([row["dice"] for row in rows])))
        why = "".join(f"; {label} left out: {reason}" for label, reason in left_out.items())
        print(f"{case}, round {number}: Dice {scores[-1]:.3f}; longest {longest:.1f}, lowest cosine {lowest:.2f}{why}", flush=True)
    return scores


def draw(scores: dict[str, list[float]], data: str, path: Path) -> None:
    """Write a PNG of the Dice over the rounds."""
    figure = Figure(figsize=(7.5, 4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for (case, values), style in zip(scores.items(), STYLES):
        axes.plot(range(1, len(values) + 1), values, linestyle=style, label=case, linewidth=2)
    axes.set(xlabel="round", ylabel=f"mean volume Dice ({data})", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, ncols=2, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/phantoms"), help="a dataset (default data/phantoms)")
    parser.add_argument("--rounds", type=int, default=16, help="rounds (default 16)")
    parser.add_argument("--image-size", type=int, default=64, help="side of the network's input in pixels (default 64)")
    parser.add_argument("--partition", default="iid", choices=KINDS, help="how the dataset is divided (default iid)")
    parser.add_argument("--clients", type=int, default=5, help="hospitals (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order (default 0)")
    parser.add_argument("--plot", type=Path, help="draw the Dice over the rounds into this PNG")
    arguments = parser.parse_args()
    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = 1  # Flower makes messages only inside of a run
    dataset = load_dataset(arguments.data_dir)
    settings = TrainingSettings(image_size=arguments.image_size, seed=arguments.seed)
    federation = FederationSettings(clients=arguments.clients, rounds=arguments.rounds, partition=arguments.partition)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # a line a round
    scores = {}
    for case, (strategy, _, _) in CASES.items():
        try:
            scores[case] = federate(dataset, case, settings, replace(federation, strategy=strategy))
        except MedFLError as error:  # too few hospitals for it
            print(f"{case}: {error}")
    for case, values in scores.items():
        print(f"{case:32}{values[-1]:.3f} after {len(values)} rounds, {max(values):.3f} at best")
    if arguments.plot:
        draw(scores, dataset.name, arguments.plot)


if __name__ == "__main__":
    run_script(main)
