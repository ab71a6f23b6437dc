"""What an encoder starts with: timm's ImageNet weights, a file of weights, or random weights; and the training recipe
for each."""

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
)  # names of timm's files; today the hub uses the first
PATIENCE = 5.0  # seconds for the single attempt to reach the hub
# Loaded weights are frozen while the decoder learns from scratch, and then changed slowly (arXiv:2102.04306 starts
# from ImageNet weights); a random encoder learns like the rest.
RECIPES: dict[bool, dict[str, Any]] = {
    True: {"encoder_lr_factor": 0.1, "freeze_encoder_epochs": 3},
    False: {"encoder_lr_factor": 1.0, "freeze_encoder_epochs": 0},
}


def start_model(settings: TrainingSettings) -> tuple[TransUNet, TrainingSettings, str | None]:
    """The network that a training begins with, the settings (with what the encoder holds, and with its recipe where
    none was asked for), and a sentence if the encoder is not the requested one, else None.

    The caller sets the seed first, with `torch.manual_seed`. Raises MedFLError for a file that doesn't fit.
    """
    wanted = settings.encoder
    note = None
    path: Path | None = None
    if wanted == PRETRAINED:
        path, why = pretrained_weights(settings.model)
        if path is None:
            note = f"the encoder starts from random weights: {why}; --encoder random asks for them"
    elif wanted != RANDOM:
        path = Path(wanted)
    model = settings.network(path)
    holds = RANDOM if path is None else PRETRAINED if wanted == PRETRAINED else path.name
    return model, with_recipe(replace(settings, encoder=holds), RECIPES[path is not None]), note


def go_on_from(start: Checkpoint, settings: TrainingSettings) -> TrainingSettings:
    """The settings of a training that begins with a checkpoint. They record the start of that checkpoint's encoder.
    The encoder is trained like the rest, because the decoder is already trained. Raises MedFLError if an encoder is
    named as well."""
    if settings.encoder not in (PRETRAINED, RANDOM):
        raise MedFLError(
            f"--init brings an encoder of its own, and --encoder names {settings.encoder}; give one of them"
        )
    encoder = start.metadata.get("training", {}).get("encoder", RANDOM)
    return with_recipe(replace(settings, encoder=encoder), RECIPES[False])


def with_recipe(settings: TrainingSettings, recipe: dict[str, Any]) -> TrainingSettings:
    """The settings, with the recipe's values where none were asked for."""
    return replace(
        settings, **{name: value for name, value in recipe.items() if getattr(settings, name) is None}
    )


def pretrained_weights(name: str) -> tuple[Path | None, str]:
    """The file of timm's weights for a named model's encoder, from the hub's cache or the hub, and ""; or None and the
    reason. Tries the network once, for `PATIENCE` seconds."""
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
    except Exception as error:  # the hub's client and its libraries raise their own kinds
        return None, f"timm's weights ({repo}) can't be loaded from the hub ({type(error).__name__})"


def _answers(url: str) -> bool:
    """Whether the address answers in time. It is asked in a thread, because a name lookup has no time limit."""
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
