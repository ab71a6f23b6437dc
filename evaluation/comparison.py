"""Several models on the same test patients: a table with a row per model and a column per hospital's test patients,
plus a column for all.

A row is a model, or a set of models. Each model of a set belongs to one hospital and is scored only on that
hospital's patients: its own training, a fine-tuned copy of the federation's model, or a model whose normalisation
layers stayed at the hospital.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from borders import escaping
from checkpoint import Checkpoint
from common import MedFLError, counted
from dataset import Dataset
from evaluation.alike import Made, made
from evaluation.curves import BLUE, ORANGE, new_figure
from evaluation.metrics import FIGURES_OF_A_PATIENT, NO_INTERVAL, mean_interval, paired_difference
from evaluation.scoring import score_patients
from partition import make_partition
from split import Split
from storage.files import atomic_write

ALL = "all"
FULL = "float32"  # default precision of a federation's messages
ALONE = "alone"  # models that a hospital trained by itself; they are also shown one by one
COLUMNS = (
    "model",
    "hospital",
    "patients",
    "dice_mean",
    "dice_low",
    "dice_high",
    "difference",
    "difference_low",
    "difference_high",
    "unlike",
)


@dataclass
class Row:
    """The name of a model or set, and the figures of its test patients (`metrics.score_patient`)."""

    name: str
    patients: list[dict]
    made: Made = field(default_factory=Made)


def kind_of(checkpoint: Checkpoint) -> str:
    """How a model was made, in a few words."""
    origin = checkpoint.metadata.get("origin", {})
    if origin.get("kind") == "federated":
        precision = checkpoint.metadata["training"].get("update_dtype", FULL)  # older files have none
        epsilon = origin.get("privacy", {}).get("epsilon")
        return (
            origin["strategy"]
            + (f", {precision}" if precision != FULL else "")
            + (f", ε = {epsilon:.3g}" if epsilon else "")
            + (", own normalisation" if origin.get("hospital") else "")
        )
    if origin.get("started_from"):
        return "fine-tuned from " + origin["started_from"]
    return ALONE if origin.get("kind") == "local" else "centralised"


def hospitals_of(checkpoints: list[Checkpoint], dataset: Dataset, split: Split) -> dict[str, tuple[str, ...]]:
    """The test patients of each hospital, by label, in the partition that the models record; empty if they record
    none.

    Raises MedFLError if they record different partitions.
    """
    told: dict[tuple, Path] = {}
    for checkpoint in checkpoints:
        about = {**checkpoint.metadata.get("training", {}), **checkpoint.metadata.get("origin", {})}
        if about.get("partition") not in (None, "own data"):
            told.setdefault((about["partition"], about["clients"], about["alpha"]), checkpoint.path)
    if len(told) > 1:
        raise MedFLError(
            f"{' and '.join(map(str, told.values()))} come from differently divided datasets; compare models of "
            "one partition"
        )
    if not told:
        return {}
    ((kind, clients, alpha),) = told
    partition = make_partition(dataset.table, split, kind, clients, alpha, split.seed)
    return {f"hospital-{k}": share.test for k, share in enumerate(partition.hospitals)}


def make_rows(
    checkpoints: list[Checkpoint],
    hospitals: dict[str, tuple[str, ...]],
    patients: list[str],
    score: Callable[[Checkpoint, list[str]], list[dict]],
) -> list[Row]:
    """A row per model, in order, and a row for each complete set of hospitals' own models, at the place of its last
    member.

    score: returns a model's figures on these patients. Members of a complete set have rows of their own only if each
    hospital trained by itself.
    """
    sets: dict[str, dict[str, Checkpoint]] = {}
    for checkpoint in checkpoints:
        if hospital := checkpoint.metadata.get("origin", {}).get("hospital"):
            members = sets.setdefault(kind_of(checkpoint), {})
            if hospital in members:
                raise MedFLError(
                    f"{members[hospital].path} and {checkpoint.path} are both {hospital} "
                    f"{kind_of(checkpoint)}, so the table could not tell them apart; compare one of them"
                )
            members[hospital] = checkpoint
    complete = {
        kind: members for kind, members in sets.items() if hospitals and members.keys() == hospitals.keys()
    }
    rows = []
    for checkpoint in checkpoints:
        kind, hospital = kind_of(checkpoint), checkpoint.metadata.get("origin", {}).get("hospital")
        if kind not in complete or kind == ALONE:
            name = f"{hospital} {kind}" if hospital else kind
            rows.append(Row(name, score(checkpoint, patients), made(checkpoint)))
        if kind in complete and checkpoint is list(complete[kind].values())[-1]:
            figures = [
                row
                for label, member in complete[kind].items()
                if hospitals[label]
                for row in score(member, list(hospitals[label]))
            ]
            rows.append(Row(f"each hospital {kind}", figures, made(checkpoint)))
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            raise MedFLError(
                f"two of the models are both {row.name}, so the table could not tell them apart; compare "
                f"one of them"
            )
    return rows


def compare(
    checkpoints: list[Checkpoint],
    dataset: Dataset,
    split: Split,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """The comparison on the split's test patients: `columns` (label to number of patients), and `rows`: name,
    `scores` by column (mean, ci95, patients; None without patients), `difference` to the first row
    (`metrics.paired_difference`), `made` (`Made`), `unlike` (how its making differs from the first row's),
    `patients`.

    say: called with a line about each model that is scored. Raises MedFLError if models can't be compared, or if no
    patient is kept for the test.
    """
    if not split.test:
        raise MedFLError(
            "the split keeps no patient for the test; compare models that were trained with a --test-fraction"
        )
    hospitals, known = hospitals_of(checkpoints, dataset, split), {}

    def score(checkpoint: Checkpoint, patients: list[str]) -> list[dict]:
        missing = [p for p in patients if (checkpoint.path, p) not in known]
        if missing:
            say(f"scoring {checkpoint.path}: {counted(len(missing), 'patient')}")
        for row in score_patients(checkpoint.model, dataset, missing, checkpoint.threshold):
            known[(checkpoint.path, row["patient"])] = {name: row[name] for name in FIGURES_OF_A_PATIENT}
        return [known[(checkpoint.path, p)] for p in patients]

    rows = make_rows(checkpoints, hospitals, list(split.test), score)
    return table_of(rows, {**hospitals, ALL: split.test})


def table_of(rows: list[Row], columns: dict[str, tuple[str, ...]]) -> dict:
    """The comparison's table as `compare` returns it, from scored rows. columns: patients by label."""
    first = rows[0].patients
    told: list[dict] = []
    for row in rows:
        scores: dict[str, dict | None] = {}
        for label, patients in columns.items():
            dice = [figures["dice"] for figures in row.patients if figures["patient"] in patients]
            scores[label] = None
            if dice:
                scores[label] = {
                    "mean": float(np.mean(dice)),
                    "ci95": mean_interval(dice),
                    "patients": len(dice),
                }
        difference = paired_difference(first, row.patients)
        told.append(
            {
                "name": row.name,
                "scores": scores,
                "difference": difference,
                "made": asdict(row.made),
                "unlike": row.made.unlike(rows[0].made),
                "patients": row.patients,
            }
        )
    return {"columns": {label: len(patients) for label, patients in columns.items()}, "rows": told}


def as_text(table: dict) -> str:
    """The table as lines for a terminal."""
    width = max(len(row["name"]) for row in table["rows"]) + 2
    head = "".join(f"{label + f' ({count})':>15}" for label, count in table["columns"].items())
    lines = [f"{'mean volume Dice':{width}}{head}{'95 % interval':>18}{'to the first row':>28}"]
    for place, row in enumerate(table["rows"]):
        cells = "".join(
            f"{'–' if score is None else format(score['mean'], '.3f'):>15}"
            for score in row["scores"].values()
        )
        interval, difference = row["scores"][ALL]["ci95"], row["difference"]
        between = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else NO_INTERVAL
        beside = (
            f" ({difference['ci95'][0]:+.3f} to {difference['ci95'][1]:+.3f})" if difference["ci95"] else ""
        )
        lines.append(
            f"{row['name']:{width}}{cells}{between:>18}"
            + (f"{difference['mean']:+.3f}{beside}".rjust(28) if place else f"{'':28}").rstrip()
        )
    unlike = [f"{row['name']}: {', '.join(row['unlike'])}" for row in table["rows"] if row["unlike"]]
    if unlike:
        lines += ["", "not made as the first row:", *unlike]
    return "\n".join(lines)


def lines_of(table: dict) -> list[list]:
    """The table as lines of `COLUMNS`, one per row and column. The difference appears only in the lines for all
    patients."""
    lines = []
    for row in table["rows"]:
        for label, score in row["scores"].items():
            if score:
                difference = row["difference"] if label == ALL else {"mean": None, "ci95": None}
                lines.append(
                    [
                        row["name"],
                        label,
                        score["patients"],
                        score["mean"],
                        *(score["ci95"] or (None, None)),
                        difference["mean"],
                        *(difference["ci95"] or (None, None)),
                        "; ".join(row["unlike"]),
                    ]
                )
    return lines


def draw_table(table: dict, path: Path, title: str) -> None:
    """Write a PNG: for each row, the mean over all test patients with its interval, and the hospitals' means as
    small marks."""
    rows = table["rows"]
    figure = new_figure((8, 1.6 + 0.42 * len(rows)), dpi=130)
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        mean, interval = row["scores"][ALL]["mean"], row["scores"][ALL]["ci95"]
        if interval:
            axes.plot(
                interval,
                [place, place],
                color=BLUE,
                linewidth=2.2,
                label="95 % interval" if not place else None,
            )
        axes.plot(
            [mean],
            [place],
            "o",
            color=BLUE,
            markersize=7,
            label="mean over all test patients" if not place else None,
        )
        others = [score["mean"] for label, score in row["scores"].items() if label != ALL and score]
        axes.plot(
            others,
            [place + 0.22] * len(others),
            "|",
            color=ORANGE,
            markersize=9,
            label="mean of each hospital" if not place and others else None,
        )
    axes.set_yticks(range(len(rows)), [escaping.drawn(row["name"]) for row in rows])
    axes.set(xlim=(0, 1), xlabel="mean volume Dice", ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.16 - 0.5 / len(rows)), ncols=3
    )
    figure.suptitle(escaping.drawn(title))
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
