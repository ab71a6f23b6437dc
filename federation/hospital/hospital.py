"""What a hospital does with a message: say who it is, score the model that came, train it, give back the
update."""

import hashlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from batches import TrainingBatches
from common import MedFLError
from encoders.autoencoder import EncoderLearner, UnlabelledBatches
from federation.hospital.data import HospitalData
from federation.hospital.faults import HospitalError
from federation.hospital.identity import Identity
from federation.hospital.moments import Moments
from federation.hospital.norms import OwnNorms
from federation.hospital.own_model import write_own_model
from federation.hospital.pretraining import painter_of, pretraining
from federation.hospital.promise import patient_budget, reserve
from federation.hospital.reports import Reports, Scored
from federation.hospital.statistics import ToldStatistics
from federation.hospital.training import proximal_pull, rate_in_a_round, seed_of, train_round
from federation.privacy.patients import PatientBatches, PrivateLearner
from federation.protocol.agreement import to_json
from federation.protocol.answers import Facts, Images
from federation.protocol.messages import Failure
from federation.protocol.requests import Task, Train
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import (
    FULL,
    Record,
    common_mask,
    from_record,
    in_precision,
    norm_mask,
    pack,
    part_mask,
    unpack,
    weights_sha256,
)
from runs.usage import choose_device
from storage.files import atomic_write
from training import Learner, TrainingSettings
from transunet import TransUNet


@dataclass(frozen=True)
class Worked:
    """What a round's training came to. examples: training slices behind the update."""

    examples: int
    train_loss: float | None
    patient_epsilon: float | None
    seconds: float


class Hospital:
    """A hospital in one federation.

    Args:
        identity: who it is.
        training, federation: the settings that the server sent.
        memory: the file that keeps the last weights, for messages that bring only a part of them.
        tell: gets a line a minute of a round's training.

    Raises:
        HospitalError: bad data, or settings with which the promise to the patients can't be kept.
    """

    def __init__(
        self,
        identity: Identity,
        training: TrainingSettings,
        federation: FederationSettings,
        memory: Path,
        tell: Callable[[str], None] = lambda _: None,
    ):
        self.began, self.came = time.monotonic(), ""  # SHA-256 of the weights that came
        self.begun = ""  # SHA-256 of what else a training under masks began with
        self.tell = tell
        self.identity, self.training, self.federation, self.memory = identity, training, federation, memory
        if identity.shared_cores:  # more threads than cores slow all down
            torch.set_num_threads(max(1, identity.shared_cores // federation.clients))
        self.device = choose_device(identity.device)
        try:
            self.data = HospitalData(identity, federation, training.seed)
            self.data.dataset.check_classes(training.classes)
        except MedFLError as error:
            raise HospitalError(Failure.DATA, str(error)) from error
        self.budget = patient_budget(identity, training, federation, len(self.data.split.train))
        self.reports = Reports(identity, federation, self.data, bool(self.budget), tell)

    def facts(self) -> Facts:
        """What the server learns at joining: label, versions, counts, hashes, and what the images look like
        on average."""
        return Facts(
            **self.identity.introduction().model_dump(),
            own_data=self.identity.own_data,
            data=self.data.dataset.name,
            parts=self.data.parts(),
            images=self._images_told(),
            device=self.device.type,
            split_sha256=self.data.split_sha256,
            partition_sha256=self.data.partition_sha256,
            patient_privacy=self.identity.patient_privacy,
            task=self.data.dataset.task,
        )

    def _images_told(self) -> Images | None:
        """What the server learns of the images. A share of a public dataset has no secret."""
        if self.budget or not self.identity.own_data:
            return None if self.budget else self.data.images()
        told = ToldStatistics(self.identity.file("images.json"))
        return told.tell(tuple(self.data.split.train), self.data.images())

    def received(self, task: Task, arrays: Record) -> TransUNet:
        """The network with the weights that came; parts that the message is
        without are those that are here."""
        model = self.training.network()
        weights = from_record(arrays, self.federation.update_dtype)
        if task.without:
            came, weights = weights, torch.load(self.memory, weights_only=True)
            weights[part_mask(model, task.without)] = came
        self.came = weights_sha256(weights, common_mask(model, self.federation.keep_norm_local))
        if self.federation.keep_norm_local:
            number = task.round if isinstance(task, Train) else None
            if own := self._norms(task.run).before(number):
                weights[norm_mask(model)] = own.last
        model.load_state_dict(unpack(weights, model.state_dict()))
        if self.federation.keep_norm_local or self.federation.pretraining or self.training.frozen_epochs:
            # the next may bring only a part
            with atomic_write(self.memory, private=True) as file:
                torch.save(weights, file)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave memory_format out

    def finish(self, model: TransUNet, task: Task) -> Scored:
        """Score the federation's last model. Where normalisation layers stayed here, it is one of this
        hospital's own, with its layers averaged over the rounds, and it is written down."""
        self._moments(task.run).forget()
        painter_of(self.identity, task.run).forget()
        own = self._norms(task.run).before(None) if self.federation.keep_norm_local else None
        if own is None:
            return self.reports.score(model)
        weights = pack(model.state_dict())
        weights[norm_mask(model)] = own.average
        model.load_state_dict(unpack(weights, model.state_dict()))
        score = self.reports.score(model)
        write_own_model(model, score, own.rounds, self.identity, self.training, self.federation, self.data)
        return score

    def train(self, model: TransUNet, task: Train) -> tuple[Worked, torch.Tensor]:
        """Train the model as the message says.

        Returns:
            What happened, and the update, (n,) float32: the new weights, or, in half precision and for secure
            aggregation, what changed.

        Raises:
            HospitalError: the message asks for what the settings don't provide for, the data changed, the
            time is over,
                the patients' budget is spent, or the weights are not finite.
        """
        began, settings = time.monotonic(), self.federation
        if self.identity.role != "train":
            raise HospitalError(Failure.CONSENT, "this hospital only observes; nothing was trained")
        self._refuse_what_was_not_agreed(task)
        if settings.secure_aggregation:
            self.begun = self._kept_sha256(task)
        seed = seed_of(self.training.seed, self.identity.label)
        learner, batches = self._learner(model, task, seed)
        frozen, before = task.round <= self.training.frozen_epochs, pack(model.state_dict())
        model.set_encoder_trainable(not frozen)
        warmup = 0.0 if self.budget else self.training.warmup  # few steps, of a model that is trained already
        steps = settings.steps_a_round(len(batches))
        loss = train_round(
            learner,
            batches,
            task.round,
            settings.rounds,
            steps,
            seed,
            rate_in_a_round(warmup, task.rate),
            lambda: self._check_time(task),
            self.tell,
        )
        after = pack(model.state_dict())
        update = self._update(model, before, after, frozen)
        if settings.moments == "keep":
            self._moments(task.run).keep(task.round, learner.optimiser.state_dict())
        if isinstance(learner, EncoderLearner):
            painter_of(self.identity, task.run).keep(task.round, learner.model.painter())
        if settings.keep_norm_local:
            self._norms(task.run).keep(task.round, after[norm_mask(model)], self.training.ema_decay)
        way = f"{task.round} {task.rate} {to_json(self.training, settings)}"
        return Worked(
            batches.slices,
            self.reports.loss(loss, before, way, whole_pass=steps >= len(batches)),
            self.budget.spent if self.budget else None,
            time.monotonic() - began,
        ), update

    def _kept_sha256(self, task: Train) -> str:
        """SHA-256 of what this hospital kept from the rounds before this one, and begins it with."""
        moments, painter = self._moments(task.run), painter_of(self.identity, task.run)
        norms, content = self._norms(task.run).before(task.round), io.BytesIO()
        kept = [moments.before(task.round), painter.before(task.round), norms and norms.last]
        torch.save(kept, content)
        return hashlib.sha256(content.getbuffer()).hexdigest()

    def _refuse_what_was_not_agreed(self, task: Train) -> None:
        if not self.identity.own_data and self.data.partition_sha256 != task.partition:
            raise HospitalError(
                Failure.DATA,
                "the dataset changed since this hospital joined, and its patients may have "
                "changed parts; put back what it was, or start the federation again from the beginning",
            )
        usual = (
            task.rate is None
            if self.training.schedule == "cosine"
            else task.rate is not None and task.rate > 0
        )
        if not usual or task.round > self.federation.rounds:
            raise HospitalError(
                Failure.CONSENT,
                f"the server asked for round {task.round} of {self.federation.rounds} at {task.rate} times "
                "the learning rate, which the settings do not provide for; nothing was trained",
            )

    def _learner(
        self, model: TransUNet, task: Train, seed: int
    ) -> tuple[Learner | EncoderLearner, TrainingBatches | PatientBatches | UnlabelledBatches]:
        """What trains the model in this round, and on what."""
        settings, patients, side = self.federation, self.data.split.train, self.training.image_size
        # the server averages over rounds, and what it calls a batch is of all hospitals together
        mine = replace(
            self.training,
            ema_decay=0.0,
            batch_size=settings.batch_of_one(self.training.batch_size),
            lr=self.training.lr * (1 if self.budget else settings.rate_factor),
        )
        learner: Learner | EncoderLearner
        batches: TrainingBatches | PatientBatches | UnlabelledBatches
        if self.budget:
            noise = reserve(self.budget, settings, task)
            learner = PrivateLearner(model, mine, self.device, noise, len(patients))
            batches = PatientBatches(self.data.dataset, patients, side, seed, self.training.classes)
        elif self.data.unlabelled:
            painter = painter_of(self.identity, task.run).before(task.round)
            learner, batches = pretraining(model, mine, self.data.unlabelled, seed, painter)
        else:
            learner = Learner(model, mine, self.device)
            batches = TrainingBatches(
                self.data.dataset, patients, side, mine.batch_size, seed, self.training.classes
            )
        if settings.moments == "keep" and (kept := self._moments(task.run).before(task.round)):
            learner.optimiser.load_state_dict(kept)
        if settings.strategy == "fedprox":
            learner.after_step = proximal_pull(learner.optimiser, settings.proximal_mu)
        return learner, batches

    def _check_time(self, task: Train) -> None:
        if time.monotonic() - self.began > task.seconds:
            raise HospitalError(
                Failure.LATE,
                f"round {task.round} took longer than the server's {task.seconds:.0f} s; it "
                "goes on without this hospital's update (the server's --round-timeout sets the time)",
            )

    def _update(
        self, model: TransUNet, before: torch.Tensor, after: torch.Tensor, frozen: bool
    ) -> torch.Tensor:
        """What the server gets of the weights before and after a round, each (n,) float32."""
        precision = self.federation.update_dtype
        whole = precision == FULL and not self.federation.secure_aggregation
        update = (after if whole else after - before)[part_mask(model, self.federation.left_out(frozen))]
        if not bool(torch.isfinite(in_precision(update, precision)).all()):
            raise HospitalError(
                Failure.TRAINING,
                "the trained weights are not finite and were not sent; the learning rate "
                "(the server's --lr) may be too high",
            )
        return update

    def _moments(self, run: str) -> Moments:
        return Moments(self.identity.file("optimiser.pt"), run, private=bool(self.budget))

    def _norms(self, run: str) -> OwnNorms:
        return OwnNorms(self.identity.file("norms.pt"), run, private=bool(self.budget))
