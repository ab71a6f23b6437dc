"""A federation's history: a line per round and hospital, as CSV, as a table on the terminal and as curves.

Columns: round, site (the hospital's label), examples (training slices), train_loss (mean over the round),
val_dice (mean volume Dice of the model that the round began with, over the hospital's validation patients),
val_patients, seconds (of the hospital's own work), bytes_sent and bytes_received (the arrays' payload, seen
from the server), patient_epsilon (the epsilon that the hospital has spent for its patients, if it promised them
privacy), encoder (its initial weights). After the last round R the final model is scored: rows of round R + 1 have
no values in the training columns.
"""

from pathlib import Path
from typing import TypedDict

from borders import escaping
from common import counted
from evaluation.curves import new_figure, save_curves
from federation.server.judging import Scores, mean_dice
from storage.files import write_csv


class Row(TypedDict):
    """A line: a hospital's report of a round. None where it reported no such value."""

    round: int
    site: str
    examples: int | None
    train_loss: float | None
    val_dice: float | None
    val_patients: int
    seconds: float
    bytes_sent: int
    bytes_received: int
    patient_epsilon: float | None


COLUMNS = (*Row.__annotations__, "encoder")
MARKS = "os^Dv<>ph*"
NAMED = 12  # the most hospitals that a picture names one by one


def scores_of(rows: list[Row]) -> Scores:
    """The scores in a round's rows."""
    return {
        row["site"]: (row["val_dice"], row["val_patients"]) for row in rows if row["val_dice"] is not None
    }


def write_history(rows: list[Row], path: Path, encoder: str) -> None:
    """Write all rows so far; the file is written whole or not at all. encoder: its initial weights."""
    told = [{**row, "encoder": encoder} for row in rows]
    write_csv(path, [COLUMNS, *([row.get(name) for name in COLUMNS] for row in told)])


def table(rows: list[Row]) -> str:
    """A round's rows as lines of text."""

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    private = any(row.get("patient_epsilon") is not None for row in rows)
    head = f"  {'hospital':18}{'slices':>7}{'loss':>8}{'val Dice':>10}{'patients':>10}"
    head += f"{'seconds':>9}{'MB out':>8}{'MB in':>8}" + (f"{'epsilon':>10}" if private else "")
    lines = [head]
    for row in rows:
        lines.append(
            f"  {row['site']:18}{number(row['examples'], 0):>7}{number(row['train_loss'], 3):>8}"
            f"{number(row['val_dice'], 3):>10}{row['val_patients']:>10}{number(row['seconds'], 1):>9}"
            f"{row['bytes_sent'] / 1e6:>8.1f}{row['bytes_received'] / 1e6:>8.1f}"
            + f"{number(row.get('patient_epsilon'), 3):>10}"
            * private
        )
    return "\n".join(lines)


def draw_curves(rows: list[Row], path: Path, title: str) -> None:
    """Write a PNG: on the left the training loss, on the right the validation Dice of each hospital and their mean."""
    figure = new_figure((11, 4.2))
    loss, dice = figure.subplots(1, 2)
    sites = sorted({row["site"] for row in rows})
    for number, site in enumerate(sites):
        mark = {
            "marker": MARKS[number % len(MARKS)],
            "markersize": 4,
            "linewidth": 1,
            "label": escaping.drawn(site),
        }
        if len(sites) > NAMED:
            mark = {
                "color": "0.7",
                "linewidth": 0.6,
                "label": "" if number else counted(len(sites), "hospital"),
            }
        mine = [row for row in rows if row["site"] == site]
        losses = [(row["round"], row["train_loss"]) for row in mine if row["train_loss"] is not None]
        # of the model before the round
        scores = [(row["round"] - 1, row["val_dice"]) for row in mine if row["val_dice"] is not None]
        for axes, points in ((loss, losses), (dice, scores)):
            axes.plot(*zip(*points), **mark) if points else axes.plot([], [], **mark)
    by_round = {
        number: [row for row in rows if row["round"] == number]
        for number in sorted({row["round"] for row in rows})
    }
    mean = [
        (number - 1, value)
        for number, of in by_round.items()
        if (value := mean_dice(scores_of(of))[0]) is not None
    ]
    if mean:
        dice.plot(*zip(*mean), color="black", linewidth=2.2, label="mean over patients")
    loss.set(title="Training loss at the hospitals", xlabel="round", ylabel="cross-entropy + (1 − soft Dice)")
    dice.set(title="Validation: mean volume Dice of the round's model", xlabel="after round", ylim=(0, 1))
    dice.legend(loc="lower right", frameon=False, fontsize=8)
    save_curves(figure, path, title)
