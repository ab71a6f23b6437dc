"""The record of a federation's rounds: history and curves, the best model and the last one, lines on the terminal."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import MedFLError, counted
from federation.protocol.answers import Result, Trained
from federation.server.audit import AuditLog
from federation.server.history import Row, draw_curves, scores_of, table, write_history
from federation.server.judging import Scores, mean_dice
from federation.server.state import RunState, keep, keep_last
from runs.usage import in_time, memory_in_words


def row_of(number: int, label: str, told: Result, sent: int, received: int) -> Row:
    """A line of the history: a hospital's report of round `number`, and the bytes sent to it and received from it."""
    trained = told if isinstance(told, Trained) else None
    return Row(
        round=number,
        site=label,
        examples=trained.examples if trained else None,
        train_loss=trained.train_loss if trained else None,
        val_dice=told.val_dice,
        val_patients=told.val_patients,
        seconds=round(told.seconds, 2),
        bytes_sent=sent,
        bytes_received=received,
        patient_epsilon=trained.patient_epsilon if trained else None,
    )


class Record:
    """Writes the record into `out`. chooses: whether scores may select the best model, which differential privacy of
    hospitals forbids."""

    def __init__(
        self, state: RunState, out: Path, audit: AuditLog, say: Callable[[str], None], chooses: bool
    ):
        self.state, self.out, self.audit, self.say, self.chooses = state, out, audit, say, chooses

    def round(self, number: int, rows: list[Row], sent: torch.Tensor, began: float) -> None:
        """Write the results of a round.

        rows: their scores belong to the model that was sent. sent: that model's weights, (n,) float32. began: the
        round's start, monotonic.
        """
        done = self.state.progress
        scores = scores_of(
            [row for row in rows if row["examples"] is not None]
        )  # the scores of observers select nothing
        if number == 1:
            self.state.best.unlink(missing_ok=True)  # of an earlier run
        done.rows = [row for row in done.rows if row["round"] < number] + rows
        from_a_model = number > 1 or done.started_from.startswith(
            "checkpoint"
        )  # random weights are not worth keeping
        better = from_a_model and self._judge(sent, scores, number - 1)
        done.before = scores
        done.seconds += time.monotonic() - began
        hospitals = [row["site"] for row in rows]
        updates = [row["site"] for row in rows if row["examples"] is not None]
        keep_last(self.state, self.audit, "round", round=number, hospitals=hospitals, updates=updates)
        self._write_pictures()
        seconds, work = time.monotonic() - began, max(row["seconds"] for row in rows)
        left = done.seconds / number * (self.state.federation.rounds - number)
        spent = "" if done.epsilon is None else f"; epsilon {done.epsilon:.3g} of a hospital is spent"
        self.say(
            f"round {number} of {self.state.federation.rounds}: {seconds:.1f} s, of which {work:.1f} s were the "
            f"slowest hospital's "
            f"work; about {in_time(left)} left of the run; the model before it: {_in_words(scores)}"
            f"{' (best so far)' * better}{spent}\n{table(rows)}"
        )

    def end(self, rows: list[Row], weights: torch.Tensor) -> None:
        """Write the scores of the model that the run ends with, weights (n,) float32, and keep it if it is the best."""
        done, scores = self.state.progress, scores_of(rows)
        done.rows = [row for row in done.rows if row["round"] <= done.round] + rows
        if not self._judge(weights, scores, done.round) and not (self.chooses and self.state.best.exists()):
            self._keep_best(weights, {}, done.round)  # no score may choose, or no trained model was scored
        self._write_pictures()
        if rows:
            kind = " (averaged over rounds)" if self.state.average is not None else ""
            self.say(f"the last model{kind}: {_in_words(scores)}\n{table(rows)}")
        chosen = "after the last round"
        if done.scored_patients:
            dice = f"validation Dice {done.best:.3f} over {counted(done.scored_patients, 'patient')}"
            chosen = f"after round {done.best_round}, {dice}"
        self.say(f"{self.state.best}: {chosen}")
        self.say(self._spent())

    def _spent(self) -> str:
        """The time of all rounds, divided into work and waiting, and the server's peak memory."""
        done = self.state.progress
        work: dict[int, float] = {}
        for row in done.rows:
            if row["round"] <= done.round:
                work[row["round"]] = max(work.get(row["round"], 0.0), row["seconds"])
        slowest = min(sum(work.values()), done.seconds)
        return (
            f"{counted(done.round, 'round')} in {in_time(done.seconds)}: {in_time(slowest)} of the slowest hospitals' "
            f"work, {in_time(done.seconds - slowest)} of sending, waiting and summing{memory_in_words()}"
        )

    def _judge(self, weights: torch.Tensor, scores: Scores, number: int) -> bool:
        """Whether the model after round `number` is the best so far. If it is, it is kept."""
        if not self.chooses:
            return False
        better, said = self.state.judge(scores, number)
        if said:
            self.say(said)
        if better:
            self._keep_best(weights, scores, number)
        return better

    def _keep_best(self, weights: torch.Tensor, scores: Scores, number: int) -> None:
        """Write the best model so far, and its hash into the audit log."""
        keep(
            self.state.best,
            lambda path: self.state.save_best(path, weights, scores, number),
            self.audit,
            "checkpoint",
            round=number,
        )

    def _write_pictures(self) -> None:
        done = self.state.progress
        try:
            write_history(done.rows, self.out / "federated_history.csv", self.state.training.encoder)
            draw_curves(
                done.rows,
                self.out / "federated_curves.png",
                f"Federated training, {self.state.federation.strategy}, {counted(len(done.hospitals), 'hospital')}",
            )
        except MedFLError as error:  # a viewer may hold the file; both are written again after the next round
            self.say(f"history or curves were not written this time: {error}")


def _in_words(scores: Scores) -> str:
    mean, patients = mean_dice(scores)
    return (
        "no hospital sent a validation Dice"
        if mean is None
        else f"validation Dice {mean:.3f} over {counted(patients, 'patient')}"
    )
