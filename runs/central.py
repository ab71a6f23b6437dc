"""Training in one place: epochs, the best and the last model, history, curves, and resuming.

`train_centralized.py` starts it; cross-validation and the making of the phantom model use it as well.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from batches import TrainingBatches
from borders import escaping
from checkpoint import (
    THRESHOLD,
    Checkpoint,
    describe,
    load_checkpoint,
    save_checkpoint,
    update_metadata,
)
from common import MedFLError, counted, tell
from dataset import Dataset
from encoders.weights import go_on_from, start_model
from evaluation.curves import draw_curves
from evaluation.metrics import summarise
from evaluation.scoring import fit_temperature, score_patients
from runs.data_parallel import Processes, loss_of_all
from runs.history import HISTORY, Progress, write_history
from runs.tracking import Tracker
from runs.usage import LOG_SECONDS, RunLog, in_time, memory_in_words
from split import PARTS, Split
from tasks import stored
from training import EpochResult, Learner, TrainingSettings, plateau, rate_scale
from transunet import TransUNet


class CentralTraining:
    """A run from its first epoch to its last, by one process or several.

    split: the patients of this run. whole: the complete split, if `split` is one hospital's share of it. origin: the
    checkpoint's entry of that name. start: a checkpoint of the same network to start from. processes: those of
    torchrun; the first one scores and writes.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        settings: TrainingSettings,
        device: torch.device,
        out: Path,
        resume: bool = False,
        whole: Split | None = None,
        origin: dict | None = None,
        start: Checkpoint | None = None,
        processes: Processes | None = None,
    ):
        dataset.check_trainable(split.train)
        dataset.check_classes(settings.classes)
        self.chooses = bool(dataset.with_tumour(split.val))  # without tumour, every empty mask is perfect
        if settings.schedule == "plateau" and not self.chooses:
            raise MedFLError(
                "a plateau needs validation patients with tumour, and there are none; take --schedule cosine"
            )
        torch.manual_seed(settings.seed)
        self.dataset, self.split, self.settings, self.out = dataset, split, settings, out
        self.whole, self.origin = whole or split, origin or {"kind": "centralised"}
        self.name = "centralized" if whole is None else "local"
        self.processes = processes or Processes()
        self.learner = Learner(self._model(start, resume), self.settings, device)
        if self.processes.count > 1:
            self.processes.whole_batches(self.learner.model)
            self.learner.loss = loss_of_all
        self.batches = TrainingBatches(
            dataset, split.train, settings.image_size, settings.batch_size, settings.seed, settings.classes
        )
        self.plateau = plateau(self.learner.optimiser) if settings.schedule == "plateau" else None
        self.progress = Progress()
        self.best, self.last = (out / f"transunet_{self.name}_{which}.pth" for which in ("best", "last"))
        self.saved_epoch = 0
        self.trackers: list[Tracker] = []
        self.log = RunLog(out / f"{self.name}.log")
        if resume:
            self._resume()
        elif self.processes.first:
            self.last.unlink(missing_ok=True)  # so that a later --resume can't continue another run
        self.began = time.monotonic() - self.progress.seconds
        self.started, self.training_seconds, self.steps_a_second = time.monotonic(), 0.0, 0.0
        self.started_at = self._share_done()

    def _model(self, start: Checkpoint | None, resume: bool) -> TransUNet:
        """The network to begin with. Updates the settings to say what its encoder holds."""
        settings = self.settings
        if resume:  # its weights come with the state
            return settings.network()
        if start:
            self.settings = go_on_from(start, settings)
            return start.model
        model, self.settings, note = start_model(settings)
        if note:
            print(note)
        return model

    def _resume(self) -> None:
        """Load the state after the last complete epoch. Raises MedFLError if there is none or it has another
        split."""
        state = load_checkpoint(self.last).state
        if state is None:
            raise MedFLError(f"{self.last} holds a model but no run to continue; start without --resume")
        if state["split"] != self.split.sha256():
            raise MedFLError(
                f"{self.last} was trained on another split; name that split with --split-file, or start "
                f"without --resume"
            )
        if state.get("content", self.dataset.content) != self.dataset.content:
            tell(
                [
                    f"scans or masks in {escaping.terminal(self.dataset.root)} have changed since this run was last "
                    "trained; for a model of only the present ones, start without --resume"
                ]
            )
        self.learner.load_state_dict(state["learner"])
        if self.plateau:
            self.plateau.load_state_dict(state["plateau"])
        self.progress = Progress(**state["progress"])
        self.saved_epoch = self.progress.epoch

    def run(self) -> None:
        """Train epochs until the end that the settings name, then fit the best model's temperature."""
        while not self._finished():
            self.learner.model.set_encoder_trainable(self.progress.epoch >= self.settings.frozen_epochs)
            self.learner.network = self.processes.network(self.learner.model)
            epoch_began = time.monotonic()
            result = self._train()
            if not result.steps:
                break
            trained = time.monotonic()
            self.steps_a_second = result.steps / max(trained - epoch_began, 1e-9)
            self.training_seconds += trained - epoch_began
            val = self.split.val if self.chooses else ()
            self.progress.epoch += 1
            if self.processes.first:
                rows = score_patients(
                    self.learner.weights_model, self.dataset, val, THRESHOLD, with_loss=True
                )
                self.progress.seconds = time.monotonic() - self.began
                loss = sum(row["loss"] for row in rows) / len(rows) if rows else None
                self._record(result, summarise(rows)["volume_dice"] if rows else None, loss)
                self.progress.ending_seconds = time.monotonic() - trained
            self.progress = self.processes.agree(self.progress)
            self._keep_rates_alike()
        if self.split.val and self.best.exists() and self.processes.first:
            best = load_checkpoint(self.best, self.learner.device).model
            update_metadata(self.best, temperature=fit_temperature(best, self.dataset, self.split.val))

    def _keep_rates_alike(self) -> None:
        """Pass the learning rates to the processes that did not score: the plateau schedule changes them by the
        scores."""
        if self.plateau:
            groups = self.learner.optimiser.param_groups
            for group, rate in zip(groups, self.processes.agree([group["lr"] for group in groups])):
                group["lr"] = rate

    def _finished(self) -> bool:
        done, settings = self.progress, self.settings
        if settings.patience and self.chooses and done.epoch - done.best_epoch >= settings.patience:
            print(
                f"no better validation Dice for {counted(settings.patience, 'epoch')}; stopped after epoch {done.epoch}"
            )
            return True
        return self.processes.agree(self.is_complete)

    @property
    def is_complete(self) -> bool:
        """Whether the run has done all that its settings ask for."""
        if self.settings.minutes or self.settings.steps:
            return self._share_done() >= 1
        return self.progress.epoch >= self.settings.epochs

    def _share_done(self) -> float:
        """Share of the run that is over, 0 to 1: of its steps, or of its minutes without the time that the last
        epoch's end will take."""
        if not self.settings.minutes:
            return self.learner.step_count / (self.settings.steps or self.settings.epochs * len(self.batches))
        room = max(60 * self.settings.minutes - 1.5 * self.progress.ending_seconds, 1.0)
        return (time.monotonic() - self.began) / room

    def _time_left(self) -> str:
        """The remaining time of the whole run in words, at its speed since this process started it."""
        share = min(self._share_done(), 1.0)
        if share <= self.started_at:
            return "time left not known yet"
        left = (time.monotonic() - self.started) * (1 - share) / (share - self.started_at)
        return f"{in_time(left)} left of the run"

    def told_at_the_end(self) -> str:
        """How this process spent its time on the run, and its peak memory, in words."""
        whole = time.monotonic() - self.started
        memory = memory_in_words()
        if self.learner.device.type == "cuda":
            memory += f", {torch.cuda.max_memory_allocated(self.learner.device) / 2**30:.1f} GiB on the GPU"
        return (
            f"{in_time(whole)}: {in_time(self.training_seconds)} of training steps, "
            f"{in_time(whole - self.training_seconds)} of scoring and saving{memory}"
        )

    def _train(self) -> EpochResult:
        """One epoch's steps, under a progress bar."""

        began, first = time.monotonic(), self.learner.step_count
        told = began

        def before_step(step: int) -> bool:
            nonlocal told
            share = self._share_done()
            if self.settings.minutes:
                share = self.processes.agree(share)  # clocks differ
            if self.processes.first and time.monotonic() - told > LOG_SECONDS:
                told = time.monotonic()
                line = (
                    f"epoch {epoch}: step {step - first} of {len(self.batches)}, "
                    f"{(step - first) / (told - began):.2f} steps/s, {self._time_left()}"
                )
                self.log.write(line)
                if not sys.stderr.isatty():  # no progress bar is drawn there
                    print(line, flush=True)
            if not self.plateau:
                self.learner.set_rate(rate_scale(share, self.settings.warmup))
            return share < 1 or not (self.settings.minutes or self.settings.steps)

        epoch = self.progress.epoch + 1
        torch.manual_seed(100_003 * self.settings.seed + epoch)  # for layers that draw random numbers
        of = f" of {self.settings.epochs}" if not (self.settings.minutes or self.settings.steps) else ""
        with tqdm(
            total=len(self.batches),
            desc=f"epoch {epoch}{of}",
            unit="step",
            leave=False,
            disable=None if self.processes.first else True,
        ) as bar:
            return self.learner.train_epoch(self.processes.epoch(self.batches, epoch), before_step, bar)

    def _record(self, result: EpochResult, val: dict | None, val_loss: float | None) -> None:
        """Record the epoch: best and last checkpoint, history, curves, a line on the terminal."""
        done, learner = self.progress, self.learner
        values = (
            done.epoch,
            learner.step_count,
            round(done.seconds, 1),
            learner.optimiser.param_groups[0]["lr"],
            result.loss,
            result.dice,
            val_loss,
            val["mean"] if val else None,
            val["median"] if val else None,
            self.settings.encoder,
        )
        row = dict(zip(HISTORY, values))
        done.rows.append(row)
        better = val is None or val["mean"] > done.best
        self._save(val, better)
        self._draw()
        figures = {
            n: float(v) for n, v in row.items() if n not in ("epoch", "step") and isinstance(v, int | float)
        }
        for tracker in self.trackers:
            tracker.scalars(figures, done.epoch)
        scored = (
            f"validation loss {val_loss:.3f}, Dice {val['mean']:.3f}{' (best so far)' if better else ''}"
            if val
            else "no validation patients"
            if not self.split.val
            else "no tumour in the validation masks, so they choose no model"
        )
        line = (
            f"epoch {done.epoch:3d}  {done.seconds:6.0f} s  loss {result.loss:.3f}  batch Dice "
            f"{result.dice:.3f}  {scored}  {self.steps_a_second:.2f} steps/s, {self._time_left()}"
        )
        self.log.write(line)
        print(line, flush=True)

    def _save(self, val: dict | None, better: bool) -> None:
        """Write the last checkpoint, and before it the best if this epoch gave the best."""
        done, learner = self.progress, self.learner
        metadata = self._describe(val)
        if better:
            done.best, done.best_epoch = (val["mean"] if val else -1.0), done.epoch
            save_checkpoint(self.best, learner.weights_model.state_dict(), metadata)
        if self.plateau and val:
            self.plateau.step(val["mean"])
        state = {
            "learner": learner.state_dict(),
            "plateau": self.plateau.state_dict() if self.plateau else None,
            "progress": asdict(done),
            "split": self.split.sha256(),
            "content": self.dataset.content,
        }
        save_checkpoint(self.last, learner.weights_model.state_dict(), metadata, state)
        self.saved_epoch = done.epoch

    def _draw(self) -> None:
        """Write history and curves again."""
        try:
            write_history(self.progress.rows, self.out / f"{self.name}_history.csv")
            what = (
                "Centralised training"
                if self.name == "centralized"
                else f"Training of {self.origin['hospital']} by itself"
            )
            draw_curves(
                self.progress.rows, self.out / f"{self.name}_curves.png", f"{what} on {self.dataset.name}"
            )
        except MedFLError as error:  # a viewer may hold the file; both are written again after the next epoch
            print(f"not written this time: {escaping.terminal(error)}")

    def _describe(self, val: dict | None) -> dict:
        data: dict = {"name": self.dataset.name, "split_sha256": self.whole.sha256()}
        slices = self.dataset.table.set_index("patient")["slices"]
        for part in PARTS:
            patients = list(self.split.part(part))
            data[part] = {"patients": len(patients), "slices": int(slices[patients].sum())}
        scores = {"val": {"patients": len(self.split.val), "volume_dice": val}} if val else {}
        training = {
            **asdict(self.settings),
            "epochs_done": self.progress.epoch,
            "steps_done": self.learner.step_count,
            "seconds": round(self.progress.seconds, 1),
            "device": self.learner.device.type,
            "precision_used": str(self.learner.precision).removeprefix("torch."),
            "weights": "averaged" if self.learner.average else "raw",
            "selected_by": "validation mean volume Dice" if val else "nothing: the last averaged model",
        }
        images = self.dataset.image_statistics(self.split.train)
        return describe(
            self.learner.weights_model,
            images,
            training=training,
            origin=self.origin,
            data=data,
            scores=scores,
            task=stored(self.dataset.task),
        )
