"""The picture of a training: loss and Dice over the epochs."""

from pathlib import Path
from typing import TYPE_CHECKING

from borders import escaping
from storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by colour-blind readers (Okabe and Ito)


def draw_curves(rows: list[dict], path: Path, title: str) -> None:
    """Write a PNG of the history's rows: losses on the left, training and validation Dice on the right."""
    epochs = [row["epoch"] for row in rows]
    figure = new_figure((10, 4))
    loss, dice = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in rows], color=BLUE, marker=".", label="training: batches")
    loss.set(title="Loss", xlabel="epoch", ylabel="cross-entropy + (1 − soft Dice)")
    dice.plot(
        epochs,
        [row["train_dice"] for row in rows],
        color=BLUE,
        marker=".",
        label="training: soft Dice of batches",
    )
    judged = [row for row in rows if row.get("val_loss") is not None]
    if judged:
        loss.plot(
            [row["epoch"] for row in judged],
            [row["val_loss"] for row in judged],
            color=ORANGE,
            marker="s",
            markersize=4,
            linestyle="--",
            label="validation: whole volumes",
        )
        loss.legend(loc="upper right", frameon=False)
    scored = [row for row in rows if row["val_dice"] is not None]
    if scored:
        dice.plot(
            [row["epoch"] for row in scored],
            [row["val_dice"] for row in scored],
            color=ORANGE,
            marker="s",
            markersize=4,
            linestyle="--",
            label="validation: mean volume Dice",
        )
    dice.set(title="Dice", xlabel="epoch", ylim=(0, 1))
    dice.legend(loc="lower right", frameon=False)
    save_curves(figure, path, title)


def new_figure(size: tuple[float, float], dpi: int = 120, facecolor: str | None = None) -> "Figure":
    """A figure of this size in inches. matplotlib is imported here: it takes a second to load, and most programs draw
    nothing."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=dpi, layout="constrained", facecolor=facecolor)


def save_curves(figure: "Figure", path: Path, title: str) -> None:
    """Give a figure's plots over epochs or rounds their common look, and write it as a PNG."""
    for axes in figure.axes:
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(escaping.drawn(title))
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
