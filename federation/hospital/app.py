"""The hospital's side of a federation: Flower's ClientApp. It runs in the folder that run_client.py made for it."""

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from common import MedFLError, write_json
from federation.hospital.work import Hospital, HospitalError
from federation.protocol.messages import ENDS, End, Failure, Query, message, read
from federation.protocol.secure_aggregation import Party
from federation.protocol.settings import approval, from_json, unusual
from federation.protocol.weights import array_record, to_record

IDENTITY, ENDED, MEMORY = "hospital.json", "ended.json", "model.pt"
STAGES = (Query.KEYS, Query.SHARES, Query.UNMASK)
SECRETS = "secure"  # the record in Flower's memory of this hospital, where secrets of a round are kept between its messages


def say(text: str) -> None:
    """A line on the hospital's own terminal."""
    print(text, flush=True)


def make_app(folder_of: Callable[[Context], Path] = lambda context: Path(),
             before: Callable[[Message, Context, Callable], Message] = lambda incoming, context, handle: handle(incoming, context),
             ) -> ClientApp:
    """The app. folder_of: gives a hospital's folder, where it finds who it is; run_client.py starts it in that folder. before:
    gets each message first, with the function that handles it."""

    def identity(context: Context) -> dict:
        return json.loads((folder_of(context) / IDENTITY).read_text(encoding="utf-8"))

    def hospital(about: dict, context: Context) -> Hospital:
        check_consent(about["settings"], identity(context))
        return Hospital(identity(context), *from_json(about["settings"]), folder_of(context) / MEMORY)

    def keep_errors_here(incoming: Message, context: Context, handle: Callable) -> Message:
        return guard(incoming, context, handle, identity(context))

    app = ClientApp(mods=[keep_errors_here, before])

    @app.query()
    def query(incoming: Message, context: Context) -> Message:
        """Tell the server who is here, that somebody is, or learn that it is over."""
        about = read(incoming.content)
        if about["query"] == Query.JOIN:
            return Message(message(introduce(about, identity(context), lambda: hospital(about, context))), reply_to=incoming)
        if about["query"] in STAGES:
            return Message(message(secure_stage(about, incoming.metadata.dst_node_id, context)), reply_to=incoming)
        if about["query"] == Query.END:
            code, sentence = ENDS[End(about["code"])]
            ended = {"exit": code, "sentence": sentence.format(detail=about.get("detail", ""))}
            write_json(folder_of(context) / ENDED, ended)
        return Message(message({}), reply_to=incoming)

    @app.train()
    def train(incoming: Message, context: Context) -> Message:
        """Score the model that came, train it, send the update."""
        about = read(incoming.content)
        mine = hospital(about, context)
        told, update = one_round(about, mine, incoming.content["arrays"])
        if mine.federation.secure_aggregation:
            arrays = array_record(masked(about, update, told["examples"], mine.federation.secure_range, context))
        else:
            arrays = to_record(update, mine.federation.update_dtype)
        return Message(message(told, arrays), reply_to=incoming)

    @app.evaluate()
    def evaluate(incoming: Message, context: Context) -> Message:
        """Score the model that came, after the last round."""
        about = read(incoming.content)
        mine = hospital(about, context)
        score = mine.finish(mine.received(about, incoming.content["arrays"]), about)
        if score["val_dice"] is not None:
            say(f"last model: validation Dice {score['val_dice']:.3f}")
        return Message(message(mine.told(score)), reply_to=incoming)

    return app


def check_consent(settings: str, identity: dict) -> None:
    """Raises HospitalError where this hospital has not approved its code with these settings, as messages carry them."""
    if identity["approved"] is not None and (wanted := approval(identity["code"], settings)) not in identity["approved"]:
        raise HospitalError(Failure.CONSENT, f"code and settings {wanted} are not approved (settings: {unusual(settings)}); "
                            f"if you agree to them, start again with --approve {wanted}")


def app_for(code: str) -> ClientApp:
    """The app for messages of a server whose bundle has this SHA-256: this one, or, if it is not the bundle that the MedFL here
    makes, one that does nothing and says so."""
    here = json.loads(Path(IDENTITY).read_text(encoding="utf-8"))
    if code == here["code"]:
        return app

    def refuse(incoming: Message, context: Context, handle: Callable) -> Message:
        about = read(incoming.content)
        if about.get("query") == Query.END:
            return handle(incoming, context)
        theirs = about.get("versions", {}).get("medfl", "of an unknown version")
        raise HospitalError(Failure.CODE, f"the server's code is MedFL {theirs} ({code[:12]}...) and the one installed here is "
                            f"MedFL {here['medfl']} ({here['code'][:12]}...); nothing of it was run; install the server's version, "
                            "after a look at what changed")

    return make_app(before=refuse)


def guard(incoming: Message, context: Context, handle: Callable, identity: dict) -> Message:
    """Whatever goes wrong is told on this terminal; the server gets a code."""
    try:
        return handle(incoming, context)
    except HospitalError as error:
        failure, text = error.failure, str(error)
    except MedFLError as error:
        failure, text = Failure.TRAINING, str(error)
    except (MemoryError, OSError) as error:
        failure, text = Failure.RESOURCES, f"out of memory or disk ({error}); free some, the server asks again"
    except RuntimeError as error:  # torch's name for many things
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            failure, text = Failure.RESOURCES, f"out of memory ({error}); a smaller --batch-size at the server needs less"
        else:
            failure, text = Failure.BUG, traceback.format_exc()
    except Exception:
        failure, text = Failure.BUG, traceback.format_exc()
    say(text)
    return Message(message({"failure": failure, "label": identity["label"], "session": identity["session"]}), reply_to=incoming)


def introduce(about: dict, identity: dict, hospital: Callable[[], Hospital]) -> dict:
    """Who this hospital is and what it holds."""
    introduction = Hospital.introduction(identity)
    if identity["cid"] is not None and identity["cid"] >= about["hospitals"]:
        return introduction  # there is no such share; the server says so
    ours, theirs = introduction["versions"]["torch"], about["versions"]["torch"]
    if ours != theirs:
        say(f"this hospital runs torch {ours} and the server {theirs}; that is allowed, and figures may differ a little")
    mine = hospital()
    say(f"code and settings: {approval(identity['code'], about['settings'])} (settings: {unusual(about['settings'])})")
    facts = mine.facts()
    parts = facts["parts"]
    say(f"joined as {identity['label']}: {mine.dataset.name}, {parts['train']['patients']} patients to train on, "
        f"{parts['val']['patients']} to choose by, {parts['test']['patients']} kept for the test; waiting for the first round")
    if promise := mine.promise:
        noise = mine.planned_noise(about["run"])
        noise = "" if noise is None else f"noise of {noise:.3g} clips; "
        say(f"promised to the patients: epsilon {promise.epsilon:g} at delta {promise.delta:g}, of which {promise.spent:.3g} is "
            f"spent; {noise}the last layers alone are trained, and the server gets no scores")
    return facts


def one_round(about: dict, hospital: Hospital, arrays: ArrayRecord) -> tuple[dict, torch.Tensor]:
    """What is told of a round, and the update, (n,) float32."""
    model = hospital.received(about, arrays)
    score = hospital.score(model)
    result, update = hospital.train(model, about)
    scored = f"validation Dice {score['val_dice']:.3f} before it, " if score["val_dice"] is not None else ""
    loss = f"loss {result['train_loss']:.3f} " if result["train_loss"] is not None else ""
    spent = ""
    if hospital.promise:
        spent = f"; epsilon {result['patient_epsilon']:.3g} of the {hospital.promise.epsilon:g} promised to the patients is spent"
    say(f"round {about['round']} of {hospital.federation.rounds}: {scored}trained, {loss}over {result['examples']} slices "
        f"in {result['seconds']:.0f} s{spent}")
    result["seconds"] += score.pop("seconds")
    return {**hospital.told(score), **result, "round": about["round"]}, update


@contextmanager
def party(context: Context) -> Iterator[Party]:
    """This hospital's part in the secure aggregation; what becomes of it is kept. Steps that it refuses become HospitalErrors."""
    mine = Party(**json.loads(context.state[SECRETS]["json"])) if SECRETS in context.state else Party()
    try:
        yield mine
    except MedFLError as error:
        raise HospitalError(Failure.PROTOCOL, str(error)) from error
    finally:
        context.state[SECRETS] = ConfigRecord({"json": json.dumps(mine.kept())})


def secure_stage(about: dict, node: int, context: Context) -> dict:
    """What is told in a stage of the secure aggregation that brings no update."""
    with party(context) as mine:
        match about["query"]:
            case Query.KEYS:
                return {"keys": mine.keys(node)}
            case Query.SHARES:
                return {"sealed": mine.share(about["keys"])}
            case _:
                return {"shares": mine.reveal(about["summed"], about["missing"])}


def masked(about: dict, update: torch.Tensor, examples: int, limit: float, context: Context) -> np.ndarray:
    """The weighted update under its masks, (n,) uint32."""
    with party(context) as mine:
        return mine.masked(about["sealed"], update, min(1.0, examples / about["most"]), limit, [about["run"], about["round"]])


app = make_app()
