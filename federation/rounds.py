"""The round loop: what the server does from the first hospital's joining to the last model."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from common import EXIT_NO_QUORUM, MedFLError, file_sha256
from federation.audit import AuditLog
from federation.history import draw_curves, mean_dice, table, write_history
from federation.membership import PURPOSES, Member, Membership
from federation.messages import RESULT, TRAINED, End, expect
from federation.post import NO_ANSWER, SPARE, Answer, Post
from federation.privacy import HospitalPrivacy
from federation.screening import Update, check_update, outliers
from federation.secure_round import SecureRound
from federation.settings import to_json
from federation.state import RunState
from federation.weights import FULL, from_record, in_precision, part_mask, payload, to_record

TICK = 0.2  # seconds between two looks for answers
REMIND = 60.0  # seconds between two lines that say who is missing
END_TIME = 15.0  # seconds in which hospitals may take note of the end
TRIES = 2  # of a round that too few hospitals complete


class NoQuorum(MedFLError):
    """Too few hospitals are left to go on."""


class Federation:
    """One run. resumed: it goes on with an earlier one, and need not wait for every hospital. labels: gives the label that
    each node's key stands for, or None where no keys are asked for."""

    def __init__(self, grid, state: RunState, versions: dict[str, str], out: Path, resumed: bool, audit: AuditLog,
                 labels: Callable[[], dict[int, str] | None] = lambda: None,
                 say: Callable[[str], None] = lambda line: tqdm.write(line)):
        self.state, self.out, self.resumed, self.audit, self.say = state, out, resumed, audit, say
        self.training, self.settings = state.training, state.federation
        self.about = {"settings": to_json(self.training, self.settings)}
        self.post = Post(grid)
        join = {**self.about, "versions": versions, "hospitals": self.settings.clients, "run": state.progress.run}
        self.membership = Membership(self.post, self.settings, join, state.progress.hospitals, say, audit, labels)
        self.privacy = HospitalPrivacy(self.settings) if self.settings.private else None
        self._have: set[str] = set()  # sessions of hospitals that hold a whole model, so that parts of it are enough

    def run(self) -> int:
        """All rounds; the exit code. What every round gave is on disk when it is over."""
        try:
            self._assemble()
            while self.state.progress.round < self.settings.rounds and not self.state.stopped_early:
                if self.privacy and self.privacy.exhausted(self.state.progress.round):
                    self.say(f"one round more would spend more than --dp-epsilon {self.settings.dp_epsilon:g}; stopped")
                    break
                self._round(self.state.progress.round + 1)
            if self.state.stopped_early:
                self.say(f"no better validation Dice for {self.training.patience} rounds; stopped")
            self._final_score()
        except NoQuorum as error:
            self.say(str(error))
            self.membership.end(End.QUORUM, END_TIME)
            return EXIT_NO_QUORUM
        self.membership.end(End.DONE, END_TIME)
        return 0

    def _assemble(self) -> None:
        """Wait for all hospitals; a resumed run waits no longer than a round may take, if enough are there."""
        began = time.monotonic()
        told, told_at = -1, 0.0
        while len(self.membership.members) < self.settings.clients:
            self._attend()
            count, now = len(self.membership.members), time.monotonic()
            if count != told or now - told_at > REMIND:
                told, told_at = count, now
                missing = f"; missing: {', '.join(self._missing())}" if self._missing() else ""
                self.say(f"{count} of {self.settings.clients} hospitals are here{missing}")
            if self.resumed and now - began > self.settings.round_timeout:
                if count < self.settings.beginners:
                    raise NoQuorum(self._too_few(count))
                break
            time.sleep(TICK)
        if self._missing():
            self.say("going on with those that are here")
        split = next((m.facts["split_sha256"] for m in self.membership.present if not m.facts["own_data"]), None)
        if split and self.state.progress.init_split not in (None, split):
            self.say("mind: the checkpoint that this starts from was trained on another split, so it may have seen patients that "
                     "are kept for the test here")

    def _missing(self) -> list[str]:
        """Labels that are expected and not there: those that took part before, then those whose keys are admitted, or numbers."""
        here, known, admitted = set(self.membership.members), self.state.progress.hospitals, self.membership.labels()
        others = [f"hospital-{k}" for k in range(self.settings.clients)] if admitted is None else sorted(admitted.values())
        absent = [label for label in [*sorted(known), *others] if label not in here]
        return list(dict.fromkeys(absent))[:max(self.settings.clients - len(here), 0)]

    def _too_few(self, count: int) -> str:
        missing = f" (missing: {', '.join(self._missing())})" if self._missing() else ""
        return (f"{count} of {self.settings.clients} hospitals took part and a round needs {self.settings.beginners}{missing}; "
                "see to them and go on with --resume")

    def _attend(self) -> list[Answer]:
        """One look at who comes and goes, and at the answers; those to our own questions are given back."""
        self.membership.poll()
        rest = []
        for answer in self.post.collect():
            if answer.purpose in PURPOSES:
                self.membership.handle(answer)
            else:
                rest.append(answer)
        return rest

    def _wait_for_quorum(self) -> list[Member]:
        """The members that can be given work. Raises NoQuorum where too few come within a round's time."""
        until = time.monotonic() + self.settings.round_timeout
        told = False
        while len(present := self.membership.present) < self.settings.beginners or self.membership.disputed:
            if not told and not self.membership.disputed:
                self.say(f"{len(present)} of {self.settings.clients} hospitals can work, a round needs {self.settings.beginners}; "
                         f"waiting up to {self.settings.round_timeout:.0f} s for {', '.join(self._missing()) or 'those behind'}")
                told = True
            if time.monotonic() > until:
                raise NoQuorum(self._too_few(len(present)))
            self._attend()
            time.sleep(TICK)
        return present

    def _send(self, kind: str, purpose: str, members: list[Member], about: dict, weights: torch.Tensor,
              left_out: list[str], own: dict[str, dict] | None = None) -> dict[str, int]:
        """Send the members one message with the weights; those who hold a model get it without the parts that are left out.
        own: what is said to each besides, by label. The bytes that went to each, by label."""
        holders = [m for m in members if m.session in self._have] if left_out else []
        sent = {}
        for some, without in ((holders, left_out), ([m for m in members if m not in holders], [])):
            if not some:
                continue
            part = to_record(weights[part_mask(self.state.model, without)], self.settings.update_dtype)
            message = {**self.about, "run": self.state.progress.run, "without": without, **about}
            # Flower lets the message live a little longer, so that it is we who say that somebody gave no answer in time
            time_to_live = self.settings.round_timeout + SPARE
            if own is None:
                self.post.send([m.node for m in some], kind, purpose, message, time_to_live, part)
            else:
                for member in some:
                    self.post.send([member.node], kind, purpose, message | own[member.label], time_to_live, part)
            sent |= {member.label: payload(part) for member in some}
        return sent

    def _wait(self, purpose: str, members: list[Member], title: str,
              limit: float | None = None) -> tuple[dict[str, Answer], dict[str, str]]:
        """Wait for answers, for `limit` seconds or as long as a round may take: answers, and reasons for none, by label."""
        by_node = {member.node: member for member in members}
        answers, failures = {}, {}
        limit = limit or self.settings.round_timeout
        until = time.monotonic() + limit
        with tqdm(total=len(members), desc=title, unit="hospital", leave=False, disable=None) as bar:
            while len(answers) + len(failures) < len(members) and time.monotonic() < until:
                for answer in self._attend():
                    label = by_node[answer.node].label if answer.purpose == purpose else None
                    if label is None or label in failures:
                        continue
                    if answer.failure:
                        failures[label] = answer.failure
                        if answer.failure == NO_ANSWER:
                            self.membership.fell_behind(by_node[answer.node])
                    else:
                        answers[label] = answer
                    bar.update()
                waiting = [m.label for m in members if m.label not in answers and m.label not in failures]
                for label in waiting:
                    now = self.membership.members.get(label)
                    if now and now.node not in by_node:  # what was sent to its old connection is lost
                        failures[label] = "it came back with a new connection; the next round counts on it"
                bar.set_postfix_str(f"waiting for {', '.join(waiting)}" if waiting else "", refresh=False)
                time.sleep(TICK)
        self.post.drop(purpose)
        for member in members:
            if member.label not in answers and member.label not in failures:
                failures[member.label] = f"no answer within {limit:.0f} s"
                self.membership.fell_behind(member)
        return answers, failures

    def _round(self, number: int) -> None:
        """One round: enough updates, the new model, what is written. Raises NoQuorum after two tries."""
        began, sent = time.monotonic(), self.state.weights_as_sent
        left_out = self.settings.left_out(number <= self.training.freeze_encoder_epochs)
        for attempt in range(1, TRIES + 1):
            members = self._wait_for_quorum()
            about = {"round": number, "rate": self.state.rate, "seconds": self.settings.round_timeout,
                     "partition": self.membership.partition}
            purpose = f"round-{number}.{attempt}"
            secure = self.settings.secure_aggregation and SecureRound(self.post, self._wait, self.settings, number, purpose)
            own = secure.prepare(members) if secure else None
            asked = [member for member in members if own is None or member.label in own]
            size = self._send("train", purpose, asked, about, sent, left_out, own)
            answers, failures = self._wait(purpose, asked, f"round {number} of {self.settings.rounds}")
            self._have |= {member.session for member in asked if member.label in answers}
            if secure:
                updates = self._summed(secure, answers, failures, left_out)
            else:
                updates = self._screened(number, members, answers, failures, left_out)
            for label, reason in sorted(failures.items()):
                self.say(f"round {number} without {label}: {reason}")
            if updates and len(answers) >= self.settings.quorum:
                break
            what = "has no sum" if secure else f"got {len(updates)} updates and needs {self.settings.quorum}"
            self.say(f"round {number} {what}" + ("; once more" if attempt < TRIES else ""))
        else:
            raise NoQuorum(self._too_few(len(answers)))
        rows = [self._row(number, label, answer.about, size[label], payload(answer.arrays)) for label, answer in
                sorted(answers.items())]
        for member in members:
            if member.label in answers:
                self.state.progress.hospitals[member.label] = member.facts
        if self.privacy:
            updates = [self.privacy.private_mean(updates, self.state.weights, part_mask(self.state.model, left_out))]
            self.state.progress.epsilon = self.privacy.spent(number)
        self.state.take(self.state.aggregator(number, updates, self.state.weights))
        self._record(number, rows, sent, began)
        self.audit.write("round", round=number, hospitals=sorted(answers), file=self.state.last.name,
                         sha256=file_sha256(self.state.last))
        behind = [label for label, member in self.membership.members.items() if member.behind]
        if absent := sorted({*self._missing(), *behind} - failures.keys()):
            self.say(f"  not there: {', '.join(absent)}")

    def _summed(self, secure: SecureRound, answers: dict[str, Answer], failures: dict[str, str],
                without: list[str]) -> list[Update]:
        """The mean of the updates as one, if there is a sum; answers that can't count, and who dropped out, become failures."""
        weights = secure.mean(answers, self.state.weights, part_mask(self.state.model, without))
        failures |= secure.failures
        for label, reason in sorted(secure.failures.items()):
            self.audit.write("left_out", round=secure.number, hospital=label, why=reason)
        return [] if weights is None else [Update("the mean", weights, 1)]

    def _screened(self, number: int, members: list[Member], answers: dict[str, Answer], failures: dict[str, str],
                  without: list[str]) -> list[Update]:
        """The updates that may count; the others' answers become failures, with the reason. without: parts of the weights that
        nobody sends."""
        precision, travels, sent = self.settings.update_dtype, part_mask(self.state.model, without), self.state.weights
        announced = {member.label: member.facts["parts"]["train"]["slices"] for member in members}
        updates, left_out = [], {}
        for label in sorted(answers):
            try:
                about = expect(answers[label].about, TRAINED)
                if about["round"] != number:
                    raise MedFLError(f"its update is of round {about['round']}")
                update = Update(label, from_record(answers[label].arrays, precision), about["examples"])
                check_update(update, int(travels.sum()), announced[label])
                weights = sent.clone()
                weights[travels] = update.weights + (0 if precision == FULL else sent[travels])
                updates.append(replace(update, weights=weights))
            except MedFLError as error:
                left_out[label] = str(error)
        if not self.privacy:  # whom the others leave in tells of them; under privacy the clip alone bounds an update
            left_out |= outliers(updates, sent, self.settings)
        for label, reason in sorted(left_out.items()):
            self.audit.write("left_out", round=number, hospital=label, why=reason)
            failures[label] = f"{reason}; it is left out"
            del answers[label]
        return [update for update in updates if update.label not in left_out]

    def _row(self, number: int, label: str, about: dict, sent: int, received: int) -> dict:
        return {"round": number, "site": label, "examples": about.get("examples"), "train_loss": about.get("train_loss"),
                "val_dice": about["val_dice"], "val_patients": about["val_patients"], "seconds": round(about["seconds"], 2),
                "bytes_sent": sent, "bytes_received": received, "patient_epsilon": about.get("patient_epsilon")}

    def _record(self, number: int, rows: list[dict], sent: torch.Tensor, began: float) -> None:
        """Write what a round gave, and a table on the terminal. The score in its rows is of the model that was sent."""
        done, mean, patients = self.state.progress, *mean_dice(rows)
        if number == 1:
            self.state.best.unlink(missing_ok=True)  # of an earlier run
        done.rows = [row for row in done.rows if row["round"] < number] + rows
        from_a_model = number > 1 or done.started_from.startswith("checkpoint")  # random weights are no model to keep
        better = from_a_model and not self.privacy and self.state.judge(mean, patients, number - 1)
        if better:
            self._keep_best(sent, {"mean": mean, "patients": patients}, number - 1)
        done.seconds += time.monotonic() - began
        self.state.save_last()
        self._write_pictures()
        seconds, work = time.monotonic() - began, max(row["seconds"] for row in rows)
        notes = (" (best so far)" if better else "") + self._spent_in_words()
        self.say(f"round {number} of {self.settings.rounds}: {seconds:.1f} s, of which {work:.1f} s the longest hospital's work; "
                 f"the model before it: {_score_in_words(mean, patients)}{notes}\n{table(rows)}")

    def _spent_in_words(self) -> str:
        spent = self.state.progress.epsilon
        return "" if spent is None else f"; epsilon {spent:.3g} of a hospital is spent"

    def _keep_best(self, weights: torch.Tensor, score: dict | None, number: int) -> None:
        """Write the best model so far, and its hash into the audit log."""
        self.state.save_best(weights, score, number)
        self.audit.write("checkpoint", round=number, file=self.state.best.name, sha256=file_sha256(self.state.best))

    def _final_score(self) -> None:
        """Score the model that the run ends with, and keep it if it is the best."""
        done = self.state.progress
        number = done.round + 1
        members, weights = self.membership.present, in_precision(self.state.final_weights, self.settings.update_dtype)
        size = self._send("evaluate", "final", members, {}, weights, self.settings.left_out(frozen=False))
        answers, failures = self._wait("final", members, "scoring the last model")
        for label, reason in sorted(failures.items()):
            self.say(f"the last model is not scored by {label}: {reason}")
        rows = []
        for label, answer in sorted(answers.items()):
            try:
                rows.append(self._row(number, label, expect(answer.about, RESULT), size[label], 0))
            except MedFLError as error:
                self.say(f"the last model's score by {label}: {error}")
        done.rows = [row for row in done.rows if row["round"] < number] + rows
        mean, patients = mean_dice(rows)
        if not self.privacy and self.state.judge(mean, patients, done.round):
            self._keep_best(weights, {"mean": mean, "patients": patients}, done.round)
        elif self.privacy or not self.state.best.exists():  # nothing may choose, or nobody scored a trained model
            self._keep_best(weights, None, done.round)
        self._write_pictures()
        if rows:
            kind = " (averaged over rounds)" if self.state.average is not None else ""
            self.say(f"the last model{kind}: {_score_in_words(mean, patients)}\n{table(rows)}")
        chosen = f"after round {done.best_round}, validation Dice {done.best:.3f}" if done.best >= 0 else "after the last round"
        self.say(f"{self.state.best}: {chosen}")

    def _write_pictures(self) -> None:
        done = self.state.progress
        try:
            write_history(done.rows, self.out / "federated_history.csv")
            draw_curves(done.rows, self.out / "federated_curves.png", f"Federated training, {self.settings.strategy}, "
                        f"{len(done.hospitals)} hospitals")
        except MedFLError as error:  # a viewer may hold the file; both are written anew after the next round
            self.say(f"not this time: {error}")


def _score_in_words(mean: float | None, patients: int) -> str:
    return "no validation patients" if mean is None else f"validation Dice {mean:.3f} over {patients} patients"
