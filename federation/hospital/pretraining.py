"""A round of pretraining at a hospital: what trains the encoder, and on which scans."""

from pathlib import Path

import torch

from encoders.autoencoder import (
    EncoderLearner,
    MaskedAutoencoder,
    UnlabelledBatches,
    of_training,
    unlabelled_volumes,
)
from federation.hospital.identity import Identity
from federation.hospital.moments import Moments
from split import Split
from training import TrainingSettings
from transunet import TransUNet


def scans_without_masks(identity: Identity, split: Split) -> list[list[Path]]:
    """The slices of each volume that an encoder may see at a hospital: of its training patients and, where the data
    are its own, in without_masks/. Raises MedFLError where there are none."""
    reads = of_training(split, unmasked=identity.own_data)
    return unlabelled_volumes(identity.data, identity.mask_suffix, reads)


def pretraining(
    model: TransUNet, training: TrainingSettings, volumes: list[list[Path]], seed: int, painter: dict | None
) -> tuple[EncoderLearner, UnlabelledBatches]:
    """What trains a model's encoder on these volumes. painter: the part that is thrown away in the end, as the last
    round left it; it stays at the hospital, and a new one is made where there is none."""
    torch.manual_seed(seed)
    network = MaskedAutoencoder(model.name, model.image_side, model.encoder)
    if painter is not None:
        network.load_painter(painter)
    network.to(next(model.parameters()).device)
    batches = UnlabelledBatches(volumes, model.image_side, training.batch_size, seed)
    return EncoderLearner(network, training.lr, training.weight_decay), batches


def painter_of(identity: Identity, run: str) -> Moments:
    """Where the part that is thrown away lies from round to round."""
    return Moments(identity.file("painter.pt"), run, private=False)
