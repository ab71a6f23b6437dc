"""The state that lasts over the rounds, and its files: weights, averaged weights, plateau rule, history, the best
model so far, and the state before the last round."""

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import load_checkpoint, save_checkpoint
from common import MedFLError
from federation.protocol.agreement import from_json, to_json
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import in_precision, pack, statistics_mask, unpack
from federation.server.aggregation import Aggregator
from federation.server.audit import AUDIT, AuditLog, check_file, check_line, ended_well, hashes_of
from federation.server.description import describe_run
from federation.server.judging import Scores
from federation.server.progress import Progress
from storage.files import file_sha256
from training import TrainingSettings, averaging_weight, plateau
from transunet import TransUNet

BEST, LAST = "transunet_federated_best.pth", "transunet_federated_last.pth"
# replaces the best model's file if hospitals keep layers or train only the encoder: by itself it is not a whole model
SHARED = "transunet_federated_shared.pth"


class RunState:
    """The state of a federation between two rounds."""

    def __init__(
        self,
        model: TransUNet,
        training: TrainingSettings,
        federation: FederationSettings,
        out: Path,
        commit: str | None,
    ):
        self.model, self.training, self.federation, self.commit = model, training, federation, commit
        partial = federation.keep_norm_local or federation.pretraining
        self.best, self.last = out / (SHARED if partial else BEST), out / LAST
        self.progress = Progress(run=secrets.token_hex(8))
        self.is_statistic = statistics_mask(model)  # (n,) bool
        self.aggregator = Aggregator(federation, self.is_statistic)
        self.weights = pack(model.state_dict())  # (n,) float32, as all weights here
        self.average: torch.Tensor | None = None
        self.audited: tuple[int, str] | None = None  # the audit log's end when this state was written
        self._before: dict = {}  # the state before the last round; empty if it is not known
        self.plateau = plateau(torch.optim.SGD([torch.zeros(1)], lr=1.0))  # its rate is a share of --lr

    @property
    def rate(self) -> float | None:
        """The share of the learning rate that hospitals use, or None if they follow the cosine schedule."""
        return self.plateau.optimizer.param_groups[0]["lr"] if self.training.schedule == "plateau" else None

    @property
    def final_weights(self) -> torch.Tensor:
        """The weights that the run ends with: the averaged ones, if there are any."""
        return self.weights if self.average is None else self.average

    @property
    def weights_as_sent(self) -> torch.Tensor:
        """The weights that hospitals get: rounded, if they are sent in half precision."""
        return in_precision(self.weights, self.federation.update_dtype)

    @property
    def weights_to_score(self) -> torch.Tensor:
        """The weights that the run ends with, rounded as they are sent."""
        return in_precision(self.final_weights, self.federation.update_dtype)

    def take(self, weights: torch.Tensor) -> None:
        """Take these weights as the model of a complete round."""
        self.weights = weights
        self.progress.round += 1
        if self.training.ema_decay:
            past = averaging_weight(self.training.ema_decay, self.progress.round - 1)
            self.average = weights if self.average is None else self.average.lerp(weights, 1 - past)

    def begin(self) -> None:
        """Keep the present state, so that the round which is about to be summed can be taken back."""
        self._before = {
            "weights": self.weights,
            "average": self.average,
            "strategy": self.aggregator.state_dict(),
            "round": self.progress.round,
        }

    @property
    def can_go_back(self) -> bool:
        """Whether the state before the last round is known."""
        return bool(self._before)

    def go_back(self) -> None:
        """Return to the state before the last round, also of the strategy."""
        self.weights, self.average = self._before["weights"], self._before["average"]
        self.aggregator.load_state_dict(self._before["strategy"])
        self.progress.round = self._before["round"]

    def judge(self, scores: Scores, number: int) -> tuple[bool, str | None]:
        """Note the scores of the model after round `number`. Returns whether it is the best so far, and a sentence to
        print, if any."""
        better, said = self.progress.judge.look(scores, number)
        if scores:
            self.plateau.step(
                self.progress.judge.improvements
            )  # the rule waits for improvements, whichever hospitals see them
        return better, said

    @property
    def stopped_early(self) -> bool:
        """Whether --patience judged rounds went by without a better model."""
        judge = self.progress.judge
        return bool(self.training.patience and judge.improvements and judge.since >= self.training.patience)

    def metadata(self, scores: Scores, number: int) -> dict:
        """The checkpoint's description of this run's model after round `number`. scores: on validation, empty
        without any."""
        return describe_run(
            self.model, self.training, self.federation, self.progress, self.commit, scores, number
        )

    def save_best(self, path: Path, weights: torch.Tensor, scores: Scores, number: int) -> None:
        """Write these weights, the result of round `number`, to `path`, as `transunet_federated_best.pth`. scores: the
        scores by which they were chosen."""
        about = self.metadata(scores, number)
        about["training"]["weights"] = "averaged" if self._is_average(weights) else "raw"
        save_checkpoint(path, unpack(weights, self.model.state_dict()), about)

    def _is_average(self, weights: torch.Tensor) -> bool:
        """Whether weights, (n,) float32, are those averaged over the rounds, as they are sent."""
        sent = None if self.average is None else in_precision(self.average, self.federation.update_dtype)
        return sent is not None and torch.equal(weights, sent)

    def save_last(self, path: Path | None = None) -> None:
        """Write `transunet_federated_last.pth`, or another file, with everything that --resume needs."""
        state = {
            "weights": self.weights,
            "average": self.average,
            "strategy": self.aggregator.state_dict(),
            "plateau": self.plateau.state_dict(),
            "rate": self.plateau.optimizer.param_groups[0]["lr"],
            "progress": self.progress.to_dict(),
            "before": self._before or None,
            "settings": to_json(self.training, self.federation),
            "audited": self.audited,
        }
        about = self.metadata({}, self.progress.round)
        save_checkpoint(path or self.last, unpack(self.final_weights, self.model.state_dict()), about, state)

    def restore(self, state: dict) -> None:
        """Continue from the state that `save_last` wrote."""
        self.weights = state["weights"]
        self.average = state["average"]
        self.aggregator.load_state_dict(state["strategy"])
        self.plateau.load_state_dict(state["plateau"])
        self.plateau.optimizer.param_groups[0]["lr"] = state["rate"]
        self.progress, self._before = Progress.from_dict(state["progress"]), state["before"] or {}


def with_rounds(federation: FederationSettings, rounds: int | None, done: int) -> FederationSettings:
    """The settings of a run that continues, with the number of rounds that is asked for now, but no fewer than are
    done. Raises MedFLError for more rounds if the noise was calculated for the former number."""
    if rounds is None or rounds == federation.rounds:
        return federation
    if rounds > federation.rounds and federation.private and federation.dp_noise_multiplier is None:
        raise MedFLError(
            f"the noise of this run was calculated from --dp-epsilon for {federation.rounds} rounds, and more "
            "rounds would exceed that epsilon; start a new run from its model with --init"
        )
    return replace(federation, rounds=max(rounds, done, 1))


def nothing_left(out: Path, rounds: int | None) -> bool:
    """Whether the run in `out` is over, according to its log, and no more rounds are asked for."""
    _, federation, kept, _ = load_run(out)
    done = kept["progress"]["round"]
    return ended_well(out / AUDIT) and (rounds in (None, federation.rounds) or rounds <= done)


def keep(path: Path, write: Callable[[Path], None], audit: AuditLog, event: str, **about) -> None:
    """Write a file of the run with `write`. Its hash goes into the audit log before the file is put in its place; a
    server that is killed between the two puts it there when it continues."""
    new = _beside(path)
    write(new)
    audit.write(event, **about, file=path.name, sha256=file_sha256(new))
    os.replace(new, path)


def keep_last(state: RunState, audit: AuditLog, event: str, **about) -> None:
    """Write `transunet_federated_last.pth`, as `keep` does."""
    state.audited = audit.end
    keep(state.last, state.save_last, audit, event, **about)


def finish_keeping(path: Path, log: Path) -> None:
    """Put a file that a killed server wrote in its place, if its hash is in the log."""
    new = _beside(path)
    if not new.exists():
        return
    said = hashes_of(path.name, log)
    if said and said[-1] == file_sha256(new):
        os.replace(new, path)
    new.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".new-{path.name}")


def check_best(out: Path) -> None:
    """Raises MedFLError if the best model of a continued run is not the one in its log: it would be scored and sent
    to the hospitals."""
    for path in (out / BEST, out / SHARED):
        finish_keeping(path, out / AUDIT)
        if path.exists():
            check_file(path, out / AUDIT)


def load_run(out: Path) -> tuple[TrainingSettings, FederationSettings, dict, TransUNet]:
    """Settings, state and network of the run that `out` holds. Raises MedFLError if there is no run to continue."""
    last = out / LAST
    if not last.exists():
        raise MedFLError(f"there is no {last} to continue from; start without --resume")
    finish_keeping(last, out / AUDIT)
    check_file(last, out / AUDIT)
    checkpoint = load_checkpoint(last, whole=False)
    if not checkpoint.state or "progress" not in checkpoint.state:
        raise MedFLError(f"{last} holds a model but no federation to continue; start without --resume")
    if audited := checkpoint.state.get("audited"):
        number, sha256 = audited
        check_line(out / AUDIT, number, sha256, str(last))
    try:
        Progress.from_dict(checkpoint.state["progress"])
        settings = _as_now(checkpoint.state["settings"])
        return *from_json(settings, stored=True), {**checkpoint.state, "settings": settings}, checkpoint.model
    except (MedFLError, KeyError, TypeError, AttributeError) as error:
        raise MedFLError(
            f"{last} was written by another version of MedFL, and this version can't continue its run; use that "
            f"version, or start a new run from its model with --init {last}"
        ) from error


def _as_now(settings: str) -> str:
    """The settings of a stored run, as of today. Before --encoder two other settings named the encoder's weights."""
    content = json.loads(settings)
    if "encoder" not in content["training"]:
        content["training"].pop("encoder_weights", None)
        loaded = content["training"].pop("pretrained", False)
        content["training"]["encoder"] = "pretrained" if loaded else "random"
    return json.dumps(content)
