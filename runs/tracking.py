"""TensorBoard and MLflow, both optional: settings, curves, pictures and the model of a run.

Nothing is sent anywhere unless an MLflow server's address is given.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from common import MedFLError, tell

SQLITE = "sqlite:///"
MLFLOW = {  # for what the environment leaves open
    # with MLflow's own values, a run would wait four minutes for a server that is away, and much longer for one that
    # hangs
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # else it refuses a folder, and --mlflow without an address names one
}


class Tracker(Protocol):
    """Something that tracks a run."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """Keep the settings."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Keep figures of an epoch or a round."""

    def picture(self, name: str, path: Path) -> None:
        """Keep a picture from a file."""

    def model(self, path: Path) -> None:
        """Keep a checkpoint."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in `folder`, for `tensorboard --logdir`. resume: whether the run there goes on; else its figures are
    no longer drawn, which would be one zigzag with those of the new run."""

    def __init__(self, folder: Path, resume: bool):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=None if resume else 0)

    def settings(self, values: Mapping[str, Any]) -> None:
        lines = "\n".join(f"    {name} = {value}" for name, value in sorted(values.items()))
        self.writer.add_text("settings", lines)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, name: str, path: Path) -> None:
        with Image.open(path) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), dataformats="HWC")

    def model(self, path: Path) -> None:
        self.writer.add_text("model", path.name)

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """A run at an MLflow tracking address: a folder, a database or a server."""

    def __init__(self, address: str):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # of its makers, asked for at the import
        for name, value in MLFLOW.items():
            os.environ.setdefault(name, value)
        import mlflow

        mlflow.set_tracking_uri(address)
        mlflow.set_experiment("medfl")
        self.mlflow = mlflow
        self.run = mlflow.start_run()

    def settings(self, values: Mapping[str, Any]) -> None:
        self.mlflow.log_params({name: str(value)[:200] for name, value in values.items()})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def picture(self, name: str, path: Path) -> None:
        self.mlflow.log_artifact(str(path), "pictures")

    def model(self, path: Path) -> None:
        self.mlflow.log_artifact(str(path), "model")

    def close(self) -> None:
        self.mlflow.end_run()


class Aside:
    """A tracker that can't end a run: what it does not take (its server is away, its disk is full) is left out. The
    first time, that is said."""

    def __init__(self, tracker: Tracker):
        self.tracker, self._said = tracker, False

    def settings(self, values: Mapping[str, Any]) -> None:
        self._hand_over(self.tracker.settings, values)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._hand_over(self.tracker.scalars, values, step)

    def picture(self, name: str, path: Path) -> None:
        self._hand_over(self.tracker.picture, name, path)

    def model(self, path: Path) -> None:
        self._hand_over(self.tracker.model, path)

    def close(self) -> None:
        self._hand_over(self.tracker.close)

    def _hand_over(self, take: Callable[..., None], *values: Any) -> None:
        try:
            take(*values)
        except Exception as error:  # each tracker raises many kinds
            if not self._said:
                tell([f"{type(self.tracker).__name__} could not keep all ({_cause(error)}); the run goes on"])
            self._said = True


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def add_tracking(parser: argparse.ArgumentParser) -> None:
    """Add the options of both trackers."""
    parser.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard's files into --out/tensorboard"
    )
    parser.add_argument(
        "--mlflow",
        nargs="?",
        const="local",
        type=mlflow_address,
        metavar="URI",
        help="track the run with MLflow at this address, or in --out/mlruns if none is given",
    )


def mlflow_address(text: str) -> str:
    """An address as MLflow takes it. A file or folder is relative to where the script was started, in every
    process."""
    if text == "local":
        return text
    if text.startswith(SQLITE) and not text.startswith(f"{SQLITE}/"):
        return SQLITE + Path(text.removeprefix(SQLITE)).resolve().as_posix()
    return text if len(urlsplit(text).scheme) > 1 else Path(text).resolve().as_uri()


def check_installed(tensorboard: bool, mlflow: str | None) -> None:
    """Raises MedFLError if a requested tracker is not installed."""
    for asked, package in ((tensorboard, "tensorboard"), (mlflow, "mlflow")):
        if asked and importlib.util.find_spec(package) is None:
            raise MedFLError(
                f"--{package} needs {package}, which is not installed; run `pip install -r requirements.txt -r "
                "requirements-tracking.txt`"
            )


def open_trackers(out: Path, tensorboard: bool, mlflow: str | None, resume: bool = False) -> list[Tracker]:
    """The requested trackers. mlflow: an address; "local" is a folder in `out`. resume: whether they go on with the run
    in `out`. Raises MedFLError where one can't be used from the start."""
    opened: list[Tracker] = []
    try:
        if tensorboard:
            opened.append(Aside(TensorBoard(out / "tensorboard", resume)))
        if mlflow:
            address = (out / "mlruns").resolve().as_uri() if mlflow == "local" else mlflow
            opened.append(Aside(MLflow(address)))
    except Exception as error:  # each tracker raises many kinds
        option = "mlflow" if opened or not tensorboard else "tensorboard"
        raise MedFLError(
            f"--{option} can't be used ({_cause(error)}); check the address and that its server runs, or leave the "
            "option out"
        ) from error
    return opened
