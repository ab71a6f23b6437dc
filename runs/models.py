"""The models that there are to choose from."""

import functools
import os
from pathlib import Path

from checkpoint import read_metadata, validation_dice
from common import ROOT, MedFLError

PHANTOM_MODEL = (
    ROOT / "deployment" / "app" / "samples" / "phantom_model.pth"
)  # deployment/make_phantom_model.py


def find_checkpoints(models: Path) -> list[Path]:
    """The models to choose from: MEDFL_CHECKPOINT first, if it is set, then every `*_best.pth` in `models` and the
    folders in it. The best validation Dice comes first; the newest model leads among equal ones. Without any, the
    model that was trained on phantoms. Raises MedFLError if that is missing as well."""
    named = os.environ.get("MEDFL_CHECKPOINT")
    if named and not Path(named).is_file():
        raise MedFLError(
            f"MEDFL_CHECKPOINT names {named}, but there is no such file; correct it, or unset it"
        )
    found = sorted(
        [*models.glob("*_best.pth"), *models.glob("*/*_best.pth")],
        key=lambda path: (_dice(path), path.stat().st_mtime),
        reverse=True,
    )
    every = list(dict.fromkeys(([Path(named)] if named else []) + found))
    if not every and PHANTOM_MODEL.is_file():
        return [PHANTOM_MODEL]
    if not every:
        raise MedFLError(
            f"there is no model in {models}; train one with `make demo` or train_centralized.py, or set "
            "MEDFL_CHECKPOINT to a .pth file"
        )
    return every


@functools.cache
def _dice_at(path: Path, _: float) -> float:
    try:
        return validation_dice(read_metadata(path)) or 0.0
    except MedFLError:
        return 0.0


def _dice(path: Path) -> float:
    """A file's validation Dice; 0 if it records none or is no checkpoint."""
    return _dice_at(path, path.stat().st_mtime)
