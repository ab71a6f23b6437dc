"""Electricity by network, precision, encoder and place of training, on the same data and after the same passes.

    python benchmarks/energy_table.py --data-dir data/phantoms --out models/energy

Each variant is trained by the product's scripts, and what they use is measured as `--energy` does it (runs/energy.py):
the whole script, start and scoring included. Prints for each: watt hours of the run; watt hours until the validation
Dice first reached --target (all of a pretraining, and of the training the share of its seconds); test Dice; and test
Dice per watt hour. Where a machine has no counter the watt hours are a range, and only their ratios mean something: the
range is the same factor in every row.
"""

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, MedFLError, run_script
from runs.energy import NAME, Meter, read_records, summed
from storage.files import write_json

CENTRAL = ("train_centralized.py", "--overwrite")


@dataclass(frozen=True)
class Variant:
    """Options of the training; pretrained: whether the encoder first learns from the slices without masks, which
    counts; hospitals: of a simulated federation, 0 for one place."""

    name: str
    options: tuple[str, ...] = ()
    pretrained: bool = False
    hospitals: int = 0


VARIANTS = (
    Variant("mini", ("--model", "mini")),
    Variant("tiny (default)"),
    Variant("tiny, encoder pretrained here", pretrained=True),
    Variant("tiny in bfloat16", ("--precision", "bfloat16")),
    Variant("tiny at two hospitals", hospitals=2),
    Variant("small", ("--model", "small")),
    Variant("base", ("--model", "base")),
)


def script(*command: object) -> None:
    """Run one of the repository's scripts. Raises MedFLError where it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / str(command[0])), *map(str, command[1:])], capture_output=True, text=True
    )
    if done.returncode:
        raise MedFLError(
            f"{command[0]} failed ({done.stderr.strip().splitlines()[-1:]}); mend that and start again"
        )


def train(variant: Variant, arguments: argparse.Namespace, out: Path) -> tuple[dict, list[float]]:
    """Train a variant into `out`; what it used, and the kWh of its pretraining in it."""
    meter, before = Meter(variant.name), [0.0, 0.0]
    settings = ("--image-size", arguments.image_size, *variant.options)
    data = ("--data-dir", arguments.data_dir)
    encoder: object = "random"
    if variant.pretrained:
        encoder = out / "encoder.safetensors"
        script(
            "pretrain.py",
            *data,
            "--image-size",
            arguments.image_size,
            "--epochs",
            arguments.pretraining_epochs,
            "--out",
            encoder,
        )
        before = meter.record()["kwh"]
    if variant.hospitals:
        federation = ("--simulate", variant.hospitals, "--rounds", arguments.epochs, "--energy")
        script(
            "run_server.py", "--overwrite", *federation, *data, *settings, "--encoder", encoder, "--out", out
        )
        # Ray's workers are not this process's children, so their time is only in what the hospitals report
        return summed(read_records(out / NAME)), before
    script(*CENTRAL, "--epochs", arguments.epochs, *data, *settings, "--encoder", encoder, "--out", out)
    return meter.record(), before


def share_to(target: float, history: Path) -> float | None:
    """The share of a run's seconds after which the validation Dice was at the target, None where it never was."""
    seconds, reached = 0.0, None
    with open(history, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if "site" in rows[0]:  # a federation's: a round's rows tell how good the model before it was
        rounds = sorted({int(row["round"]) for row in rows})
        scores = {
            k: [float(row["val_dice"]) for row in rows if int(row["round"]) == k and row["val_dice"]]
            for k in rounds
        }
        for number in rounds:
            if scores[number] and sum(scores[number]) / len(scores[number]) >= target:
                return (number - 1) / (rounds[-1] - 1)
        return None
    for row in rows:
        seconds = float(row["seconds"])
        if reached is None and row["val_dice"] and float(row["val_dice"]) >= target:
            reached = seconds
    return None if reached is None else reached / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/phantoms"), help="a dataset (default data/phantoms)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("models/energy"), help="folder for results (default models/energy)"
    )
    parser.add_argument("--epochs", type=int, default=16, help="passes, and rounds (default 16)")
    parser.add_argument(
        "--pretraining-epochs", type=int, default=50, help="passes without masks (default 50)"
    )
    parser.add_argument("--image-size", type=int, default=64, help="side of the network's input (default 64)")
    parser.add_argument("--target", type=float, default=0.5, help="validation Dice to reach (default 0.5)")
    parser.add_argument(
        "--variants", nargs="+", default=[one.name for one in VARIANTS], help="which (default all)"
    )
    arguments = parser.parse_args()
    rows = []
    print(f"{'variant':32}{'Wh':>16}{'Wh to the target':>18}{'test Dice':>11}{'Dice per Wh':>16}")
    for variant in (one for one in VARIANTS if one.name in arguments.variants):
        out = arguments.out / variant.name.replace(" ", "_").replace(",", "")
        out.mkdir(parents=True, exist_ok=True)
        used, before = train(variant, arguments, out)
        kind = "federated" if variant.hospitals else "centralized"
        scored = out / "scores.json"
        script(
            "evaluate.py",
            "--checkpoint",
            out / f"transunet_{kind}_best.pth",
            "--data-dir",
            arguments.data_dir,
            "--json",
            scored,
        )
        dice = json.loads(scored.read_text(encoding="utf-8"))["volume_dice"]["mean"]
        share = share_to(arguments.target, out / f"{kind}_history.csv")
        hours = [1_000 * kwh for kwh in used["kwh"]]
        first = [1_000 * kwh for kwh in before]
        reached = (
            "not reached"
            if share is None
            else between([one + share * (whole - one) for one, whole in zip(first, hours)])
        )
        print(
            f"{variant.name:32}{between(hours):>16}{reached:>18}{dice:>11.3f}"
            f"{between([dice / value for value in reversed(hours)]):>16}",
            flush=True,
        )
        rows.append(
            {
                "variant": variant.name,
                "wh": hours,
                "wh_before": first,
                "share_to_target": share,
                "dice": dice,
                **used,
            }
        )
    write_json(arguments.out / "energy_table.json", rows)
    print(f"method: {rows[0]['method']}")


def between(values: list[float]) -> str:
    """A range, or one value where both ends are the same."""
    low, high = (f"{value:.3g}" for value in values)
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    run_script(main)
