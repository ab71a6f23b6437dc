"""The hospital's side of a federation: Flower's ClientApp. It runs in the folder that run_client.py made for
it."""

import contextlib
import errno
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

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
from federation.protocol.messages import ENDS, End, Failure, Query, message, read
from federation.protocol.proofs import sign_answer
from federation.protocol.requests import QUERIES, Agree, Join, Keys, Model, Over, Score, Shares, Train, Unmask
from federation.protocol.weights import Record, array_record, to_record
from runs.energy import Meter
from storage.files import write_json
from transunet import TransUNet

MEMORY = "model.pt"

Handle = Callable[[Message, Context], Message]
Before = Callable[[Message, Context, Handle], Message]


def make_app(
    folder_of: Callable[[Context], Path] = lambda context: Path(),
    before: Before = lambda incoming, context, handle: handle(incoming, context),
) -> ClientApp:
    """The app.

    Args:
        folder_of: gives a hospital's folder, where it finds who it is; run_client.py starts it there.
        before: gets each message first, with the function that handles it.
    """

    def hospital(settings: str, context: Context) -> Hospital:
        identity = Identity.load(folder_of(context))
        check_consent(settings, identity)
        return Hospital(identity, *from_json(settings), folder_of(context) / MEMORY, say)

    def joined(settings: str, context: Context) -> Hospital:
        mine = hospital(settings, context)
        if mine.identity.role == "check":
            raise HospitalError(
                Failure.CONSENT,
                "this hospital only asks whether it could join; no work was done and nothing was told",
            )
        return mine

    def sums(context: Context) -> Sums:
        return Sums(Identity.load(folder_of(context)), folder_of(context))

    def answer(incoming: Message, context: Context, handle: Handle) -> Message:
        identity, folder = Identity.load(folder_of(context)), folder_of(context)
        # hospitals that share one dataset share a terminal as well
        with shown(identity, folder) if identity.own_data else contextlib.nullcontext():
            reply = guard(incoming, context, handle, identity)
        if key := identity.private_key():
            sign_answer(reply.content, text_of(incoming), key)
        return reply

    def keep_errors_here(incoming: Message, context: Context, handle: Handle) -> Message:
        try:
            return answer(incoming, context, handle)
        except Exception:  # a kit that is gone, for instance; Flower would tell the server its path
            say(traceback.format_exc())
            return Message(message({"failure": Failure.BUG}), reply_to=incoming)

    app = ClientApp(mods=[keep_errors_here, before])

    @app.query()
    def query(incoming: Message, context: Context) -> Message:
        """Tell the server who is here, that somebody is, or learn that it is over."""
        asked = query_of(read(incoming.content))
        answer: dict = {}
        if isinstance(asked, Join):
            identity = Identity.load(folder_of(context))
            met = introduce(asked, identity, lambda: hospital(asked.settings, context))
            answer = met.model_dump(exclude_defaults=True)
            if from_json(asked.settings)[1].secure_aggregation:
                fix_run(asked.run, sums(context))
        elif isinstance(asked, Model):
            arrays = incoming.content["arrays"]
            mine = joined(asked.settings, context)
            path = keep_model(mine, asked.which, arrays, asked.metadata, asked.sha256)
            say(f"the federation's {asked.which} model: {path}")
        elif isinstance(asked, Keys | Shares | Agree | Unmask):
            answer = secure_stage(asked, incoming.metadata.dst_node_id, context, sums(context))
        elif isinstance(asked, Over):
            code, sentence = ENDS[asked.code]
            about = {"exit": code, "sentence": sentence.format(detail=asked.detail)}
            if asked.code == End.VERSION:  # either side may mend that: the hospital stays
                say(str(about["sentence"]))
                write_json(folder_of(context) / WAITING, about)
            else:
                (folder_of(context) / WAITING).unlink(missing_ok=True)
            write_json(folder_of(context) / ENDED, about)
        return Message(message(answer), reply_to=incoming)

    @app.train()
    def train(incoming: Message, context: Context) -> Message:
        """Score the model that came, train it, send the update."""
        task = request(Train, read(incoming.content))
        mine = joined(task.settings, context)
        if mine.federation.secure_aggregation:
            with refusing():
                sums(context).check_run(task.run)
        else:
            with refusing(Failure.CONSENT):
                sums(context).check_plain()
        used = meter(mine)
        told, update = one_round(task, mine, incoming.content["arrays"])
        told = told.model_copy(update={"energy": used()})
        if mine.federation.secure_aggregation:
            limit = mine.federation.secure_range
            given = sums(context).given()
            arrays = array_record(
                masked(task, update, told.examples, limit, context, mine.came, mine.begun, given)
            )
        else:
            arrays = to_record(update, mine.federation.update_dtype)
        return Message(message(told.model_dump(), arrays), reply_to=incoming)

    @app.evaluate()
    def evaluate(incoming: Message, context: Context) -> Message:
        """Score the model that came: after the last round, or, where this hospital only observes, in each."""
        task = request(Score, read(incoming.content))
        mine = joined(task.settings, context)
        model = mine.received(task, incoming.content["arrays"])
        if task.part == "test":
            return Message(message(tested(mine, model).model_dump()), reply_to=incoming)
        used = meter(mine)
        score = mine.finish(model, task) if task.last else mine.reports.score(model)
        if score.val_dice is not None:
            say(f"{'last' if task.last else 'current'} model: validation Dice {score.val_dice:.3f}")
        result = Result(**asdict(mine.reports.told(score)), energy=used())
        return Message(message(result.model_dump()), reply_to=incoming)

    return app


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


def app_for(code: str) -> ClientApp:
    """The app for messages of a server whose bundle has this SHA-256: this one, or, if it is not the bundle
    that the MedFL here makes, one that does nothing and says so."""
    here, waiting = Identity.load(Path()), Path() / WAITING
    if code == here.code:
        if waiting.exists():
            for path in (waiting, Path() / ENDED):
                path.unlink(missing_ok=True)
        return app

    def refuse(incoming: Message, context: Context, handle: Handle) -> Message:
        about = read(incoming.content)
        if about.get("query") == Query.END:
            return handle(incoming, context)
        versions = about.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        theirs = version_in_words(str(versions.get("medfl", "unknown"))[:32], versions.get("commit"), code)
        sentence = (
            f"the server's code is {theirs} and the one installed here is "
            f"{version_in_words(here.medfl, here.commit, here.code)}; nothing of it was run; install the server's "
            "version here, after a look at what changed, or ask the coordinator"
        )
        new = not waiting.exists()
        write_json(waiting, {"sentence": sentence})
        if new:
            raise HospitalError(Failure.CODE, sentence)
        return Message(message(failed(Failure.CODE, here)), reply_to=incoming)

    return make_app(before=refuse)


def version_in_words(version: str, commit: object, code: str) -> str:
    """A MedFL by its version, its commit and what it runs at a hospital."""
    of = f"commit {str(commit)[:12]}, " if commit else ""
    return f"MedFL {version} ({of}code {code[:12]}...)"


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


app = make_app()
