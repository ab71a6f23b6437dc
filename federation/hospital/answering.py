"""How a hospital answers each of the server's messages, and what the server gets of a fault."""

import contextlib
import errno
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from flwr.app import Context, Message

from common import DISK_FULL, NO_MEMORY, MedFLError, in_words
from federation.hospital.faults import HospitalError
from federation.hospital.hospital import Hospital
from federation.hospital.identity import ENDED, WAITING, Identity
from federation.hospital.joining import check_consent, introduce
from federation.hospital.keeping import keep_model
from federation.hospital.secure_stages import fix_run, masked, refusing, secure_stage
from federation.hospital.status import shown
from federation.hospital.sums import Sums
from federation.protocol.agreement import from_json
from federation.protocol.answers import Energy, Kind, Result, Tested, Trained, Typed, parse
from federation.protocol.log import say
from federation.protocol.messages import ENDS, End, Failure, message, read
from federation.protocol.proofs import sign_answer
from federation.protocol.requests import QUERIES, Agree, Join, Keys, Model, Over, Score, Shares, Train, Unmask
from federation.protocol.weights import Record, array_record, to_record
from runs.energy import Meter
from storage.files import write_json
from transunet import TransUNet

MEMORY = "model.pt"

Handle = Callable[[Message, Context], Message]


class Answers:
    """How a hospital answers the server's messages. Each function takes a message and Flower's context, and returns the
    answer.

    folder_of: gives a hospital's folder, where it finds who it is.
    """

    def __init__(self, folder_of: Callable[[Context], Path]):
        self.folder_of = folder_of

    def signed(self, incoming: Message, context: Context, handle: Handle) -> Message:
        """The answer of the function `handle`, or of its failure, signed by the hospital's key if there is one."""
        identity, folder = Identity.load(self.folder_of(context)), self.folder_of(context)
        # hospitals that share one dataset share a terminal as well
        with shown(identity, folder) if identity.own_data else contextlib.nullcontext():
            reply = guard(incoming, context, handle, identity)
        if key := identity.private_key():
            sign_answer(reply.content, text_of(incoming), key)
        return reply

    def query(self, incoming: Message, context: Context) -> Message:
        """Tell the server who is here, that somebody is, or learn that it is over."""
        asked, answer = query_of(read(incoming.content)), {}
        if isinstance(asked, Join):
            answer = self._join(asked, context)
        elif isinstance(asked, Model):
            mine = self._joined(asked.settings, context)
            path = keep_model(mine, asked.which, incoming.content["arrays"], asked.metadata, asked.sha256)
            say(f"the federation's {asked.which} model: {path}")
        elif isinstance(asked, Keys | Shares | Agree | Unmask):
            answer = secure_stage(asked, incoming.metadata.dst_node_id, context, self._sums(context))
        elif isinstance(asked, Over):
            self._end(asked, self.folder_of(context))
        return Message(message(answer), reply_to=incoming)

    def train(self, incoming: Message, context: Context) -> Message:
        """Score the model that came, train it, send the update."""
        task = request(Train, read(incoming.content))
        mine, sums = self._joined(task.settings, context), self._sums(context)
        if mine.federation.secure_aggregation:
            with refusing():
                sums.check_run(task.run)
        else:
            with refusing(Failure.CONSENT):
                sums.check_plain()
        used = meter(mine)
        told, update = one_round(task, mine, incoming.content["arrays"])
        told = told.model_copy(update={"energy": used()})
        if mine.federation.secure_aggregation:
            limit, given = mine.federation.secure_range, sums.given()
            arrays = array_record(
                masked(task, update, told.examples, limit, context, mine.came, mine.begun, given)
            )
        else:
            arrays = to_record(update, mine.federation.update_dtype)
        return Message(message(told.model_dump(), arrays), reply_to=incoming)

    def evaluate(self, incoming: Message, context: Context) -> Message:
        """Score the model that came: after the last round, or, where this hospital only observes, in each."""
        task = request(Score, read(incoming.content))
        mine = self._joined(task.settings, context)
        model = mine.received(task, incoming.content["arrays"])
        if task.part == "test":
            return Message(message(tested(mine, model).model_dump()), reply_to=incoming)
        used = meter(mine)
        score = mine.finish(model, task) if task.last else mine.reports.score(model)
        if score.val_dice is not None:
            say(f"{'last' if task.last else 'current'} model: validation Dice {score.val_dice:.3f}")
        result = Result(**asdict(mine.reports.told(score)), energy=used())
        return Message(message(result.model_dump()), reply_to=incoming)

    def _hospital(self, settings: str, context: Context) -> Hospital:
        identity = Identity.load(self.folder_of(context))
        check_consent(settings, identity)
        return Hospital(identity, *from_json(settings), self.folder_of(context) / MEMORY, say)

    def _joined(self, settings: str, context: Context) -> Hospital:
        mine = self._hospital(settings, context)
        if mine.identity.role == "check":
            raise HospitalError(
                Failure.CONSENT,
                "this hospital only asks whether it could join; no work was done and nothing was told",
            )
        return mine

    def _sums(self, context: Context) -> Sums:
        return Sums(Identity.load(self.folder_of(context)), self.folder_of(context))

    def _join(self, asked: Join, context: Context) -> dict:
        identity = Identity.load(self.folder_of(context))
        met = introduce(asked, identity, lambda: self._hospital(asked.settings, context))
        if from_json(asked.settings)[1].secure_aggregation:
            fix_run(asked.run, self._sums(context))
        return met.model_dump(exclude_defaults=True)

    @staticmethod
    def _end(asked: Over, folder: Path) -> None:
        code, sentence = ENDS[asked.code]
        about = {"exit": code, "sentence": sentence.format(detail=asked.detail)}
        if asked.code == End.VERSION:  # either side may mend that: the hospital stays
            say(str(about["sentence"]))
            write_json(folder / WAITING, about)
        else:
            (folder / WAITING).unlink(missing_ok=True)
        write_json(folder / ENDED, about)


def meter(hospital: Hospital) -> Callable[[], Energy | None]:
    """Measure electricity from now on, if the hospital does; what is called gives what was used."""
    if not hospital.identity.energy:
        return lambda: None
    running = Meter("message", hospital.device.type == "cuda")

    def used() -> Energy:
        record = running.record()
        return Energy(kwh=record["kwh"], method=record["method"], cpu_seconds=record["cpu_seconds"])

    return used


def text_of(incoming: Message) -> dict:
    """The text of the server's message; empty where it has none, which the answer says."""
    try:
        return read(incoming.content)
    except MedFLError:
        return {}


def request(kind: type[Kind], about: dict) -> Kind:
    """The server's text as its type. Raises HospitalError where it is anything else."""
    try:
        return parse(kind, about, "the server's message")
    except MedFLError as error:
        raise HospitalError(
            Failure.PROTOCOL, f"{error}; nothing was done: use the same version of MedFL on both sides"
        ) from error


def query_of(about: dict) -> Typed:
    """What a query asks for. Raises HospitalError where it can't be understood."""
    kind = QUERIES.get(about.get("query", ""))
    if kind is None:
        raise HospitalError(
            Failure.PROTOCOL,
            "the server asked something that this MedFL does not know; use the same version on both sides",
        )
    return request(kind, about)


def failed(failure: Failure, identity: Identity) -> dict:
    """What the server gets of a fault."""
    return {"failure": failure, "label": identity.label, "session": identity.session}


def guard(incoming: Message, context: Context, handle: Handle, identity: Identity) -> Message:
    """Whatever goes wrong is told on this terminal; the server gets a code."""
    of = {}
    try:
        return handle(incoming, context)
    except HospitalError as error:
        failure, text = error.failure, str(error)
        of = {"of": error.of} if error.of else {}
    except MedFLError as error:
        failure, text = Failure.TRAINING, str(error)
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (*DISK_FULL, errno.ENOMEM):
            failure, text = Failure.DATA, f"{in_words(error) or error}; the server asks again"
        else:
            failure = Failure.RESOURCES
            text = f"out of memory or disk ({error}); free some, the server asks again"
    except RuntimeError as error:  # torch's name for many things
        if any(sign in str(error) for sign in NO_MEMORY):
            failure, text = (
                Failure.RESOURCES,
                f"out of memory ({error}); a smaller --batch-size at the server needs less",
            )
        else:
            failure, text = Failure.BUG, traceback.format_exc()
    except Exception:
        failure, text = Failure.BUG, traceback.format_exc()
    say(text)
    return Message(message({**failed(failure, identity), **of}), reply_to=incoming)


def tested(hospital: Hospital, model: TransUNet) -> Tested:
    """What is told of a model's score on the patients that were kept for the test."""
    score = hospital.reports.score(model, "test")
    if score.val_dice is not None:
        say(f"Dice on this hospital's test patients: {score.val_dice:.3f} over {score.val_patients}")
    told = hospital.reports.told(score)
    return Tested(test_dice=told.val_dice, test_patients=told.val_patients, seconds=told.seconds)


def one_round(task: Train, hospital: Hospital, arrays: Record) -> tuple[Trained, torch.Tensor]:
    """What is told of a round, and the update, (n,) float32."""
    model = hospital.received(task, arrays)
    score = hospital.reports.score(model)
    work, update = hospital.train(model, task)
    scored = f"validation Dice {score.val_dice:.3f} before it, " if score.val_dice is not None else ""
    loss = f"loss {work.train_loss:.3f} " if work.train_loss is not None else ""
    spent = ""
    if hospital.budget:
        whole = hospital.budget.epsilon
        spent = f"; epsilon {work.patient_epsilon:.3g} of the {whole:g} promised to the patients is spent"
    say(
        f"round {task.round} of {hospital.federation.rounds}: {scored}trained, {loss}over {work.examples} "
        f"slices in {work.seconds:.0f} s{spent}"
    )
    told = {
        **asdict(hospital.reports.told(score)),
        **asdict(work),
        "seconds": work.seconds + score.seconds,
        "round": task.round,
    }
    return Trained(**told), update
