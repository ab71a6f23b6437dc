"""The hospital's side of a federation: Flower's ClientApp. It runs in the folder that run_client.py made for it."""

import json
import traceback
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common import MedFLError, write_json
from federation.hospital import Hospital, HospitalError
from federation.messages import ENDS, End, Failure, Query, message, read
from federation.settings import from_json

IDENTITY, ENDED = Path("hospital.json"), Path("ended.json")


def say(text: str) -> None:
    """A line on the hospital's own terminal."""
    print(text, flush=True)


def keep_errors_here(incoming: Message, context: Context, handle) -> Message:
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
    return Message(message({"failure": failure, **who()}), reply_to=incoming)


def who() -> dict:
    """The label and session that a failing answer carries."""
    identity = json.loads(IDENTITY.read_text(encoding="utf-8"))
    return {"label": identity["label"], "session": identity["session"]}


app = ClientApp(mods=[keep_errors_here])


def hospital_of(about: dict) -> Hospital:
    """This hospital under the settings that a message carries."""
    return Hospital(json.loads(IDENTITY.read_text(encoding="utf-8")), *from_json(about["settings"]))


@app.query()
def answer(incoming: Message, context: Context) -> Message:
    """Tell the server who is here, that somebody is, or learn that it is over."""
    about = read(incoming.content)
    if about["query"] == Query.PING:
        return Message(message({}), reply_to=incoming)
    if about["query"] == Query.END:
        code, sentence = ENDS[End(about["code"])]
        write_json(ENDED, {"exit": code, "sentence": sentence.format(detail=about.get("detail", ""))})
        return Message(message({}), reply_to=incoming)
    identity = json.loads(IDENTITY.read_text(encoding="utf-8"))
    introduction = Hospital.introduction(identity)
    if identity["cid"] is not None and identity["cid"] >= about["hospitals"]:
        return Message(message(introduction), reply_to=incoming)  # there is no such share; the server says so
    ours, theirs = introduction["versions"]["torch"], about["versions"]["torch"]
    if ours != theirs:
        say(f"this hospital runs torch {ours} and the server {theirs}; that is allowed, and figures may differ a little")
    hospital = hospital_of(about)
    facts = hospital.facts()
    parts = facts["parts"]
    say(f"joined as {identity['label']}: {hospital.dataset.name}, {parts['train']['patients']} patients to train on, "
        f"{parts['val']['patients']} to choose by, {parts['test']['patients']} kept for the test; waiting for the first round")
    return Message(message(facts), reply_to=incoming)


@app.train()
def train(incoming: Message, context: Context) -> Message:
    """Score the model that came, train it, send the update."""
    about = read(incoming.content)
    hospital = hospital_of(about)
    model = hospital.received(incoming.content["arrays"])
    score = hospital.score(model)
    result, weights = hospital.train(model, about)
    scored = f"validation Dice {score['val_dice']:.3f} before it, " if score["val_dice"] is not None else ""
    loss = f"loss {result['train_loss']:.3f} " if result["train_loss"] is not None else ""
    say(f"round {about['round']} of {hospital.federation.rounds}: {scored}trained, {loss}over {result['examples']} slices "
        f"in {result['seconds']:.0f} s")
    result["seconds"] += score.pop("seconds")
    return Message(message({**score, **result, "round": about["round"]}, weights), reply_to=incoming)


@app.evaluate()
def evaluate(incoming: Message, context: Context) -> Message:
    """Score the model that came, after the last round."""
    hospital = hospital_of(read(incoming.content))
    score = hospital.score(hospital.received(incoming.content["arrays"]))
    if score["val_dice"] is not None:
        say(f"last model: validation Dice {score['val_dice']:.3f}")
    return Message(message(score), reply_to=incoming)
