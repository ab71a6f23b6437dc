"""How long a round will take at a hospital, tried before it joins."""

import itertools
import time
from dataclasses import replace

from batches import TrainingBatches
from encoders.autoencoder import EncoderLearner, UnlabelledBatches
from federation.hospital.hospital import Hospital
from federation.hospital.pretraining import pretraining
from training import Learner

TRIED = 3  # steps


def round_seconds(hospital: Hospital) -> float:
    """Seconds of a round's scoring and training, from scoring once and training a few steps of a new model."""
    training, federation = hospital.training, hospital.federation
    model = training.network().to(hospital.device)
    mine = replace(training, ema_decay=0.0, batch_size=federation.batch_of_one(training.batch_size))
    learner: Learner | EncoderLearner
    batches: TrainingBatches | UnlabelledBatches
    if hospital.data.unlabelled:
        learner, batches = pretraining(model, mine, hospital.data.unlabelled, training.seed, None)
    else:
        learner = Learner(model, mine, hospital.device)
        batches = TrainingBatches(
            hospital.data.dataset,
            hospital.data.split.train,
            training.image_size,
            mine.batch_size,
            training.seed,
            training.classes,
        )
    first, *others = itertools.islice(batches.epoch(1), TRIED + 1)
    learner.train_epoch([first])  # takes longer than those that follow
    others, began = others or [first], time.monotonic()
    learner.train_epoch(others)
    step = (time.monotonic() - began) / len(others)
    return hospital.reports.score(model).seconds + step * federation.steps_a_round(len(batches))
