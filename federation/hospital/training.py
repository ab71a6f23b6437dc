"""A round's training at a hospital."""

import math
import time
import zlib
from collections.abc import Callable

import torch
from tqdm import tqdm

from batches import TrainingBatches
from encoders.autoencoder import EncoderLearner, UnlabelledBatches
from federation.privacy.patients import PatientBatches
from runs.usage import LOG_SECONDS
from runs.usage import in_time as in_words
from training import Learner, rate_scale


def seed_of(seed: int, label: str) -> int:
    """The seed of a hospital's order of slices: unlike the other hospitals', the same in every round."""
    return seed * 1_000 + zlib.crc32(label.encode()) % 1_000


def train_round(
    learner: Learner | EncoderLearner,
    batches: TrainingBatches | PatientBatches | UnlabelledBatches,
    number: int,
    rounds: int,
    steps: int,
    seed: int,
    share: Callable[[float], float],
    in_time: Callable[[], None],
    say: Callable[[str], None] = lambda _: None,
) -> float:
    """Train a round's steps.

    Args:
        number: the round, from 1, of so many rounds.
        steps: of this round.
        seed: of the order of slices (`seed_of`).
        share: gives the share of the learning rate for how far the federation is, from 0 to 1.
        in_time: raises an error where the time is over; called before each step.
        say: gets a line a minute: steps, speed, and what is left of the round.

    Returns:
        The mean loss.
    """
    passes = math.ceil(steps / len(batches))
    losses = []
    began = told = time.monotonic()

    def before_step(step: int) -> bool:
        nonlocal told
        if step and time.monotonic() - told > LOG_SECONDS:
            told = time.monotonic()
            speed = step / (told - began)
            say(
                f"round {number}: step {step} of {steps}, {speed:.2f} steps/s, "
                f"{in_words((steps - step) / speed)} left of the round's training"
            )
        learner.set_rate(share((number - 1 + step / steps) / rounds))
        in_time()
        return step < steps

    with tqdm(total=steps, desc=f"round {number}", unit="step", leave=False, disable=None) as bar:
        for local in range(passes):
            epoch = (number - 1) * passes + local + 1
            torch.manual_seed(100_003 * seed + epoch)  # for layers that draw numbers
            result = learner.train_epoch(batches.epoch(epoch), before_step, bar)
            losses.append((result.loss, result.steps))
    return sum(loss * done for loss, done in losses) / steps


def rate_in_a_round(warmup: float, asked: float | None) -> Callable[[float], float]:
    """The share of the learning rate by how far the federation is: what the server asked for, or else the
    cosine, which is the same at all hospitals."""
    return lambda progress: rate_scale(progress, warmup) if asked is None else asked


def proximal_pull(optimiser: torch.optim.Optimizer, mu: float) -> Callable[[], None]:
    """FedProx (Li et al. 2020, arXiv:1812.06127): a function that, after a step, draws each weight w back to
    w0, what it is now, by rate x mu x (w - w0).

    The pull is decoupled from the gradient as weight decay is in AdamW (Loshchilov and Hutter 2019,
    arXiv:1711.05101): in the gradient it would be clipped, and Adam would divide it by its own size, so that
    mu meant nothing.
    """
    start = [[weight.detach().clone() for weight in group["params"]] for group in optimiser.param_groups]

    @torch.no_grad()
    def pull() -> None:
        for group, before in zip(optimiser.param_groups, start):
            for weight, origin in zip(group["params"], before):
                weight.lerp_(origin, min(1.0, group["lr"] * mu))

    return pull
