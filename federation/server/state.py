"""What lasts over the rounds, and how it is kept: weights, averaged weights, plateau rule, history, the best so far, and the way
back to the model before."""

import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from appearance.features import pool_image_statistics
from checkpoint import describe, load_checkpoint, save_checkpoint
from common import MedFLError
from federation.protocol.answers import Facts
from federation.protocol.settings import FederationSettings, from_json, to_json
from federation.protocol.weights import in_precision, pack, statistics_mask, unpack
from federation.server.aggregation import Aggregator
from federation.server.judging import Judge, Scores, mean_dice
from split import PARTS
from training import PLATEAU, TrainingSettings, averaging_weight
from transunet import TransUNet

BEST, LAST = "transunet_federated_best.pth", "transunet_federated_last.pth"
SHARED = "transunet_federated_shared.pth"  # in the place of the best where hospitals keep layers: by itself it is no model


@dataclass
class Progress:
    """How far a run is. hospitals: what each that ever gave an update said at joining, by label. before: the scores of the model
    that the last round began with. collapses: rounds whose model was taken back."""

    run: str = ""  # a random name, kept over restarts
    round: int = 0
    seconds: float = 0.0
    judge: Judge = field(default_factory=Judge)
    before: Scores = field(default_factory=dict)
    collapses: int = 0
    epsilon: float | None = None  # of a hospital's differential privacy, spent so far
    started_from: str = ""  # in words: random weights, a checkpoint, ...
    init_split: str | None = None  # SHA-256 of the split that this checkpoint was trained on
    rows: list[dict] = field(default_factory=list)
    hospitals: dict[str, Facts] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """Mean validation Dice of the best model so far; -1 before the first."""
        dice = mean_dice(self.judge.scores)[0]
        return -1.0 if dice is None else dice

    @property
    def best_round(self) -> int:
        """The round after which that model was made."""
        return self.judge.number

    @property
    def scored_patients(self) -> int:
        """Patients behind its score."""
        return mean_dice(self.judge.scores)[1]

    def to_dict(self) -> dict:
        """As plain values, for a file."""
        return {**asdict(self), "hospitals": {label: facts.model_dump() for label, facts in self.hospitals.items()}}

    @classmethod
    def from_dict(cls, kept: dict) -> "Progress":
        """Back from `to_dict`."""
        scores = {label: tuple(score) for label, score in kept["before"].items()}
        best = {label: tuple(score) for label, score in kept["judge"]["scores"].items()}
        return cls(**{**kept, "before": scores, "judge": Judge(**{**kept["judge"], "scores": best}),
                      "hospitals": {label: Facts.model_validate(facts) for label, facts in kept["hospitals"].items()}})


class RunState:
    """The state of a federation between two rounds."""

    def __init__(self, model: TransUNet, training: TrainingSettings, federation: FederationSettings, out: Path, commit: str | None):
        self.model, self.training, self.federation, self.commit = model, training, federation, commit
        self.best, self.last = out / (SHARED if federation.keep_norm_local else BEST), out / LAST
        self.progress = Progress(run=secrets.token_hex(8))
        self.is_statistic = statistics_mask(model)  # (n,) bool
        self.aggregator = Aggregator(federation, self.is_statistic)
        self.weights = pack(model.state_dict())  # (n,) float32, as all weights here
        self.average: torch.Tensor | None = None
        self._before: dict | None = None  # what the last round began with
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

    def begin(self) -> None:
        """A round is about to be summed: keep the way back."""
        self._before = {"weights": self.weights, "average": self.average, "strategy": self.aggregator.state_dict(),
                        "round": self.progress.round}

    @property
    def can_go_back(self) -> bool:
        """Whether the model before the last round is known."""
        return self._before is not None

    def go_back(self) -> None:
        """Take the last round's model back. What it was made of, and what the strategy learnt of it, is forgotten."""
        self.weights, self.average = self._before["weights"], self._before["average"]
        self.aggregator.load_state_dict(self._before["strategy"])
        self.progress.round = self._before["round"]

    def judge(self, scores: Scores, number: int) -> tuple[bool, str | None]:
        """Note the scores of the model after round `number`: whether it is the best so far, and what is to be said besides."""
        better, said = self.progress.judge.look(scores, number)
        if scores:
            self.plateau.step(self.progress.judge.improvements)  # it waits for improvements, by whomever they are seen
        return better, said

    @property
    def stopped_early(self) -> bool:
        """Whether --patience judged rounds went by without a better model."""
        judge = self.progress.judge
        return bool(self.training.patience and judge.improvements and judge.since >= self.training.patience)

    def metadata(self, scores: Scores, number: int) -> dict:
        """The checkpoint's description of this run's model after round `number`. scores: on validation, empty without any."""
        done, told = self.progress, self.progress.hospitals.values()
        mean, patients = mean_dice(scores)
        simulated = [facts for facts in told if not facts.own_data]
        data = {"name": " and ".join(sorted({facts.data for facts in told})),
                "split_sha256": simulated[0].split_sha256 if simulated else None,
                "split": {"seed": self.training.seed, "val_fraction": self.federation.val_fraction,
                          "test_fraction": self.federation.test_fraction}}
        for part in PARTS:
            data[part] = {what: sum(getattr(facts.parts[part], what) for facts in told) for what in ("patients", "slices")}
        images = None if self.federation.private else pool_image_statistics(
            [(f.parts["train"].patients, f.images) for f in told if f.images])  # no noise protects them
        settings = {**asdict(self.training), "encoder_weights": None, **asdict(self.federation)}
        training = {**settings, "rounds_done": number, "seconds": round(done.seconds, 1),
                    "device": " ".join(sorted({facts.device for facts in told})),
                    "selected_by": "patient-weighted validation mean volume Dice" if scores else "nothing: the last model"}
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
                              "patients": {label: {"epsilon": spent[label], "delta": facts.patient_privacy.delta}
                                           for label, facts in done.hospitals.items()
                                           if facts.patient_privacy and label in spent.keys() - bare}}}
        val = {"val": {"patients": patients, "volume_dice": {"mean": mean, "median": None, "ci95": None}}} if scores else {}
        about = describe(self.model, images, training=training, origin=origin, data=data, scores=val)
        about["versions"].update(commit=self.commit, flwr=next(iter(told)).versions["flwr"] if told else None)
        return about

    def save_best(self, weights: torch.Tensor, scores: Scores, number: int) -> None:
        """Write `transunet_federated_best.pth` from these weights, which round `number` gave. scores: by which they were chosen."""
        save_checkpoint(self.best, unpack(weights, self.model.state_dict()), self.metadata(scores, number))

    def save_last(self) -> None:
        """Write `transunet_federated_last.pth`: all that --resume needs."""
        state = {"weights": self.weights, "average": self.average, "strategy": self.aggregator.state_dict(),
                 "plateau": self.plateau.state_dict(),
                 "rate": self.plateau.optimizer.param_groups[0]["lr"], "progress": self.progress.to_dict(), "before": self._before,
                 "settings": to_json(self.training, self.federation)}
        about = self.metadata({}, self.progress.round)
        save_checkpoint(self.last, unpack(self.final_weights, self.model.state_dict()), about, state)

    def restore(self, state: dict) -> None:
        """Go on from what `save_last` kept."""
        self.weights = state["weights"]
        self.average = state["average"]
        self.aggregator.load_state_dict(state["strategy"])
        self.plateau.load_state_dict(state["plateau"])
        self.plateau.optimizer.param_groups[0]["lr"] = state["rate"]
        self.progress, self._before = Progress.from_dict(state["progress"]), state["before"]


def load_run(out: Path) -> tuple[TrainingSettings, FederationSettings, dict, TransUNet]:
    """Settings, state and network of the run that `out` holds. Raises MedFLError where there is none to go on with."""
    last = out / LAST
    if not last.exists():
        raise MedFLError(f"there is no {last} to go on from; start without --resume")
    checkpoint = load_checkpoint(last, whole=False)
    if not checkpoint.state or "progress" not in checkpoint.state:
        raise MedFLError(f"{last} holds a model but no federation to go on with; start without --resume")
    try:
        Progress.from_dict(checkpoint.state["progress"])
        return *from_json(checkpoint.state["settings"]), checkpoint.state, checkpoint.model
    except (MedFLError, KeyError, TypeError, AttributeError) as error:
        raise MedFLError(f"{last} was written by another version of MedFL, whose run can't be gone on with; use that version, or "
                         f"start a new run from its model with --init {last}") from error
