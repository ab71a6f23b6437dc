"""The progress of a central run, the history of its epochs, and the settings with which an interrupted run
continues."""

import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path

from checkpoint import load_checkpoint
from common import MedFLError
from storage.files import atomic_write
from training import TrainingSettings

HISTORY = (
    "epoch",
    "step",
    "seconds",
    "learning_rate",
    "train_loss",
    "train_dice",
    "val_loss",
    "val_dice",
    "val_dice_median",
    "encoder",
)


@dataclass
class Progress:
    """How far a run is, saved after each epoch."""

    epoch: int = 0
    seconds: float = 0.0
    ending_seconds: float = (
        0.0  # that scoring and saving took after the last epoch: --minutes leaves room for the next
    )
    best: float = -1.0
    best_epoch: int = 0
    rows: list[dict] = field(default_factory=list)


def write_history(rows: list[dict], path: Path) -> None:
    """All epochs so far as CSV; whole or not at all, so that a kill leaves no half line."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, HISTORY)
        writer.writeheader()
        writer.writerows(rows)


def stored_settings(last: Path) -> TrainingSettings:
    """The settings of an interrupted run."""
    if not last.exists():
        raise MedFLError(f"there is no {last} to continue from; start without --resume")
    stored = dict(load_checkpoint(last).metadata["training"])
    if "encoder" not in stored:  # a file from before --encoder
        stored["encoder"] = "pretrained" if stored.get("pretrained") else "random"
    if "steps_done" not in stored:  # a file from before --steps, whose "steps" are those that were done
        stored = {**stored, "steps": None}
    return TrainingSettings(**{name: stored[name] for name in asdict(TrainingSettings()) if name in stored})
