"""The settings of a federation as messages carry them, and the hash by which a hospital approves them."""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args, get_type_hints

from common import MedFLError
from federation.protocol.settings import FederationSettings
from training import TrainingSettings


def check_together(training: TrainingSettings, federation: FederationSettings) -> None:
    """Raises MedFLError where the two kinds of settings don't go together."""
    if training.schedule == "plateau" and not federation.val_fraction:
        raise MedFLError(
            "a plateau is seen on validation patients, and there are none; take --schedule cosine"
        )
    if federation.pretraining and (
        federation.keep_norm_local
        or training.frozen_epochs
        or training.patience
        or training.schedule == "plateau"
    ):
        raise MedFLError(
            "--pretraining trains the encoder alone, which has no normalisation layers to keep, and no validation "
            "Dice; leave out --keep-norm-local, --freeze-encoder-epochs, --patience and --schedule plateau"
        )
    part = federation.keep_norm_local or federation.pretraining  # whose statistics don't travel
    if federation.private and training.norm == "batch" and not part:
        raise MedFLError(
            "BatchNorm's running variances would turn negative under noise; with differential privacy take "
            "--norm group, or --keep-norm-local"
        )
    if federation.private and (training.schedule == "plateau" or training.patience):
        raise MedFLError(
            "with differential privacy nothing may be chosen by validation scores, which no noise protects; "
            "take --schedule cosine and no --patience"
        )


def to_json(training: TrainingSettings, federation: FederationSettings) -> str:
    """Both settings as a message carries them."""
    return json.dumps(
        {
            "training": {
                **asdict(training),
                "encoder": Path(training.encoder).name,  # the server has loaded it, and tells no path
            },
            "federation": asdict(federation),
        }
    )


def approval(code: str, settings: str) -> str:
    """What a hospital approves: one hash, in hexadecimal, of the code's hash and the settings as messages
    carry them."""
    return hashlib.sha256(f"{code}\n{settings}".encode()).hexdigest()


def unusual(text: str) -> str:
    """Those settings of a message that are not the defaults, in words."""
    told = []
    for given in from_json(text):
        values = {
            f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) != f.default
        }
        told += [f"--{name.replace('_', '-')} {value}" for name, value in values.items()]
    return ", ".join(told) or "all as by default"


def from_json(text: str, stored: bool = False) -> tuple[TrainingSettings, FederationSettings]:
    """The settings of a message, or, stored, of a run's file: an earlier MedFL, which had fewer, did what the
    defaults of later ones do. Raises MedFLError where they are another MedFL's or out of range."""
    try:
        content = json.loads(text)
        training, federation = content["training"], content["federation"]
        for kind, values in ((TrainingSettings, training), (FederationSettings, federation)):
            known = {f.name for f in fields(kind)}
            if set(values) - known or not stored and known - set(values):
                raise KeyError("settings of another MedFL")
            if not all(
                _fits(values[name], hint) for name, hint in get_type_hints(kind).items() if name in values
            ):
                raise TypeError("a share of a step, or a text in a number's place")
        return TrainingSettings(**training), FederationSettings(**federation)
    except (ValueError, KeyError, TypeError) as error:
        raise MedFLError(
            "the server sent settings that this MedFL does not know; use the same version on both sides"
        ) from error


def _fits(value: object, hint: type) -> bool:
    """Whether a setting is of its type; a whole number may stand for any."""
    types = get_args(hint) or (hint,)
    return type(value) in types or type(value) is int and float in types
