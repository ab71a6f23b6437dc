"""What a hospital does with a message: answer who it is, score the model that came, train it, give back the update."""

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from tqdm import tqdm

from batches import TrainingBatches
from checkpoint import THRESHOLD, describe, save_checkpoint
from common import SMALLEST_GROUP, MedFLError, atomic_write
from dataset import load_dataset
from evaluation.scoring import score_patients
from federation.hospital.moments import Moments
from federation.privacy.accountant import Promise
from federation.privacy.patients import CHANCE, STEPS, PatientBatches, PrivateLearner
from federation.protocol.messages import Failure, local_versions
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import FULL, from_record, in_precision, norm_mask, pack, part_mask, unpack
from inference import choose_device
from partition import make_partition
from split import PARTS, make_split, split_for
from training import Learner, TrainingSettings, averaging_weight, rate_scale
from transunet import TransUNet


class HospitalError(MedFLError):
    """A fault with the code that the server gets to know; the sentence stays here."""

    def __init__(self, failure: Failure, sentence: str):
        super().__init__(sentence)
        self.failure = failure


class Hospital:
    """A hospital's data and its work in one federation.

    identity: who it is (`identity` above): label, session, cid (None with own data), data (folder), device, medfl (the version
    installed here), shared_cores, promise, split_file (where an own split is kept), norms_file and model_file (where own
    normalisation layers are kept, and the model with them is written), privacy_file (what of the promise is spent), optimiser_file
    (moments of the optimiser). memory: the file that keeps the last weights, for messages that bring a part of them. Raises
    HospitalError for bad data, and for settings with which the promise can't be kept.
    """

    def __init__(self, identity: dict, training: TrainingSettings, federation: FederationSettings, memory: Path):
        self.began = time.monotonic()
        self.identity, self.training, self.federation = identity, training, federation
        self.own_data = identity["cid"] is None
        self.memory = memory
        if identity["shared_cores"]:  # more threads than cores slow all down
            torch.set_num_threads(max(1, identity["shared_cores"] // federation.clients))
        self.device = choose_device(identity["device"])
        try:
            self._take_data()
        except MedFLError as error:
            raise HospitalError(Failure.DATA, str(error)) from error
        self.promise = self._promise() if identity["promise"] else None

    def _promise(self) -> Promise:
        """What this hospital promises its patients, if it can be kept here at all."""
        try:
            promise = Promise(**self.identity["promise"], ledger=Path(self.identity["privacy_file"]))
        except MedFLError as error:
            raise HospitalError(Failure.PRIVACY, str(error)) from error
        if self.training.norm == "batch":
            raise HospitalError(Failure.PRIVACY, "with BatchNorm a patient changes what the others' scans teach, and no privacy of "
                                "patients can be promised; the server has to start with --norm group")
        if promise.delta * len(self.split.train) >= 1:
            raise HospitalError(Failure.PRIVACY, f"--dp-sgd-delta {promise.delta:g} would allow to tell all of one of the "
                                f"{len(self.split.train)} patients; choose one far below 1 / patients")
        return promise

    def planned_noise(self, run: str) -> float | None:
        """The noise, in clips, with which all rounds of a run keep the promise; None where the run has begun."""
        if any(entry["run"] == run for entry in self.promise.rounds):
            return None
        try:
            return self.promise.multiplier(run, self.federation.rounds * self.federation.steps_a_round(STEPS), CHANCE)
        except MedFLError as error:
            raise HospitalError(Failure.PRIVACY, str(error)) from error

    def _reserve(self, run: str, number: int) -> float:
        """Take a round's share of the promise; its noise, in clips."""
        steps = self.federation.steps_a_round(STEPS)
        try:
            return self.promise.reserve(run, number, steps, (self.federation.rounds - number + 1) * steps, CHANCE)
        except MedFLError as error:
            raise HospitalError(Failure.PRIVACY, str(error)) from error

    def _take_data(self) -> None:
        """Find the scans and who of them trains, chooses and is kept for the test here."""
        identity, settings = self.identity, self.federation
        self.dataset = load_dataset(Path(identity["data"]), identity["label"] if self.own_data else None, progress=False)
        sites = {p.name: p.site for p in self.dataset.patients}
        self.hashes = {"split_sha256": None, "partition_sha256": None}
        fractions = (settings.val_fraction, settings.test_fraction)
        if self.own_data:  # a hash of own patients' names would say something of them
            self.split = split_for(Path(identity["split_file"]), sites, self.training.seed, *fractions)
            return
        split = make_split(sites, self.training.seed, *fractions)
        partition = make_partition(self.dataset.table, split, settings.partition, settings.clients, settings.alpha,
                                   self.training.seed)
        self.hashes = {"split_sha256": split.sha256(), "partition_sha256": partition.sha256()}
        self.split = partition.hospitals[identity["cid"]]

    def facts(self) -> dict:
        """What the server learns at joining: label, versions, counts, hashes, and what the images look like on average."""
        slices = self.dataset.table.set_index("patient")["slices"]
        parts = {part: {"patients": len(self.split.part(part)), "slices": int(slices[list(self.split.part(part))].sum())}
                 for part in PARTS}
        return {**self.introduction(self.identity), "own_data": self.own_data, "data": self.dataset.name, "parts": parts,
                "images": None if self.promise else self.dataset.image_statistics(self.split.train),
                "device": self.device.type, "patient_privacy": self.identity["promise"], **self.hashes}

    @staticmethod
    def introduction(identity: dict) -> dict:
        """Who a hospital is, before its data are looked at."""
        return {"label": identity["label"], "session": identity["session"], "cid": identity["cid"],
                "versions": local_versions(identity["medfl"])}

    def received(self, about: dict, arrays: ArrayRecord) -> TransUNet:
        """The network with the weights that came; parts that the message is `without` are those that are here."""
        model = TransUNet(self.training.model, self.training.image_size, self.training.norm)
        weights = from_record(arrays, self.federation.update_dtype)
        if about["without"]:
            came, weights = weights, torch.load(self.memory, weights_only=True)
            weights[part_mask(model, about["without"])] = came
        if self.federation.keep_norm_local and (own := self._own_norms(about["run"], about.get("round"))):
            weights[norm_mask(model)] = own["last"]
        model.load_state_dict(unpack(weights, model.state_dict()))
        self._remember(weights)
        return model.to(self.device, memory_format=torch.channels_last)

    def _remember(self, weights: torch.Tensor) -> None:
        """Keep the weights for a message that brings a part of them, if there can be one."""
        if self.federation.keep_norm_local or self.training.freeze_encoder_epochs:
            with atomic_write(self.memory, private=True) as file:
                torch.save(weights, file)

    def _own_norms(self, run: str, number: int | None) -> dict | None:
        """This hospital's normalisation layers in this run before round `number` (None: after the last): rounds, last and average,
        each (values,) float32; None at first. A round that the server asks for again begins where it began."""
        path = Path(self.identity["norms_file"])
        kept = torch.load(path, weights_only=True) if path.exists() else {"run": None}
        if kept["run"] != run or self.promise and not kept["promised"]:  # trained without noise: no promise would hold
            return None
        return kept["before"] if kept["round"] == number else kept

    def _keep_norms(self, weights: torch.Tensor, mask: torch.Tensor, run: str, number: int) -> None:
        """Keep the layers that a round gave, also for a restart; they are averaged over rounds as the server averages the rest."""
        before, last = self._own_norms(run, number), weights[mask]
        before = before and {**before, "before": None}  # one round back is enough
        rounds, average = (before["rounds"], before["average"]) if before else (0, last)
        past = averaging_weight(self.training.ema_decay, rounds) if before and self.training.ema_decay else 0.0
        with atomic_write(Path(self.identity["norms_file"]), private=True) as file:
            torch.save({"run": run, "round": number, "rounds": rounds + 1, "last": last, "promised": bool(self.promise),
                        "average": average.lerp(last, 1 - past), "before": before}, file)

    def finish(self, model: TransUNet, about: dict) -> dict:
        """Score the federation's last model. Where normalisation layers stayed here, it is one of this hospital's own, with
        its layers averaged over the rounds, and it is written down."""
        self._moments(about["run"]).forget()
        if not self.federation.keep_norm_local or not (own := self._own_norms(about["run"], None)):
            return self.score(model)
        weights = pack(model.state_dict())
        weights[norm_mask(model)] = own["average"]
        model.load_state_dict(unpack(weights, model.state_dict()))
        score = self.score(model)
        self._write_model(model, score, own["rounds"])
        return score

    def _write_model(self, model: TransUNet, score: dict, rounds: int) -> None:
        """Write this hospital's own model of the federation."""
        settings = self.federation
        origin = {"kind": "federated", "hospital": self.identity["label"], "rounds": rounds, "strategy": settings.strategy,
                  "partition": "own data" if self.own_data else settings.partition}
        data = {"name": self.dataset.name, "split_sha256": self.hashes["split_sha256"] or self.split.sha256()}
        if not self.own_data:
            data["split"] = {"seed": self.training.seed, "val_fraction": settings.val_fraction,
                             "test_fraction": settings.test_fraction}
        mean = {"mean": score["val_dice"], "median": None, "ci95": None}
        training = {**asdict(self.training), **asdict(settings), "rounds_done": rounds, "selected_by": "nothing: the last model"}
        images = None if self.promise else self.dataset.image_statistics(self.split.train)
        about = describe(model, images, training=training, origin=origin, data=data,
                         scores={"val": {"patients": score["val_patients"], "volume_dice": mean}} if score["val_patients"] else {})
        save_checkpoint(Path(self.identity["model_file"]), model.state_dict(), about)

    def score(self, model: TransUNet) -> dict:
        """Mean volume Dice over the validation patients, and how many they are. Own data of fewer than 3 give none: a
        mean of one or two is a figure of a patient."""
        began, patients = time.monotonic(), self.split.val
        if not patients or (self.own_data and len(patients) < SMALLEST_GROUP):
            return {"val_dice": None, "val_patients": 0, "seconds": 0.0}
        rows = score_patients(model, self.dataset, patients, THRESHOLD)
        return {"val_dice": float(np.mean([row["dice"] for row in rows])), "val_patients": len(rows),
                "seconds": time.monotonic() - began}

    def told(self, score: dict) -> dict:
        """What the server gets of a score: with a promise to patients none, for no noise protects it."""
        return {**score, "val_dice": None, "val_patients": 0} if self.promise else score

    def train(self, model: TransUNet, about: dict) -> tuple[dict, torch.Tensor]:
        """Train the model as the message says; what happened (examples, train_loss, seconds, patient_epsilon), and the update, (n,)
        float32: the new weights, or, in half precision and for secure aggregation, what changed.

        about: run (its random name), round (from 1), rate (a share of the learning rate, or None for the cosine), seconds (the
        time there is), partition (its SHA-256, None where all have own data).
        """
        began, settings, number = time.monotonic(), self.federation, about["round"]
        if not self.own_data and self.hashes["partition_sha256"] != about["partition"]:
            raise HospitalError(Failure.DATA, "the dataset changed since this hospital joined, and its patients may have changed "
                                "parts; put back what it was, or start the federation anew")
        rate = about["rate"]
        usual = rate is None if self.training.schedule == "cosine" else 0 < rate <= 1
        if not usual or not 1 <= number <= settings.rounds:
            raise HospitalError(Failure.CONSENT, f"the server asked for round {number} of {settings.rounds} at {rate} times the "
                                "learning rate, which the settings do not provide for; nothing was trained")
        seed = self.training.seed * 1_000 + zlib.crc32(self.identity["label"].encode()) % 1_000  # unlike at each hospital
        # the server averages, over rounds, and what it calls a batch is of all hospitals together
        mine = replace(self.training, ema_decay=0.0, batch_size=settings.batch_of_one(self.training.batch_size),
                       lr=self.training.lr * (1 if self.promise else settings.rate_factor))
        if self.promise:
            learner = PrivateLearner(model, mine, self.device, self._reserve(about["run"], number), len(self.split.train))
            batches = PatientBatches(self.dataset, self.split.train, mine.image_size, seed)
        else:
            learner = Learner(model, mine, self.device)
            batches = TrainingBatches(self.dataset, self.split.train, mine.image_size, mine.batch_size, seed)
        if settings.moments == "keep" and (kept := self._moments(about["run"]).before(number)):
            learner.optimiser.load_state_dict(kept)
        if settings.strategy == "fedprox":
            learner.after_step = proximal_pull(learner.optimiser, settings.proximal_mu)
        frozen, before = number <= self.training.freeze_encoder_epochs, pack(model.state_dict())
        model.set_encoder_trainable(not frozen)
        loss = self._train(learner, batches, about, seed)
        after, precision = pack(model.state_dict()), settings.update_dtype
        whole = precision == FULL and not settings.secure_aggregation
        update = (after if whole else after - before)[part_mask(model, settings.left_out(frozen))]
        if not bool(torch.isfinite(in_precision(update, precision)).all()):
            raise HospitalError(Failure.TRAINING, "the trained weights are not finite and were not sent; the learning rate "
                                "(the server's --lr) may be too high")
        if settings.moments == "keep":
            self._moments(about["run"]).keep(number, learner.optimiser.state_dict())
        if settings.keep_norm_local:
            self._keep_norms(after, norm_mask(model), about["run"], number)
        few = self.own_data and len(self.split.train) < SMALLEST_GROUP  # then the loss would say something of one patient
        return {"examples": batches.slices, "train_loss": None if few or self.promise else loss,
                "patient_epsilon": self.promise.spent if self.promise else None, "seconds": time.monotonic() - began}, update

    def _moments(self, run: str) -> Moments:
        return Moments(Path(self.identity["optimiser_file"]), run, bool(self.promise))

    def _train(self, learner: Learner, batches: TrainingBatches | PatientBatches, about: dict, seed: int) -> float:
        """A round's steps; the mean loss. Raises HospitalError where they take longer than the server waits."""
        number, rounds, steps = about["round"], self.federation.rounds, self.federation.steps_a_round(len(batches))
        warmup = 0 if self.promise else self.training.warmup  # few steps, of a model that is trained already
        passes, losses = math.ceil(steps / len(batches)), []

        def before_step(step: int) -> bool:
            share = about["rate"]
            if share is None:  # how far the federation is, and not this hospital
                share = rate_scale((number - 1 + step / steps) / rounds, warmup)
            learner.set_rate(share)
            if time.monotonic() - self.began > about["seconds"]:
                raise HospitalError(Failure.LATE, f"round {number} took longer than the server's {about['seconds']:.0f} s; "
                                    "it goes on without this hospital's update (the server's --round-timeout sets the time)")
            return step < steps

        with tqdm(total=steps, desc=f"round {number}", unit="step", leave=False, disable=None) as bar:
            for local in range(passes):
                epoch = (number - 1) * passes + local + 1
                torch.manual_seed(100_003 * seed + epoch)  # for layers that draw numbers
                result = learner.train_epoch(batches.epoch(epoch), before_step, bar)
                losses.append((result.loss, result.steps))
        return sum(loss * done for loss, done in losses) / steps


def proximal_pull(optimiser: torch.optim.Optimizer, mu: float) -> Callable[[], None]:
    """FedProx (Li et al. 2020, arXiv:1812.06127): a function that, after a step, draws each weight w back to w0, what it is now, by
    rate x mu x (w - w0).

    The pull is decoupled from the gradient as weight decay is in AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): in the
    gradient it would be clipped, and Adam would divide it by its own size, so that mu meant nothing.
    """
    start = [[weight.detach().clone() for weight in group["params"]] for group in optimiser.param_groups]

    @torch.no_grad()
    def pull() -> None:
        for group, before in zip(optimiser.param_groups, start):
            for weight, origin in zip(group["params"], before):
                weight.lerp_(origin, min(1.0, group["lr"] * mu))

    return pull
