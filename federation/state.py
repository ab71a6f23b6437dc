"""What lasts over the rounds, and how it is kept: weights, averaged weights, plateau rule, history, the best so far."""

import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from checkpoint import describe, load_checkpoint, save_checkpoint
from common import MedFLError
from federation.aggregation import Aggregator
from federation.settings import FederationSettings, from_json, to_json
from federation.weights import in_precision, pack, statistics_mask, unpack
from plausibility import pool_image_statistics
from split import PARTS
from training import PLATEAU, TrainingSettings, averaging_weight
from transunet import TransUNet

BEST, LAST = "transunet_federated_best.pth", "transunet_federated_last.pth"
SHARED = "transunet_federated_shared.pth"  # in the place of the best where hospitals keep layers: by itself it is no model


@dataclass
class Progress:
    """How far a run is. hospitals: what each that ever gave an update said at joining, by label."""

    run: str = ""  # a random name, kept over restarts
    round: int = 0
    seconds: float = 0.0
    best: float = -1.0
    best_round: int = 0
    epsilon: float | None = None  # of a hospital's differential privacy, spent so far
    scored_patients: int = 0  # behind the best: the most that any round's score was over
    started_from: str = ""  # in words: random weights, a checkpoint, ...
    init_split: str | None = None  # SHA-256 of the split that this checkpoint was trained on
    rows: list[dict] = field(default_factory=list)
    hospitals: dict[str, dict] = field(default_factory=dict)


class RunState:
    """The state of a federation between two rounds."""

    def __init__(self, model: TransUNet, training: TrainingSettings, federation: FederationSettings, out: Path, commit: str | None):
        self.model, self.training, self.federation, self.commit = model, training, federation, commit
        self.best, self.last = out / (SHARED if federation.keep_norm_local else BEST), out / LAST
        self.progress = Progress(run=secrets.token_hex(8))
        self.aggregator = Aggregator(federation, statistics_mask(model))
        self.weights = pack(model.state_dict())  # (n,) float32, as all weights here
        self.average: torch.Tensor | None = None
        self.plateau = ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=1.0), **PLATEAU)  # of a share of --lr

    @property
    def rate(self) -> float | None:
        """The share of the learning rate that hospitals take, or None where they follow the cosine."""
        return self.plateau.optimizer.param_groups[0]["lr"] if self.training.schedule == "plateau" else None

    @property
    def final_weights(self) -> torch.Tensor:
        """What the run ends with: averaged weights, if there are any."""
        return self.weights if self.average is None else self.average

    @property
    def weights_as_sent(self) -> torch.Tensor:
        """The weights that hospitals get: rounded, where they travel in half precision."""
        return in_precision(self.weights, self.federation.update_dtype)

    def take(self, weights: torch.Tensor) -> None:
        """A round is complete and gave this model."""
        self.weights = weights
        self.progress.round += 1
        if self.training.ema_decay:
            past = averaging_weight(self.training.ema_decay, self.progress.round - 1)
            self.average = weights if self.average is None else self.average.lerp(weights, 1 - past)

    def judge(self, dice: float | None, patients: int, number: int) -> bool:
        """Note the validation Dice of the model after round `number`; whether it is the best so far.

        Means over fewer patients than before, because a hospital is missing, are not compared: they would be of easier or
        harder people. With more patients than before the comparison begins anew.
        """
        done = self.progress
        if dice is None or patients < done.scored_patients:
            return False
        if patients > done.scored_patients:
            done.scored_patients, done.best = patients, -1.0
        self.plateau.step(dice)
        if dice <= done.best:
            return False
        done.best, done.best_round = dice, number
        return True

    @property
    def stopped_early(self) -> bool:
        """Whether --patience rounds went by without a better validation Dice."""
        done = self.progress
        return bool(self.training.patience and done.best >= 0 and done.round - done.best_round > self.training.patience)

    def metadata(self, score: dict | None, number: int) -> dict:
        """The checkpoint's description of this run's model after round `number`. score: mean and patients on validation, or
        None."""
        done, told = self.progress, self.progress.hospitals.values()
        simulated = [facts for facts in told if not facts["own_data"]]
        data = {"name": " and ".join(sorted({facts["data"] for facts in told})),
                "split_sha256": simulated[0]["split_sha256"] if simulated else None,
                "split": {"seed": self.training.seed, "val_fraction": self.federation.val_fraction,
                          "test_fraction": self.federation.test_fraction}}
        for part in PARTS:
            data[part] = {what: sum(facts["parts"][part][what] for facts in told) for what in ("patients", "slices")}
        images = None if self.federation.private else pool_image_statistics(
            [(f["parts"]["train"]["patients"], f["images"]) for f in told if f["images"]])  # no noise protects them
        settings = {**asdict(self.training), "encoder_weights": None, **asdict(self.federation)}
        training = {**settings, "rounds_done": number, "seconds": round(done.seconds, 1),
                    "device": " ".join(sorted({facts["device"] for facts in told})),
                    "selected_by": "patient-weighted validation mean volume Dice" if score else "nothing: the last model"}
        spent, bare = {}, set()  # hospitals that gave updates with and without privacy of patients
        for row in done.rows:
            if row.get("patient_epsilon") is not None:
                spent[row["site"]] = row["patient_epsilon"]
            elif row["examples"] is not None:
                bare.add(row["site"])
        origin = {"kind": "federated", "hospitals": len(told), "labels": sorted(done.hospitals),
                  "partition": self.federation.partition if simulated else "own data", "strategy": self.federation.strategy,
                  "rounds": number, "started_from": done.started_from,
                  "init_split_sha256": done.init_split,
                  "norm_at_hospitals": self.federation.keep_norm_local,
                  "privacy": {"secure_aggregation": self.federation.secure_aggregation, "epsilon": done.epsilon,
                              "delta": self.federation.dp_delta if self.federation.private else None,
                              "patients": {label: {"epsilon": spent[label], "delta": facts["patient_privacy"]["delta"]}
                                           for label, facts in done.hospitals.items()
                                           if facts.get("patient_privacy") and label in spent.keys() - bare}}}
        val = {"val": {"patients": score["patients"],
                       "volume_dice": {"mean": score["mean"], "median": None, "ci95": None}}} if score else {}
        about = describe(self.model, images, training=training, origin=origin, data=data, scores=val)
        about["versions"].update(commit=self.commit, flwr=next(iter(told))["versions"]["flwr"] if told else None)
        return about

    def save_best(self, weights: torch.Tensor, score: dict | None, number: int) -> None:
        """Write `transunet_federated_best.pth` from these weights, which round `number` gave."""
        save_checkpoint(self.best, unpack(weights, self.model.state_dict()), self.metadata(score, number))

    def save_last(self) -> None:
        """Write `transunet_federated_last.pth`: all that --resume needs."""
        state = {"weights": self.weights, "average": self.average, "strategy": self.aggregator.state_dict(),
                 "plateau": self.plateau.state_dict(),
                 "rate": self.plateau.optimizer.param_groups[0]["lr"], "progress": asdict(self.progress),
                 "settings": to_json(self.training, self.federation)}
        about = self.metadata(None, self.progress.round)
        save_checkpoint(self.last, unpack(self.final_weights, self.model.state_dict()), about, state)

    def restore(self, state: dict) -> None:
        """Go on from what `save_last` kept."""
        self.weights = state["weights"]
        self.average = state["average"]
        self.aggregator.load_state_dict(state["strategy"])
        self.plateau.load_state_dict(state["plateau"])
        self.plateau.optimizer.param_groups[0]["lr"] = state["rate"]
        self.progress = Progress(**state["progress"])


def load_run(out: Path) -> tuple[TrainingSettings, FederationSettings, dict, TransUNet]:
    """Settings, state and network of the run that `out` holds. Raises MedFLError where there is none to go on with."""
    last = out / LAST
    if not last.exists():
        raise MedFLError(f"there is no {last} to go on from; start without --resume")
    checkpoint = load_checkpoint(last, whole=False)
    if not checkpoint.state or "progress" not in checkpoint.state:
        raise MedFLError(f"{last} holds a model but no federation to go on with; start without --resume")
    return *from_json(checkpoint.state["settings"]), checkpoint.state, checkpoint.model
