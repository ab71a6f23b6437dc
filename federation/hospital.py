"""What a hospital does with a message: answer who it is, score the model that came, train it, give back the update."""

import os
import time
import zlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from tqdm import tqdm

from batches import TrainingBatches
from checkpoint import THRESHOLD
from common import SMALLEST_GROUP, MedFLError
from dataset import load_dataset
from federation.messages import Failure, from_record, pack, to_record, unpack
from federation.settings import FederationSettings
from inference import choose_device
from partition import make_partition
from split import PARTS, make_split, split_for
from training import Learner, TrainingSettings, rate_scale, score_patients
from transunet import TransUNet


class HospitalError(MedFLError):
    """A fault with the code that the server gets to know; the sentence stays here."""

    def __init__(self, failure: Failure, sentence: str):
        super().__init__(sentence)
        self.failure = failure


def local_versions(medfl: str) -> dict[str, str]:
    """Versions of what a hospital's figures depend on."""
    return {"medfl": medfl, "flwr": version("flwr"), "torch": torch.__version__.split("+")[0], "timm": version("timm")}


class Hospital:
    """A hospital's data and its work in one federation.

    identity: what run_client.py wrote down: label, session, cid (None with own data), data (folder), device, medfl (the
    version installed here), split_file (where an own split is kept), shares_machine. Raises HospitalError for bad data.
    """

    def __init__(self, identity: dict, training: TrainingSettings, federation: FederationSettings):
        self.began = time.monotonic()
        self.identity, self.training, self.federation = identity, training, federation
        self.own_data = identity["cid"] is None
        if identity["shares_machine"]:  # with the other simulated hospitals; more threads than cores slow all down
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // federation.clients))
        self.device = choose_device(identity["device"])
        try:
            self._take_data()
        except MedFLError as error:
            raise HospitalError(Failure.DATA, str(error)) from error

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
                "images": self.dataset.image_statistics(self.split.train), "device": self.device.type, **self.hashes}

    @staticmethod
    def introduction(identity: dict) -> dict:
        """Who a hospital is, before its data are looked at."""
        return {"label": identity["label"], "session": identity["session"], "cid": identity["cid"],
                "versions": local_versions(identity["medfl"])}

    def received(self, arrays: ArrayRecord) -> TransUNet:
        """The network with the weights that came."""
        model = TransUNet(self.training.model, self.training.image_size, self.training.norm)
        model.load_state_dict(unpack(from_record(arrays), model.state_dict()))
        return model.to(self.device, memory_format=torch.channels_last)

    def score(self, model: TransUNet) -> dict:
        """Mean volume Dice over the validation patients, and how many they are. Own data of fewer than 3 give none: a
        mean of one or two is a figure of a patient."""
        began, patients = time.monotonic(), self.split.val
        if not patients or (self.own_data and len(patients) < SMALLEST_GROUP):
            return {"val_dice": None, "val_patients": 0, "seconds": 0.0}
        rows = score_patients(model, self.dataset, patients, THRESHOLD)
        return {"val_dice": float(np.mean([row["dice"] for row in rows])), "val_patients": len(rows),
                "seconds": time.monotonic() - began}

    def train(self, model: TransUNet, about: dict) -> tuple[dict, ArrayRecord]:
        """Train the model as the message says; what happened (examples, train_loss, seconds), and the new weights.

        about: round (from 1), rate (a share of the learning rate, or None for the cosine), seconds (the time there is),
        partition (its SHA-256, None where all have own data).
        """
        began, settings, number = time.monotonic(), self.federation, about["round"]
        if not self.own_data and self.hashes["partition_sha256"] != about["partition"]:
            raise HospitalError(Failure.DATA, "the dataset changed since this hospital joined, and its patients may have changed "
                                "parts; put back what it was, or start the federation anew")
        learner = Learner(model, replace(self.training, ema_decay=0.0), self.device)  # the server averages, over rounds
        if settings.strategy == "fedprox":
            learner.adjust_gradients = proximal_pull(model, settings.proximal_mu)
        model.set_encoder_trainable(number > self.training.freeze_encoder_epochs)
        seed = self.training.seed * 1_000 + zlib.crc32(self.identity["label"].encode()) % 1_000  # unlike at each hospital
        batches = TrainingBatches(self.dataset, self.split.train, self.training.image_size, self.training.batch_size, seed)
        steps = len(batches) * settings.local_epochs

        def before_step(step: int) -> bool:
            share = about["rate"]
            if share is None:
                share = rate_scale((number - 1 + step / steps) / settings.rounds, (number - 1) * steps + step,
                                   self.training.warmup_steps)
            learner.set_rate(share)
            if time.monotonic() - self.began > about["seconds"]:
                raise HospitalError(Failure.LATE, f"round {number} took longer than the server's {about['seconds']:.0f} s; "
                                    "it goes on without this hospital's update (the server's --round-timeout sets the time)")
            return True

        losses = []
        with tqdm(total=steps, desc=f"round {number}", unit="step", leave=False, disable=None) as bar:
            for local in range(settings.local_epochs):
                epoch = (number - 1) * settings.local_epochs + local + 1
                torch.manual_seed(100_003 * seed + epoch)  # for layers that draw numbers
                losses.append(learner.train_epoch(batches.epoch(epoch), before_step, bar).loss)
        weights = pack(model.state_dict())
        if not bool(torch.isfinite(weights).all()):
            raise HospitalError(Failure.TRAINING, "the trained weights are not finite and were not sent; the learning rate "
                                "(the server's --lr) may be too high")
        few = self.own_data and len(self.split.train) < SMALLEST_GROUP  # then the loss would say something of one patient
        return {"examples": batches.slices, "train_loss": None if few else float(np.mean(losses)),
                "seconds": time.monotonic() - began}, to_record(weights)


def proximal_pull(model: TransUNet, mu: float):
    """FedProx (Li et al. 2020, arXiv:1812.06127): a function that adds mu (w - w0) to each gradient, w0 the weights now."""
    start = [p.detach().clone() for p in model.parameters()]

    def pull() -> None:
        for weight, before in zip(model.parameters(), start):
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - before, alpha=mu)

    return pull
