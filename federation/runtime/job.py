"""Prepares a federation's server: both kinds of settings, the model, and the job for the ServerApp. The user's mistakes
are found here, before anything starts."""

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import describe, load_checkpoint, load_start, save_checkpoint
from common import MedFLError, __version__, counted, git_commit, settings_from
from encoders.autoencoder import check_name
from encoders.weights import PRETRAINED, RANDOM, RECIPES, go_on_from, start_model, with_recipe
from federation.privacy.hospitals import HospitalPrivacy
from federation.protocol.agreement import approval, check_together, to_json
from federation.protocol.log import say
from federation.protocol.messages import local_versions
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import most_bytes, part_mask
from federation.runtime.bundle import hospital_code
from federation.server.audit import AUDIT, ENDS, check_end, cut_half_line, verify
from federation.server.state import LAST, check_best, load_run, with_rounds
from storage.files import file_sha256
from training import TrainingSettings
from transunet import TransUNet


def starting_model(
    arguments: argparse.Namespace, training: TrainingSettings
) -> tuple[TransUNet, str, str | None, TrainingSettings]:
    """The model that round 1 begins with, its origin in words, the SHA-256 of the split that it was trained on (None if
    it was not), and the settings, completed with its encoder's. Raises MedFLError for a file that does not fit."""
    torch.manual_seed(training.seed)
    if arguments.init is None:
        model, training, note = start_model(training)
        if note:
            say(note)
        words = {PRETRAINED: "timm's encoder", RANDOM: "random weights"}
        return model, words.get(training.encoder, f"encoder weights {training.encoder}"), None, training
    checkpoint = load_start(
        arguments.init, training.model, training.image_size, training.norm, training.classes
    )
    split = checkpoint.metadata.get("data", {}).get("split_sha256")
    training = go_on_from(checkpoint, training)
    return checkpoint.model, f"checkpoint {arguments.init.name}", split, training


def network_of(path: Path) -> dict:
    """The settings that describe a checkpoint's network."""
    model = load_checkpoint(path).model
    return {
        "model": model.name,
        "image_size": model.image_side,
        "norm": model.norm,
        "classes": model.classes,
    }


def announce_privacy(privacy: HospitalPrivacy, model: TransUNet, training: TrainingSettings) -> None:
    """Print what is protected, and warn if the noise leaves nothing to learn."""
    settings = privacy.settings
    if privacy.exhausted(0):
        raise MedFLError(
            f"the first round would already spend epsilon {privacy.spent(1):.3g}, more than --dp-epsilon "
            f"{settings.dp_epsilon:g}; raise --dp-epsilon or --dp-noise-multiplier"
        )
    rounds = next((n for n in range(settings.rounds) if privacy.exhausted(n)), settings.rounds)
    say(
        "differential privacy: the protected unit is the hospital, not the patient; noise "
        f"{privacy.multiplier:.3g} x clip {settings.dp_clip:g}, epsilon {privacy.spent(rounds):.3g} after "
        f"{counted(rounds, 'round')} at delta {settings.dp_delta:g}"
    )
    if warning := privacy.warning(
        int(part_mask(model, settings.left_out(training.frozen_epochs >= rounds)).sum())
    ):
        say(warning)


def check_log(log: Path, ends: Path | None, resume: bool) -> None:
    """Check the audit log of former runs in the folder. A half-written last line is cut off and reported. Raises
    MedFLError if the log is missing or was changed."""
    if half := cut_half_line(log):
        say(f"the last line of {log} was only half written (a full disk?); its {half} bytes were cut off")
    if log.exists():
        verify(log)
        check_end(log, ends)
    elif resume and (log.parent / LAST).exists():
        raise MedFLError(f"there is no {log} beside the run to continue; put back a copy of it")


def taken_up(
    arguments: argparse.Namespace, out: Path
) -> tuple[dict, TrainingSettings, FederationSettings, TransUNet]:
    """An interrupted run: its entries for the job, its own settings, and its model."""
    training, federation, state, model = load_run(out)
    check_best(out)
    done = state["progress"]["round"]
    federation = with_rounds(federation, arguments.rounds if "rounds" in arguments.given else None, done)
    say(
        f"continuing after round {done} of {federation.rounds}, with that run's own settings; options other than "
        "--rounds are ignored"
        if done < federation.rounds
        else f"all {federation.rounds} rounds of this run are done; only the scoring of the model and the message "
        "that ends the federation are left (for a new run leave --resume out)"
    )
    return {"rounds": federation.rounds}, training, federation, model


def begun(
    arguments: argparse.Namespace, folder: Path
) -> tuple[dict, TrainingSettings, FederationSettings, TransUNet]:
    """A new run: its entries for the job, the settings from the options, and the model to begin with."""
    training = settings_from(arguments, TrainingSettings)
    federation = settings_from(arguments, FederationSettings)
    told: dict = {}
    if arguments.evaluate:
        arguments.init = arguments.evaluate
        training = replace(training, **network_of(arguments.evaluate))
        federation = replace(federation, rounds=0)  # a hospital that approves these settings trains nothing
        told["evaluate"] = {"model": arguments.evaluate.name, "sha256": file_sha256(arguments.evaluate)}
    elif not federation.rounds:
        raise MedFLError("--rounds is 0; choose a number above 0, or score a model with --evaluate MODEL")
    check_together(training, federation)
    if federation.pretraining:
        check_name(training.model)
        # the whole encoder learns from the first round on, also a loaded one
        training = with_recipe(training, RECIPES[False])
    model, started_from, init_split, training = starting_model(arguments, training)
    start = folder / "start.pth"
    save_checkpoint(start, model.state_dict(), describe(model))
    told |= {
        "settings": to_json(training, federation),
        "start": str(start),
        "started_from": started_from,
        "init_split": init_split,
    }
    numbers = sum(value.numel() for value in model.state_dict().values() if value.is_floating_point())
    say(
        f"{training.model} at {training.image_size} pixels from {started_from}; {4 * numbers / 1e6:.0f} MB each way "
        f"per round and hospital"
    )
    return told, training, federation, model


def prepare_job(
    arguments: argparse.Namespace, folder: Path
) -> tuple[dict, TrainingSettings, FederationSettings]:
    """The job for the ServerApp, and both settings. The user's mistakes are found here."""
    if arguments.evaluate:
        arguments.out = arguments.out / "evaluation"
    out = arguments.out.resolve()
    commit = git_commit()
    versions = {**local_versions(__version__), **({"commit": commit} if commit else {})}
    ends = arguments.kit and arguments.kit.resolve() / ENDS
    check_log(out / AUDIT, ends, arguments.resume)
    told, training, federation, model = (
        taken_up(arguments, out) if arguments.resume else begun(arguments, folder)
    )
    if federation.secure_aggregation:
        say(
            "secure aggregation: this server learns the sum of a round's updates, but no single one; they "
            "are not screened"
        )
    if federation.private:
        announce_privacy(HospitalPrivacy(federation), model, training)
    settings, code = to_json(training, federation), hospital_code()
    say(f"code and settings, for hospitals that use --approve: {approval(code, settings)}")
    job = {
        **{
            name: getattr(arguments, name)
            for name in ("notify", "on_event", "tensorboard", "mlflow", "energy")
        },
        "started_in": str(Path.cwd()),
        "out": str(out),
        "resume": arguments.resume,
        "commit": commit,
        "versions": versions,
        "ends": ends and str(ends),
        "most_bytes": most_bytes(model),
        **told,
        "audit": {
            "code": code,
            "settings": hashlib.sha256(settings.encode()).hexdigest(),
            "versions": versions,
            "commit": commit,
            "keys": arguments.kit is not None,
        },
    }
    return job, training, federation
