"""What an encoder starts with: timm's ImageNet weights, a file of weights, or random numbers; and the recipe that
goes with each."""

import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

import torchvision_operators  # noqa: F401  must come before timm

# isort: split
import timm

from checkpoint import Checkpoint
from common import MedFLError
from training import TrainingSettings
from transunet import ARCHITECTURES, TransUNet

PRETRAINED, RANDOM = "pretrained", "random"
FILES = (
    "model.safetensors",
    "pytorch_model.bin",
)  # in which timm's weights lie: on the hub today in the first
PATIENCE = 5.0  # seconds for the one try to reach the hub
# Loaded weights are kept while the decoder learns from nothing, and then changed slowly (arXiv:2102.04306 trains
# on from ImageNet weights); an encoder that knows nothing learns as the rest does.
RECIPES: dict[bool, dict[str, Any]] = {
    True: {"encoder_lr_factor": 0.1, "freeze_encoder_epochs": 3},
    False: {"encoder_lr_factor": 1.0, "freeze_encoder_epochs": 0},
}


def start_model(settings: TrainingSettings) -> tuple[TransUNet, TrainingSettings, str | None]:
    """The network that a training begins with, the settings as they are then (what the encoder holds, and its
    recipe where none was asked for), and a sentence where it is not what was asked for.

    Weights and seed are the caller's: `torch.manual_seed` first. Raises MedFLError for a file that doesn't fit.
    """
    wanted = settings.encoder
    note = None
    path: Path | None = None
    if wanted == PRETRAINED:
        path, why = pretrained_weights(settings.model)
        if path is None:
            note = f"the encoder starts from random weights: {why}; --encoder random says so from the start"
    elif wanted != RANDOM:
        path = Path(wanted)
    model = TransUNet(settings.model, settings.image_size, settings.norm, path)
    holds = RANDOM if path is None else PRETRAINED if wanted == PRETRAINED else path.name
    return model, with_recipe(replace(settings, encoder=holds), RECIPES[path is not None]), note


def go_on_from(start: Checkpoint, settings: TrainingSettings) -> TrainingSettings:
    """The settings of a training that begins with a checkpoint: its encoder is what that began with, and it is
    trained as the rest, because the decoder is trained already. Raises MedFLError where another encoder is named."""
    if settings.encoder not in (PRETRAINED, RANDOM):
        raise MedFLError(
            f"--init brings an encoder of its own, and --encoder names {settings.encoder}; give one of them"
        )
    encoder = start.metadata.get("training", {}).get("encoder", RANDOM)
    return with_recipe(replace(settings, encoder=encoder), RECIPES[False])


def with_recipe(settings: TrainingSettings, recipe: dict[str, Any]) -> TrainingSettings:
    """The settings with the recipe's values where nothing was asked for."""
    return replace(
        settings, **{name: value for name, value in recipe.items() if getattr(settings, name) is None}
    )


def pretrained_weights(name: str) -> tuple[Path | None, str]:
    """The file of timm's weights for a named model's encoder, from the hub's cache or the hub; or None, and
    why. Tries the network once, for `PATIENCE` seconds."""
    plan = ARCHITECTURES[name]
    known = None if plan.size else timm.get_pretrained_cfg(plan.encoder)
    repo = known.hf_hub_id if known else None
    if not repo:
        return None, f"there are no pretrained weights for {name}"
    for file in FILES:
        found = huggingface_hub.try_to_load_from_cache(repo, file)
        if isinstance(found, str):
            return Path(found), ""
    if constants.HF_HUB_OFFLINE or not _answers(f"{constants.ENDPOINT}/{repo}/resolve/main/{FILES[0]}"):
        return None, f"timm's weights ({repo}) are not in the cache, and the hub can't be reached"
    try:
        return Path(huggingface_hub.hf_hub_download(repo, FILES[0], etag_timeout=PATIENCE)), ""
    except Exception as error:  # the hub's client and what is below it raise their own kinds
        return None, f"timm's weights ({repo}) can't be loaded from the hub ({type(error).__name__})"


def _answers(url: str) -> bool:
    """Whether somebody answers there in time. In a thread, because looking up a name knows no time limit."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
                answered.set()
        except (OSError, ValueError):
            pass
        finally:
            over.set()

    over = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    over.wait(PATIENCE)
    return answered.is_set()
