"""Save, load and describe a model: weights and metadata in one file that `torch.load(weights_only=True)`
reads."""

import json
import math
import pickle
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import nn

import preprocessing
from borders.limits import MAX_NETWORK_SIDE, read_json
from common import MedFLError, __version__, counted, git_commit, utc_now
from storage.files import atomic_write, file_sha256
from storage.torch_file import DAMAGED, read_torch_file, refuse_pointer
from tasks import LGG, MOST_CLASSES, Task
from transunet import TransUNet

FORMAT = 1
THRESHOLD = 0.5  # of the probability, unless the metadata says otherwise


class Plan(BaseModel, strict=True):
    """The architecture that a file names for its network."""

    name: Annotated[str, Field(max_length=64)]
    image_side: Annotated[int, Field(ge=1, le=MAX_NETWORK_SIDE)]
    norm: Annotated[str, Field(max_length=64)]
    classes: Annotated[int, Field(ge=1, le=MOST_CLASSES)] = 1  # older files don't say it

    def network(self) -> TransUNet:
        """A network of this architecture."""
        return TransUNet(self.name, self.image_side, self.norm, classes=self.classes)


class Data(BaseModel, strict=True):
    """A checkpoint's entry about the patients that it was trained on."""

    name: str = ""
    train: dict[str, Any] = {}


class Told(BaseModel, strict=True):
    """The entries of a checkpoint's metadata that are checked before the file is used; others are for readers."""

    format: int
    architecture: Plan
    preprocessing: dict[str, Any]
    threshold: Annotated[float, Field(ge=0, le=1)]
    origin: dict[str, Any] = {}
    training: dict[str, Any] = {}
    data: Data = Data()
    scores: dict[str, dict[str, Any] | None] | None = None


@dataclass
class Checkpoint:
    """A loaded file: the network in evaluation mode, its metadata, and the state from which a run continues (None
    if not stored)."""

    path: Path
    model: TransUNet
    metadata: dict
    state: dict | None

    @property
    def threshold(self) -> float:
        return float(self.metadata["threshold"])

    @property
    def task(self) -> Task:
        """The task: what the model outlines, and in which channels."""
        try:
            return Task(**self.metadata["task"])
        except (KeyError, TypeError, ValueError):  # it has none, or somebody changed the file
            return LGG

    @property
    def labels(self) -> dict[str, int]:
        """The value of each class in a mask, by name, the first of its labels; empty for a region as a whole."""
        if self.model.classes == 1:
            return {}
        named = {one.name: one.labels[0] for one in self.task.classes}
        if len(named) != self.model.classes:  # somebody changed the file
            return {f"class {number}": number for number in range(1, self.model.classes + 1)}
        return named

    @property
    def shrunk_otherwise(self) -> bool:
        """Whether it was trained on slices that were shrunk without antialiasing; its figures then differ a little."""
        return _was_shrunk_otherwise(self.metadata)

    def sha256(self) -> str:
        """SHA-256 of the file."""
        return file_sha256(self.path)


def describe(model: TransUNet, training_images: dict | None = None, **more: Any) -> dict:
    """The metadata of a model: architecture, preprocessing (with what the training images look like, if
    known), threshold, versions, time, and `more` (training, data, ...)."""
    return {
        "format": FORMAT,
        "architecture": {
            "name": model.name,
            "image_side": model.image_side,
            "norm": model.norm,
            "classes": model.classes,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "preprocessing": {**preprocessing.description(model.image_side), "training_images": training_images},
        "threshold": THRESHOLD,
        "temperature": model.temperature,
        "versions": {
            "medfl": __version__,
            "torch": torch.__version__,
            "timm": version("timm"),
            "commit": git_commit(),
        },
        "created": utc_now(),
        **more,
    }


def save_checkpoint(
    path: Path, weights: dict[str, torch.Tensor], metadata: dict, state: dict | None = None
) -> None:
    """Write weights (a state dict) and metadata (and a run's state), whole or not at all."""
    content = {
        "model": {name: value.detach().cpu().contiguous() for name, value in weights.items()},
        "metadata": json.dumps(metadata, allow_nan=False),
    }
    if state is not None:
        content["state"] = state
    with atomic_write(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, device: str | torch.device = "cpu", whole: bool = True) -> Checkpoint:
    """The checkpoint in `path`, its model on `device` and in evaluation mode.

    Raises MedFLError, each with its own sentence: no file, a Git LFS pointer, a truncated file, a pickle that
    is more than weights, another program's file, a newer format, other preprocessing, weights that don't fit
    the architecture; and, unless `whole` is False, a federation's shared part, which lacks the normalisation
    layers that the hospitals keep.
    """
    path = Path(path)
    content = _read(path)
    if not (
        isinstance(content, dict)
        and isinstance(content.get("metadata"), str)
        and isinstance(content.get("model"), dict)
    ):
        raise MedFLError(f"{path} holds no model of MedFL; choose a file that train_centralized.py wrote")
    metadata = _metadata(content, path)
    if metadata.get("format") != FORMAT:
        raise MedFLError(
            f"{path} has checkpoint format {metadata.get('format')}, but this MedFL reads {FORMAT}; update "
            f"MedFL"
        )
    if not (_is_of_today(metadata) or _was_shrunk_otherwise(metadata)):
        raise MedFLError(
            f"{path} was trained with other preprocessing ({metadata['preprocessing'].get('name')}); use the "
            f"MedFL that wrote it"
        )
    if whole and metadata.get("origin", {}).get("norm_at_hospitals"):
        raise MedFLError(
            f"{path} is only the shared part of a model: each hospital keeps its own normalisation layers "
            f"(--keep-norm-local); "
            "take the NAME_federated_best.pth that a hospital wrote"
        )
    plan = Plan.model_validate(metadata["architecture"])
    _check_weights(plan, content["model"], path)
    _refuse_no_numbers(content["model"], path)
    model = plan.network()
    load_weights(model, content["model"], path)
    model.temperature = _temperature(metadata, path)
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # torch's types leave memory_format out
    return Checkpoint(path, model, metadata, content.get("state"))


def _is_of_today(metadata: dict) -> bool:
    """Whether a model was trained with today's preprocessing for images of its side."""
    today = preprocessing.description(metadata["architecture"]["image_side"])
    return {**metadata["preprocessing"], **today} == metadata["preprocessing"]


def _was_shrunk_otherwise(metadata: dict) -> bool:
    """Whether the only difference is that slices were shrunk without antialiasing, as before 0.3.0."""
    former = {**metadata["preprocessing"], **preprocessing.DESCRIPTION} == metadata["preprocessing"]
    return former and not _is_of_today(metadata)


def load_start(path: Path, name: str, image_side: int, norm: str, classes: int = 1) -> Checkpoint:
    """A checkpoint to start a training from. Raises MedFLError if its network is not the one to be trained."""
    checkpoint = load_checkpoint(path)
    model = checkpoint.model
    if (model.name, model.image_side, model.norm, model.classes) != (name, image_side, norm, classes):
        raise MedFLError(
            f"{path} is {model.name} at {model.image_side} pixels with {model.norm} normalisation and "
            f"{counted(model.classes, 'class')}; give --model {model.name} --image-size {model.image_side} "
            f"--norm {model.norm} --classes {model.classes}"
        )
    model.temperature = 1.0  # the trained model gets its own
    return checkpoint


def read_metadata(path: Path) -> dict:
    """A checkpoint's metadata, without its network. Raises MedFLError if it is none."""
    content = _read(Path(path))
    if not (isinstance(content, dict) and isinstance(content.get("metadata"), str)):
        raise MedFLError(f"{path} holds no model of MedFL; choose a file that train_centralized.py wrote")
    return _metadata(content, Path(path))


def validation_dice(metadata: dict) -> float | None:
    """The mean volume Dice on validation patients that a checkpoint records; None if it records none."""
    dice = ((metadata.get("scores") or {}).get("val") or {}).get("volume_dice") or {}
    mean = dice.get("mean")
    return float(mean) if isinstance(mean, int | float) else None


def refuse_to_overwrite(files: list[Path]) -> None:
    """Raises MedFLError if one of a run's files already exists. The message gives that model's Dice."""
    there = next((path for path in files if path.exists()), None)
    if there is None:
        return
    try:
        dice = validation_dice(read_metadata(there))
    except MedFLError:
        dice = None
    worth = "" if dice is None else f" with a validation Dice of {dice:.3f}"
    raise MedFLError(
        f"{there} is of an earlier run{worth}, and a new one would overwrite it; choose another --out, continue "
        "that run with --resume, or give it up with --overwrite"
    )


def _metadata(content: dict, path: Path) -> dict:
    """The metadata's JSON. Raises MedFLError if an entry that every checkpoint has is missing or can't be
    right."""
    try:
        metadata = read_json(content["metadata"])
        missing = {"format", "architecture", "preprocessing", "threshold"} - metadata.keys()
    except (ValueError, AttributeError) as error:
        raise MedFLError(f"{path} has damaged metadata; copy it again") from error
    if missing:
        raise MedFLError(
            f"{path} has no {sorted(missing)[0]} in its metadata; choose a file that train_centralized.py "
            f"wrote"
        )
    try:
        Told.model_validate(metadata)
    except ValidationError as error:
        what = ".".join(map(str, error.errors()[0]["loc"]))
        raise MedFLError(f"{path} has damaged metadata ({what} can't be right); copy it again") from error
    return metadata


def _check_weights(plan: Plan, weights: dict, source: Path) -> None:
    """Raises MedFLError for weights of another architecture than the plan's. It checks before the network is built,
    because a small file can name a large network."""
    with torch.device("meta"):  # shapes without values
        expected = plan.network().state_dict()
    if {name: tuple(value.shape) for name, value in weights.items()} != {
        name: tuple(value.shape) for name, value in expected.items()
    }:
        raise MedFLError(_of_another(plan.name, plan.image_side, plan.norm, plan.classes, source))


def _refuse_no_numbers(weights: dict, source: Path) -> None:
    """Raises MedFLError for weights that are NaN or infinite: from them comes no probability, and a mask without it is
    empty, as if there were no tumour."""
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise MedFLError(
            f"{source} holds weights that are no finite numbers, and would outline nothing; copy it again, or choose "
            "the checkpoint of another epoch or run"
        )


def _of_another(name: object, side: object, norm: object, classes: Any, source: Path) -> str:
    return (
        f"{source} holds weights of another architecture than {name} at {side} pixels with {norm} "
        f"normalisation and {counted(classes, 'class')}; choose a checkpoint of that model"
    )


def _temperature(metadata: dict, path: Path) -> float:
    """The number that the logits are divided by: 1 in older files, which don't store it. Raises MedFLError for a
    value that can't be right."""
    value = metadata.get("temperature", 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise MedFLError(f"{path} has the temperature {value!r}, which must be above 0; copy the file again")
    return float(value)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Load a complete state dict. Raises MedFLError if names or shapes are those of another architecture."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise MedFLError(
            _of_another(model.name, model.image_side, model.norm, model.classes, source)
        ) from error


def _read(path: Path) -> Any:
    """The file's content as torch reads it, without running any code from it."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise MedFLError(f"{path} is a pipe or a device, but a checkpoint is a file; name another")
    try:
        refuse_pointer(path)
        with open(path, "rb") as file:
            is_archive = file.read(2) == b"PK"
    except FileNotFoundError as error:
        raise MedFLError(
            f"there is no checkpoint {path} that can be read; train one with train_centralized.py"
        ) from error
    except IsADirectoryError as error:  # a Mac's browser unpacks torch's files: they are archives
        raise MedFLError(
            f"{path} is a folder, but a checkpoint is a file; copy the file again, without unpacking it"
        ) from error
    except OSError as error:
        raise MedFLError(f"{path} can't be read ({error.strerror}); check its permissions") from error
    if is_archive and not zipfile.is_zipfile(path):
        raise MedFLError(f"{path} is truncated; copy it again")
    try:
        return read_torch_file(path)
    except pickle.UnpicklingError as error:
        raise MedFLError(
            f"{path} holds Python objects other than weights and may be malicious: none of it was run; "
            "take a checkpoint of MedFL from a source you trust"
        ) from error
    except DAMAGED as error:
        raise MedFLError(
            f"{path} is no checkpoint, or a damaged one; choose a file that train_centralized.py wrote"
        ) from error


def update_metadata(path: Path, **entries: Any) -> None:
    """Replace entries of a checkpoint's metadata; the weights stay bit for bit."""
    content = _read(Path(path))
    metadata = {**_metadata(content, Path(path)), **entries}
    save_checkpoint(Path(path), content["model"], metadata, content.get("state"))
