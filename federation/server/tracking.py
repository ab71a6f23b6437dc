"""Curves, settings and models for TensorBoard and MLflow; both are optional and local by default."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from federation.server.events import Listener
from federation.server.history import Row
from runs.tracking import Tracker, open_trackers

if TYPE_CHECKING:
    from federation.server.rounds import Federation


class RoundTracker:
    """Gives a run's tracker each round's figures, and at the end the model and the curves."""

    def __init__(self, federation: "Federation", tracker: Tracker, out: Path):
        self.federation, self.tracker, self.out = federation, tracker, out

    def __call__(self, event: str, about: dict) -> None:
        """Process an event."""
        state = self.federation.state
        if event == "start":
            self.tracker.settings({**vars(state.training), **vars(state.federation)})
        if event in ("round", "end"):
            number = state.progress.round + (event == "end")
            self.tracker.scalars(_figures([r for r in state.progress.rows if r["round"] == number]), number)
        if event == "end":
            with contextlib.suppress(FileNotFoundError):
                self.tracker.picture("curves", self.out / "federated_curves.png")
            if state.best.exists():
                self.tracker.model(state.best)
            self.tracker.close()


def _figures(rows: list[Row]) -> dict[str, float]:
    """A round's figures by name."""
    return {
        f"{name}/{row['site']}": float(value)
        for row in rows
        for name in ("train_loss", "val_dice", "patient_epsilon")
        if isinstance(value := row.get(name), int | float)
    }


def trackers(
    federation: "Federation", out: Path, tensorboard: bool, mlflow: str | None, resume: bool
) -> list[Listener]:
    """The listeners for the trackers that were asked for."""
    return [RoundTracker(federation, one, out) for one in open_trackers(out, tensorboard, mlflow, resume)]
