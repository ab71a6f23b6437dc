"""After the last round: the federation's score on patients that no hospital trained on, and the delivery of the
model to every hospital."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint import load_checkpoint, read_metadata, update_metadata
from common import __version__, counted, utc_now
from encoders.autoencoder import write_encoder
from federation.protocol.agreement import to_json
from federation.protocol.answers import Tested, announced, parse
from federation.protocol.messages import Query
from federation.protocol.weights import in_precision, model_hash, pack, to_record, unpack
from federation.server.audit import AuditLog
from federation.server.energy import FederationEnergy
from federation.server.exchange import Exchange
from federation.server.mailbox import NOT_ADMITTED, Answer
from federation.server.membership import Member
from federation.server.state import RunState, keep
from runs.energy import in_words, summed
from storage.files import file_sha256, write_json

TEST, ENCODER_FILE = "federated_test.json", "encoder.safetensors"
DRAWS = 2_000  # of the interval
LEAST = 3  # hospitals, for an interval over hospitals


def pooled(results: dict[str, Tested]) -> dict | None:
    """The hospitals' test scores combined; None without any.

    mean: of the volume Dice over all patients. ci95: the mean's 95 % interval for other hospitals, by resampling
    whole hospitals (percentile bootstrap; Field and Welsh 2007, doi:10.1111/j.1467-9868.2007.00593.x); None for
    fewer than three hospitals. worst: the hospital with the lowest mean. spread: the highest mean minus the lowest.
    """
    scores = {
        label: (r.test_dice, r.test_patients) for label, r in results.items() if r.test_dice is not None
    }
    if not scores:
        return None
    means = np.array([dice for dice, _ in scores.values()], dtype=float)
    patients = np.array([count for _, count in scores.values()], dtype=float)
    ci95 = None
    if len(scores) >= LEAST:
        drawn = np.random.default_rng(0).integers(0, len(means), (DRAWS, len(means)))
        again = (means[drawn] * patients[drawn]).sum(axis=1) / patients[drawn].sum(axis=1)
        ci95 = [round(float(value), 6) for value in np.percentile(again, (2.5, 97.5))]
    worst = min(sorted(scores), key=lambda label: scores[label][0])  # among equals, the first by name
    return {
        "patients": int(patients.sum()),
        "volume_dice": {
            "mean": float((means * patients).sum() / patients.sum()),
            "median": None,
            "ci95": ci95,
        },
        "hospitals": {
            label: {"mean": dice, "patients": count} for label, (dice, count) in sorted(scores.items())
        },
        "worst": worst,
        "spread": float(means.max() - means.min()),
    }


def table(what: str, score: dict) -> str:
    """A pooled score as lines of text."""
    dice = score["volume_dice"]
    interval = f" (95 % by hospital {dice['ci95'][0]:.3f} to {dice['ci95'][1]:.3f})" if dice["ci95"] else ""
    lines = [
        f"{what}: test Dice {dice['mean']:.3f}{interval} over {counted(score['patients'], 'patient')} of "
        f"{counted(len(score['hospitals']), 'hospital')}; the worst is {score['worst']}, the spread "
        f"{score['spread']:.3f}",
        f"  {'hospital':18}{'test Dice':>10}{'patients':>10}",
    ]
    lines += [
        f"  {label:18}{one['mean']:>10.3f}{one['patients']:>10}" for label, one in score["hospitals"].items()
    ]
    return "\n".join(lines)


class Ending:
    """What follows the last round."""

    def __init__(
        self, state: RunState, exchange: Exchange, out: Path, audit: AuditLog, say: Callable[[str], None]
    ):
        self.state, self.exchange, self.out, self.audit, self.say = state, exchange, out, audit, say

    def test(self) -> None:
        """Let the hospitals score the best model and the last one on their test patients. The scores are written to
        a file, and the best model's score also into its card."""
        if self.state.federation.keep_norm_local:
            return  # each hospital has a model of its own, and scores it there
        last = self.state.weights_to_score
        best = pack(load_checkpoint(self.state.best).model.state_dict()) if self.state.best.exists() else last
        scores = {"best": self.score("the best model", best, "best")}
        same = torch.equal(in_precision(best, self.state.federation.update_dtype), last)
        scores["last"] = scores["best"] if same else self.score("the last model", last, "last")
        if not any(scores.values()):
            return
        write_json(self.out / TEST, scores)
        # no noise covers a score, so a model that has to be private carries none
        if scores["best"] and self.state.best.exists() and not self.state.federation.private:
            about = read_metadata(self.state.best)
            self._update_best(scores={**about.get("scores", {}), "test": scores["best"]})

    def keep_energy(self, energy: FederationEnergy) -> None:
        """Write the run's use of electricity, also into the best model's card unless the run is private."""
        done = self.state.progress
        used = summed(energy.write())
        moved = sum(row["bytes_sent"] + row["bytes_received"] for row in done.rows)
        score = None
        if self.state.best.exists() and not self.state.federation.private:
            score = read_metadata(self.state.best).get("scores", {}).get("test")
            used |= {"hospitals": sorted(energy.hospitals), "bytes_moved": moved}
            self._update_best(energy=used)
        dice = score["volume_dice"]["mean"] if score else None
        reporting = f"the server and {len(energy.hospitals)} of {counted(len(done.hospitals), 'hospital')}"
        self.say(f"{in_words(used, dice)}, of {reporting}; {moved / 1e6:.0f} MB moved")

    def _update_best(self, **entries: Any) -> None:
        """Put entries into the best model's metadata, and the file's new hash into the audit log."""

        def write(path: Path) -> None:
            shutil.copyfile(self.state.best, path)
            update_metadata(path, **entries)

        number = self.state.progress.judge.number
        keep(self.state.best, write, self.audit, "checkpoint", round=number)

    def keep_encoder(self) -> None:
        """Write the result of pretraining: the encoder, as a file that `--encoder` takes."""
        model, done, path = self.state.model, self.state.progress, self.out / ENCODER_FILE
        model.load_state_dict(unpack(self.state.weights_to_score, model.state_dict()))
        about = {
            "medfl": __version__,
            "method": "masked autoencoding",
            "settings": json.loads(to_json(self.state.training, self.state.federation)),
            "rounds_done": done.round,
            "run": done.run,
            "created": utc_now(),
        }
        if not self.state.federation.private:  # privacy hides which hospitals took part
            parts = [facts.parts["train"] for facts in done.hospitals.values()]
            about |= {
                "hospitals": sorted(done.hospitals),
                "volumes": sum(part.patients for part in parts),
                "slices": sum(part.slices for part in parts),
            }
        write_encoder(model.encoder, about, path)
        self.audit.write("encoder", round=done.round, file=path.name, sha256=file_sha256(path))
        self.say(f"wrote {path}")

    def score(self, what: str, weights: torch.Tensor, purpose: str) -> dict | None:
        """The pooled score of these weights, (n,) float32, on the hospitals' test patients; None if there is none."""
        everybody = [*self.exchange.membership.present, *self.exchange.membership.observers]
        members = [member for member in everybody if member.facts.parts["test"].patients]
        if not members:  # hospitals without test patients are not asked
            self.say(f"{what}: no hospital has test patients")
            return None
        sent = in_precision(weights, self.state.federation.update_dtype)
        purpose = f"test-{purpose}"
        self.exchange.send("evaluate", purpose, members, {"part": "test"}, sent, [])
        results: dict[str, Tested] = {}

        def take(member: Member, answer: Answer) -> None:
            result = parse(Tested, answer.about)
            announced(result, member.facts)
            results[member.label] = result

        _, failures = self.exchange.wait(purpose, members, f"testing {what}", take=take)
        for label, reason in sorted(failures.items()):
            self.say(f"{what} was not tested by {label}: {reason}")
        score = pooled(results)
        self.say(f"{what}: no hospital sent a test Dice" if score is None else table(what, score))
        return score

    def deliver(self) -> None:
        """Send the best model and the last one to every hospital that took part and has a key or data of its own.
        The others share the server's machine."""
        settings, membership = self.state.federation, self.exchange.membership
        if settings.withhold_model or settings.keep_norm_local:
            return
        keyed = membership.labels() is not None
        everybody = [*membership.present, *membership.observers]
        members = [member for member in everybody if keyed or member.facts.own_data]
        got = {member.label for member in members}
        for which, path in (("best", self.state.best), ("last", self.state.last)):
            if members and path.exists():
                got -= self._send(which, path, members)
        if got:
            self.say(f"the model was delivered to {', '.join(sorted(got))}")
        absent = set(self.state.progress.hospitals) - got
        over = absent - set((membership.labels() or {}).values()) if keyed else set()
        if over:
            self.say(f"the model was not delivered to {', '.join(sorted(over))}: {NOT_ADMITTED}")
        absent -= over
        if keyed and absent:
            self.say(
                f"the model was not delivered to {', '.join(sorted(absent))}; send them {self.state.best} yourself"
            )
        self.audit.write("delivered", hospitals=sorted(got))

    def _send(self, which: str, path: Path, members: list[Member]) -> set[str]:
        """Send the model in a file; returns the hospitals that did not confirm it."""
        weights, metadata = pack(load_checkpoint(path).model.state_dict()), json.dumps(read_metadata(path))
        about = {
            "query": Query.MODEL,
            "settings": to_json(self.state.training, self.state.federation),
            "which": which,
            "metadata": metadata,
            "sha256": model_hash(weights, metadata),
        }
        purpose, nodes = f"model-{which}", [member.node for member in members]
        timeout = self.state.federation.round_timeout
        self.exchange.mailbox.send(nodes, "query", purpose, about, timeout, to_record(weights))
        _, failures = self.exchange.wait(purpose, members, f"sending the {which} model")
        for label, reason in sorted(failures.items()):
            self.say(f"the {which} model did not reach {label}: {reason}")
        return set(failures)
