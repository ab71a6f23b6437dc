"""The round loop: the server's work from the first hospital's joining to the last model."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch

from common import EXIT_NO_QUORUM, counted
from federation.privacy.hospitals import HospitalPrivacy
from federation.protocol.agreement import to_json
from federation.protocol.answers import Result, announced, parse
from federation.protocol.log import say as say_on_the_terminal
from federation.protocol.messages import End
from federation.protocol.weights import part_mask
from federation.server.aggregation import ROBUST
from federation.server.audit import AuditLog
from federation.server.collector import Collected, Collector
from federation.server.ending import Ending
from federation.server.energy import FederationEnergy
from federation.server.exchange import Exchange, NoQuorum
from federation.server.history import Row, scores_of
from federation.server.judging import Scores, collapsed, mean_dice
from federation.server.mailbox import Answer, Mailbox
from federation.server.membership import Member, Membership
from federation.server.record import Record, row_of
from federation.server.screening import COMPARED
from federation.server.state import RunState, keep_last
from federation.server.updates import Updates
from storage.files import write_json

END_TIME = 15.0  # seconds in which hospitals may confirm the end
TRIES = 2  # for a round that too few hospitals complete
SHARE = 0.5  # a round with updates of less than this share of the hospitals does not count, whatever --min-clients is
OFTEN = 2  # collapses after which every round's updates are combined by the median


class Federation:
    """One run. resumed: whether it continues an earlier one; then it does not wait for every hospital. labels:
    returns the label that belongs to each node's key, or None if the server asks for no keys. keys: returns these
    keys. until: returns the days on which their admissions end."""

    def __init__(
        self,
        grid,
        state: RunState,
        versions: dict[str, str],
        out: Path,
        resumed: bool,
        audit: AuditLog,
        labels: Callable[[], dict[int, str] | None] = lambda: None,
        say: Callable[[str], None] = say_on_the_terminal,
        keys: Callable[[], dict[int, str] | None] = lambda: None,
        until: Callable[[], dict[int, str]] = dict,
        energy: bool = False,
    ):
        self.state, self.out, self.resumed, self.audit, self.say = state, out, resumed, audit, say
        self.training, self.settings = state.training, state.federation
        settings = {"settings": to_json(self.training, self.settings), "run": state.progress.run}
        join = {**settings, "versions": versions, "hospitals": self.settings.clients}
        self.mailbox = Mailbox(grid, keys)
        self.membership = Membership(
            self.mailbox, self.settings, join, state.progress.hospitals, say, audit, labels, until
        )
        self.exchange = Exchange(
            self.mailbox,
            self.membership,
            self.settings,
            settings,
            state.model,
            lambda: list(state.progress.hospitals),
            say,
        )
        self.privacy = HospitalPrivacy(self.settings) if self.settings.private else None
        self.record = Record(state, out, audit, say, chooses=self.privacy is None)
        self.collector = Collector(state, self.exchange, out)
        self.ending = Ending(state, self.exchange, out, audit, say)
        self.energy = FederationEnergy(out, state.progress.energy, resumed) if energy else None
        # the updates of the last round's model, until hospitals have scored it
        self._last: Updates | None = None
        self._robust = False  # whether they were combined by the median
        self._unexplained = 0  # rounds in a row without a sum for which no hospital can be named

    def run(self) -> int:
        """Run all rounds; returns the exit code. The result of each round is on disk when the round is over."""
        try:
            self.exchange.assemble(self.resumed)
            self._warn_of_another_split()
            while self.state.progress.round < self.settings.rounds and not self.state.stopped_early:
                if self.privacy and self.privacy.exhausted(self.state.progress.round):
                    self.say(
                        f"one more round would spend more than --dp-epsilon {self.settings.dp_epsilon:g}; "
                        f"stopped"
                    )
                    break
                self._round(self.state.progress.round + 1)
            if self.state.stopped_early:
                self.say(f"no better validation Dice for {counted(self.training.patience, 'round')}; stopped")
            self._final_score()
            if self.settings.pretraining:
                self.ending.keep_encoder()
            else:
                self.ending.test()
            if self.energy:
                self.ending.keep_energy(self.energy)
            if not self.settings.pretraining:
                self.ending.deliver()
        except NoQuorum as error:
            self.say(str(error))
            self.membership.end(End.QUORUM, END_TIME)
            return EXIT_NO_QUORUM
        finally:
            self._forget_updates()
        self.membership.end(End.DONE, END_TIME)
        return 0

    def evaluate(self, about: dict[str, str]) -> int:
        """Score the model on the hospitals' test patients without training; returns the exit code. about: the name
        and SHA-256 of the model's file."""
        name = about["model"]
        try:
            self.exchange.assemble(resumed=False, observers=True)
            self._warn_of_another_split()
            score = self.ending.score(name, self.state.weights, "model")
        except NoQuorum as error:
            self.say(str(error))
            self.membership.end(End.QUORUM, END_TIME)
            return EXIT_NO_QUORUM
        path = self.out / f"{Path(name).stem}_test.json"
        write_json(path, {**about, "score": score})
        self.say(f"wrote {path}")
        if score:
            said = (
                f"test Dice {score['volume_dice']['mean']:.3f} over {counted(score['patients'], 'patient')}"
            )
            self.audit.write("scored", **about, hospitals=sorted(score["hospitals"]), why=said)
        self.membership.end(End.DONE, END_TIME)
        return 0

    def _warn_of_another_split(self) -> None:
        split = next((m.facts.split_sha256 for m in self.membership.present if not m.facts.own_data), None)
        if split and self.state.progress.init_split not in (None, split):
            self.say(
                "note: the checkpoint that this run starts from was trained with another split, so it may have "
                "seen patients that this run keeps for the test"
            )

    def _round(self, number: int) -> None:
        """One round: collect enough updates, make the new model, write the results. Raises NoQuorum after two tries
        without enough updates."""
        began, tries, sent = time.monotonic(), 0, self.state.weights_as_sent
        expected: set[str] = set()  # the members at the start of any try
        for attempt in count(1):
            asked = self.collector.collect(number, attempt, self.membership.partition)
            expected |= {member.label for member in asked.members}
            self._add_energy({**asked.told, **asked.observed})
            ruined = self._collapsed(asked.scores) or self._can_hardly_train(asked)
            if ruined and self._take_back(asked.scores):
                if self.settings.secure_aggregation:  # hospitals take part in the sum of a round only once
                    return self._give_up(number, asked)
                asked.updates.close()
                sent = self.state.weights_as_sent
                continue
            self._look_through(number, asked)
            if asked.lost:
                self._give_up(number, asked)
                return self._end_if_nobody_is_found(asked)
            self._unexplained = 0
            here = expected & {*self.membership.members, *asked.told}
            needed = max(self.settings.quorum, math.ceil(SHARE * len(here)))
            if len(asked.updates) and len(asked.told) >= needed:
                break
            tries += 1
            asked.updates.close()
            got = f"got {len(asked.told)} updates and needs {needed}"
            what = "has no sum" if self.settings.secure_aggregation else got
            self.audit.write("failed", round=number, updates=len(asked.told), needed=self.settings.quorum)
            self.say(f"round {number} {what}" + ("; trying again" if tries < TRIES else ""))
            if tries == TRIES:
                raise NoQuorum(self.exchange.too_few(len(asked.told)))
        new = asked.told.keys() - self.state.progress.hospitals.keys()
        for member in asked.members:
            if member.label in asked.told:
                self.state.progress.hospitals[member.label] = member.facts
        self._sum(number, asked.updates)
        told = {**asked.told, **asked.observed}
        rows = [row_of(number, label, said, *asked.bytes[label]) for label, said in sorted(told.items())]
        self.record.round(number, rows, sent, began)
        if number > 1 and new:
            self.say(f"  new from this round on: {', '.join(sorted(new))}")
        behind = [label for label, member in self.membership.members.items() if member.behind]
        if absent := sorted({*self.exchange.missing(), *behind} - asked.failures.keys()):
            self.say(f"  not there: {', '.join(absent)}")

    def _add_energy(self, told: Mapping[str, Result]) -> None:
        for label, one in told.items():
            if self.energy:
                self.energy.add(label, one)

    def _can_hardly_train(self, asked: Collected) -> bool:
        """Whether half or more of the hospitals can't train the model. It is useless then, whatever scores the others
        send; a hospital that fails sends none."""
        many = 2 * len(asked.unable) >= len(asked.members) > 0
        return not self.privacy and self.state.can_go_back and many

    def _end_if_nobody_is_found(self, asked: Collected) -> None:
        """Raises NoQuorum after two rounds in a row without a sum for which no hospital can be named."""
        self._unexplained = 0 if asked.blamed else self._unexplained + 1
        if self._unexplained == TRIES:
            raise NoQuorum(
                "the last two rounds have no sum, and masks hide which hospital made it impossible; revoke or leave "
                "out one hospital after another, and continue with --resume"
            )

    def _give_up(self, number: int, asked: Collected) -> None:
        """Skip a round whose sum became impossible, or whose model was ruined. It can't be repeated, because
        hospitals have given their shares of this round and don't give them again."""
        asked.updates.close()
        self._forget_updates()
        self.state.begin()
        self.state.take(self.state.weights)
        keep_last(self.state, self.audit, "lost", round=number)
        self.say(f"round {number} is lost; the model stays as it was before that round")

    def _look_through(self, number: int, asked: Collected) -> None:
        """Compare the updates with each other, and report the hospitals whose update does not count."""
        # Under differential privacy updates are not compared: whether one is left out would depend on the others and
        # so reveal something about them that no noise covers. The clip bounds each update instead. A secure sum has
        # no single updates.
        if not self.privacy and not self.settings.secure_aggregation:
            self.collector.screen(asked)
        for label, proof in sorted(asked.proofs.items()):
            self.audit.write("signed", hospital=label, **asdict(proof), signature_sha256=proof.sha256)
        for update in asked.updates:
            if update.aside:
                self.audit.write("statistics_left_out", round=number, hospital=update.label, why=update.aside)
                self.say(
                    f"round {number}: {update.label}'s change of the statistics {update.aside}; "
                    "its statistics don't count, its trained weights do"
                )
        for label, why in sorted(asked.blamed.items()):
            self.audit.write("blamed", round=number, hospital=label, why=why)
            self.say(f"round {number}: {label} broke the secure aggregation: {why}")
        for label, reason in sorted(asked.failures.items()):
            self.audit.write(
                "left_out", round=number, hospital=label, why=reason.removesuffix("; it is left out")
            )
            self.say(f"round {number} without {label}: {reason}")

    def _sum(self, number: int, updates: Updates) -> None:
        """Combine the updates into the round's model."""
        self._forget_updates()
        self._robust = self.state.progress.collapses >= OFTEN and len(updates) >= COMPARED
        self.state.begin()
        if self.privacy:
            left_out = self.settings.left_out(number <= self.training.frozen_epochs)
            mean = self.privacy.private_mean(
                updates.sent, updates.blocks, part_mask(self.state.model, left_out)
            )
            updates.close()
            updates = Updates(self.state.weights, self.state.is_statistic, self.out)
            updates.add("the noised mean", mean, 1)
            self.state.progress.epsilon = self.privacy.spent(number)
        self.state.take(self.state.aggregator(number, updates, self._robust))
        self._last = updates

    def _forget_updates(self) -> None:
        if self._last is not None:
            self._last.close()
        self._last = None

    def _collapsed(self, now: Scores) -> bool:
        """Whether the hospitals' scores show that the last round ruined the model. Under differential privacy no score
        decides anything."""
        return not self.privacy and self.state.can_go_back and collapsed(self.state.progress.before, now)

    def _take_back(self, now: Scores) -> bool:
        """Go back to the model before the last round. Then take the median of that round's updates or, if that
        collapsed as well or can't be computed, skip the round. Returns False if nothing more can be done."""
        done, number = self.state.progress, self.state.progress.round
        before, after = (
            mean_dice({label: scores[label] for label in done.before.keys() & now.keys()})[0] or 0.0
            for scores in (done.before, now)
        )
        found = f"mean Dice {before:.3f} before it, {after:.3f} after it"
        if not self._collapsed(now):
            found = "half or more of the hospitals can't train it"
        updates, robust = self._last, self._robust or self.settings.strategy == ROBUST
        if updates is None and self._robust:
            return False
        self.state.go_back()
        self._last, self._robust = None, True
        if updates and len(updates) >= COMPARED and not robust:
            self.state.take(self.state.aggregator(number, updates, robust=True))
            self._last, what = updates, "its updates are combined by their median instead"
        else:
            self.state.take(self.state.weights)
            what = "the model stays as it was before it"
            if updates:
                updates.close()
        done.collapses += 1
        self.say(
            f"round {number} ruined the model ({found}): it is taken back, and "
            + what
            + ("; from now on every round is combined by the median" if done.collapses == OFTEN else "")
        )
        keep_last(
            self.state,
            self.audit,
            "collapse",
            round=number,
            dice_before=round(before, 4),
            dice_after=round(after, 4),
            then=what,
        )
        return True

    def _final_score(self) -> None:
        """Score the model that the run ends with, and keep it if it is the best. If it collapsed, the last round is
        taken back."""
        for attempt in count(1):
            weights = self.state.weights_to_score
            rows = self._scored(weights, self.state.progress.round + 1, f"final.{attempt}")
            if not (self._collapsed(scores_of(rows)) and self._take_back(scores_of(rows))):
                break
        self.record.end(rows, weights)

    def _scored(self, weights: torch.Tensor, number: int, purpose: str) -> list[Row]:
        """The rows of the hospitals that scored these weights, as rows of round `number`."""
        members = self.membership.present
        size = self.exchange.send(
            "evaluate", purpose, members, {}, weights, self.settings.left_out(frozen=False)
        )
        results = {}

        def take(member: Member, answer: Answer) -> None:
            result = parse(Result, answer.about)
            announced(result, member.facts)
            results[member.label] = result

        _, failures = self.exchange.wait(purpose, members, "scoring the last model", take=take)
        self._add_energy(results)
        for label, reason in sorted(failures.items()):
            self.say(f"the last model was not scored by {label}: {reason}")
        return [row_of(number, label, result, size[label], 0) for label, result in sorted(results.items())]
