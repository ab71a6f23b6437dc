"""What a hospital does with a message: say who it is, score the model that came, train it, give back the
update."""

import hashlib
import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from batches import TrainingBatches
from checkpoint import THRESHOLD, describe, save_checkpoint
from common import SMALLEST_GROUP, MedFLError, counted
from encoders.autoencoder import EncoderLearner, UnlabelledBatches
from evaluation.scoring import score_patients
from federation.hospital.data import HospitalData
from federation.hospital.identity import Identity
from federation.hospital.moments import Moments
from federation.hospital.norms import OwnNorms
from federation.hospital.pretraining import painter_of, pretraining
from federation.hospital.scored import ScoredModels
from federation.hospital.statistics import ToldStatistics
from federation.hospital.training import proximal_pull, rate_in_a_round, seed_of, train_round
from federation.privacy.budget import PatientBudget
from federation.privacy.patients import CHANCE, STEPS, PatientBatches, PrivateLearner
from federation.protocol.answers import Facts, Images
from federation.protocol.messages import Failure
from federation.protocol.requests import Task, Train
from federation.protocol.settings import FederationSettings, to_json
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
from tasks import stored
from training import Learner, TrainingSettings
from transunet import TransUNet

TOLD_DIGITS = (
    4  # of a Dice or loss, after the point: what tells models apart, not all that 64 bits say of patients
)


class HospitalError(MedFLError):
    """A fault with the code that the server gets to know; the sentence stays here. of: the node of another
    hospital whose shares are at fault."""

    def __init__(self, failure: Failure, sentence: str, of: str | None = None):
        super().__init__(sentence)
        self.failure, self.of = failure, of


@dataclass(frozen=True)
class Scored:
    """Mean volume Dice over so many patients (of validation, where nothing else is said), None over none, and
    the seconds that it took."""

    val_dice: float | None = None
    val_patients: int = 0
    seconds: float = 0.0


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
        self.scored = ScoredModels(identity.file("scored.json"))
        if identity.shared_cores:  # more threads than cores slow all down
            torch.set_num_threads(max(1, identity.shared_cores // federation.clients))
        self.device = choose_device(identity.device)
        try:
            self.data = HospitalData(identity, federation, training.seed)
        except MedFLError as error:
            raise HospitalError(Failure.DATA, str(error)) from error
        self.budget = self._budget()

    def _budget(self) -> PatientBudget | None:
        """The budget of the patients' privacy, if there is one, and if it can be kept here at all."""
        promise = self.identity.patient_privacy
        if promise is None:
            return None
        try:
            budget = PatientBudget(promise.epsilon, promise.delta, self.identity.file("privacy.json"))
        except MedFLError as error:
            raise HospitalError(Failure.PRIVACY, str(error)) from error
        if self.federation.pretraining:
            raise HospitalError(
                Failure.PRIVACY,
                "pretraining changes all of the encoder, and the promise to the patients covers the last layers only; "
                "take part without --dp-sgd-epsilon, or not at all",
            )
        if self.training.norm == "batch":
            raise HospitalError(
                Failure.PRIVACY,
                "with BatchNorm a patient changes what the others' scans teach, and no "
                "privacy of patients can be promised; the server has to start with --norm group",
            )
        if budget.delta * len(self.data.split.train) >= 1:
            raise HospitalError(
                Failure.PRIVACY,
                f"--dp-sgd-delta {budget.delta:g} would allow to tell all of one of the "
                f"{counted(len(self.data.split.train), 'patient')}; choose one far below 1 / patients",
            )
        return budget

    def planned_noise(self, run: str) -> float | None:
        """The noise, in clips, with which all rounds of a run stay within the patients' budget; None without
        one, and where the run has begun."""
        if self.budget is None or self.budget.has_begun(run) or not self.federation.rounds:
            return None
        try:
            steps = self.federation.rounds * self.federation.steps_a_round(STEPS)
            return self.budget.multiplier(run, steps, CHANCE)
        except MedFLError as error:
            raise HospitalError(Failure.PRIVACY, str(error)) from error

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
        model = TransUNet(self.training.model, self.training.image_size, self.training.norm)
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

    def score(self, model: TransUNet, part: str = "val") -> Scored:
        """The model's mean volume Dice over the patients of a part. Own data of fewer than 3 give none: a mean
        of one or two is a figure of a patient. Nor do patients without any tumour, for whom an empty mask is
        perfect, and more models than runs need."""
        began, patients = time.monotonic(), self.data.split.part(part)
        if (
            self.federation.pretraining
            or not self.data.dataset.with_tumour(patients)
            or (self.identity.own_data and len(patients) < SMALLEST_GROUP)
        ):
            return Scored()
        # a share of a public dataset has no secret
        if self.identity.own_data and not self.scored.admits(
            pack(model.state_dict()), self.federation.rounds
        ):
            self._say_that_enough_was_told()
            return Scored()
        rows = score_patients(model, self.data.dataset, patients, THRESHOLD)
        return Scored(float(np.mean([row["dice"] for row in rows])), len(rows), time.monotonic() - began)

    def _say_that_enough_was_told(self) -> None:
        self.tell(
            f"the server asked for more scores or losses than {counted(self.federation.rounds, 'round')} need, and "
            "those of made-up models tell of patients; no more are told before a day has passed"
        )

    def told(self, score: Scored) -> Scored:
        """What the server gets of a score: few digits, and with a promise to patients none, because no noise
        protects it."""
        if self.budget or score.val_dice is None:
            return Scored(seconds=score.seconds)
        return replace(score, val_dice=round(score.val_dice, TOLD_DIGITS))

    def finish(self, model: TransUNet, task: Task) -> Scored:
        """Score the federation's last model. Where normalisation layers stayed here, it is one of this
        hospital's own, with its layers averaged over the rounds, and it is written down."""
        self._moments(task.run).forget()
        painter_of(self.identity, task.run).forget()
        own = self._norms(task.run).before(None) if self.federation.keep_norm_local else None
        if own is None:
            return self.score(model)
        weights = pack(model.state_dict())
        weights[norm_mask(model)] = own.average
        model.load_state_dict(unpack(weights, model.state_dict()))
        score = self.score(model)
        self._write_model(model, score, own.rounds)
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
        return Worked(
            batches.slices,
            self._loss_told(loss, task, before, passes_over_all=steps >= len(batches)),
            self.budget.spent if self.budget else None,
            time.monotonic() - began,
        ), update

    def _loss_told(
        self, loss: float, task: Train, before: torch.Tensor, passes_over_all: bool
    ) -> float | None:
        """What the server gets of the mean loss of a training from these weights, (n,) float32. Own data of fewer than
        3 patients give none, nor does a part of the slices, which can be one patient's."""
        few = len(self.data.split.train) < SMALLEST_GROUP or not passes_over_all
        if self.budget or (self.identity.own_data and few):
            return None
        if not self.identity.own_data:
            return round(loss, TOLD_DIGITS)
        way = f"{task.round} {task.rate} {to_json(self.training, self.federation)}"
        told = self.scored.loss(before, way, round(loss, TOLD_DIGITS), self.federation.rounds)
        if told is None:
            self._say_that_enough_was_told()
        return told

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
            noise = self._reserve(self.budget, task)
            learner = PrivateLearner(model, mine, self.device, noise, len(patients))
            batches = PatientBatches(self.data.dataset, patients, side, seed)
        elif self.data.unlabelled:
            painter = painter_of(self.identity, task.run).before(task.round)
            learner, batches = pretraining(model, mine, self.data.unlabelled, seed, painter)
        else:
            learner = Learner(model, mine, self.device)
            batches = TrainingBatches(self.data.dataset, patients, side, mine.batch_size, seed)
        if settings.moments == "keep" and (kept := self._moments(task.run).before(task.round)):
            learner.optimiser.load_state_dict(kept)
        if settings.strategy == "fedprox":
            learner.after_step = proximal_pull(learner.optimiser, settings.proximal_mu)
        return learner, batches

    def _reserve(self, budget: PatientBudget, task: Train) -> float:
        """Take a round's share of the patients' budget; its noise, in clips."""
        steps = self.federation.steps_a_round(STEPS)
        left = (self.federation.rounds - task.round + 1) * steps
        try:
            return budget.reserve(task.run, task.round, steps, left, CHANCE)
        except MedFLError as error:
            raise HospitalError(Failure.PRIVACY, str(error)) from error

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

    def _write_model(self, model: TransUNet, score: Scored, rounds: int) -> None:
        """Write this hospital's own model of the federation."""
        settings, own_data = self.federation, self.identity.own_data
        origin = {
            "kind": "federated",
            "hospital": self.identity.label,
            "rounds": rounds,
            "strategy": settings.strategy,
            "partition": "own data" if own_data else settings.partition,
        }
        data: dict = {
            "name": self.data.dataset.name,
            "split_sha256": self.data.split_sha256 or self.data.split.sha256(),
        }
        if not own_data:
            data["split"] = {
                "seed": self.training.seed,
                "val_fraction": settings.val_fraction,
                "test_fraction": settings.test_fraction,
            }
        mean = {"mean": score.val_dice, "median": None, "ci95": None}
        training = {
            **asdict(self.training),
            **asdict(settings),
            "rounds_done": rounds,
            "selected_by": "nothing: the last model",
        }
        scores = {"val": {"patients": score.val_patients, "volume_dice": mean}} if score.val_patients else {}
        about = describe(
            model,
            None if self.budget else self.data.images(),
            training=training,
            origin=origin,
            data=data,
            scores=scores,
            task=stored(self.data.dataset.task),
        )
        save_checkpoint(self.identity.file("federated_best.pth"), model.state_dict(), about)
