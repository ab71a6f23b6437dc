"""What server and hospitals say to each other.

Every message of the server carries `about`, one JSON text; train and evaluate messages carry `arrays` as
well. A hospital's answer carries `about` (its types are in answers.py), and after training `arrays`
(weights.py). Nothing else is sent: no name of a patient or a file, no path, no figure of one patient or
slice, and no text of an error (a code stands for it).
"""

import json
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from importlib.metadata import version

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common import MedFLError

SOON = timedelta(days=30)  # before a certificate or an admission ends: from then on it is told
MOST_TEXT = 4_000_000  # letters of a message's text: the sealed shares of a thousand hospitals fit
MOST_ENTRIES = 20_000  # and so many of these: to say what is wrong with each takes time and memory


class Query(StrEnum):
    """What a `query` message wants."""

    JOIN = "join"  # who are you, what do you hold
    PING = "ping"  # are you there
    KEYS = "keys"  # secure aggregation: make new secrets for a round
    SHARES = "shares"  # secure aggregation: give the other hospitals their shares of them
    AGREE = "agree"  # secure aggregation: tell each other whose updates are in the sum
    UNMASK = "unmask"  # secure aggregation: give the shares that uncover the sum
    MODEL = "model"  # the federation's model, for you to keep
    END = "end"  # the federation is over for you; `code` says why


class Failure(StrEnum):
    """Why a hospital could not do what it was asked; all that the server learns of it."""

    DATA = "data"
    TRAINING = "training"
    RESOURCES = "resources"
    LATE = "late"
    CODE = "code"
    CONSENT = "consent"
    PRIVACY = "privacy"
    PROTOCOL = "protocol"
    BUG = "bug"


FAILURES: dict[str, str] = {
    Failure.DATA: "its data can't be used; its own terminal says why",
    Failure.TRAINING: "its training failed; its own terminal says why",
    Failure.RESOURCES: "it ran out of memory or disk",
    Failure.LATE: "it was not done within the round's time",
    Failure.CODE: "it runs its own MedFL alone, and the server's code is another; it waits until both "
    "sides have the same version",
    Failure.CONSENT: "it has not approved these settings; its own terminal says which they are",
    Failure.PRIVACY: "what it promises its patients does not allow that; its own terminal says why",
    Failure.PROTOCOL: "its update does not fit into the secure aggregation, or a step of that was not what "
    "it should be; its own terminal says why",
    Failure.BUG: "a fault of the program; its own terminal says which",
}


class End(StrEnum):
    """Why the federation is over for a hospital."""

    DONE = "done"
    QUORUM = "quorum"
    VERSION = "version"
    TAKEN = "taken"
    NUMBER = "number"
    SPLIT = "split"
    TASK = "task"
    UNFIT = "unfit"
    FULL = "full"
    IDENTITY = "identity"
    FIT = "fit"


ENDS = {  # exit code and the sentence at the hospital
    End.DONE: (0, "the federation is over"),
    End.QUORUM: (
        3,
        "the federation ended, because too few hospitals were left; the server goes on with --resume",
    ),
    End.VERSION: (
        2,
        "refused: this hospital runs another version than the server ({detail}); install the server's",
    ),
    End.TAKEN: (2, "refused: another hospital has this label; choose another --cid or --name"),
    End.NUMBER: (2, "refused: the server has {detail} hospitals, numbered from 0; choose a smaller --cid"),
    End.SPLIT: (
        2,
        "refused: the other hospitals divide another dataset; use the same patients in --data-dir everywhere",
    ),
    End.TASK: (
        2,
        "refused: the other hospitals' data are of another task ({detail}); use the same task.toml everywhere",
    ),
    End.UNFIT: (2, "this hospital can't take part; the lines above say why"),
    End.IDENTITY: (2, "refused: this key is {detail}'s; give that name, or a kit of your own with --kit"),
    End.FIT: (0, "place, version, code and settings fit, this hospital can join; nothing was trained"),
    End.FULL: (2, "refused: all places of this federation are taken; start the server with more --clients"),
}


def message(about: Mapping, arrays: ArrayRecord | None = None) -> RecordDict:
    """A message's content."""
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        "about": ConfigRecord({"json": json.dumps(about, allow_nan=False)})
    }
    return RecordDict(records if arrays is None else {**records, "arrays": arrays})


def read(content: RecordDict) -> dict:
    """The `about` of a message. Raises MedFLError where there is none."""
    try:
        text = content["about"]["json"]
        if not isinstance(text, str) or len(text) > MOST_TEXT or text.count(",") > MOST_ENTRIES:
            raise TypeError("no text, or one that is too long")
        about = json.loads(text)
    except (LookupError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise MedFLError(
            "a message came without its text; use the same version of MedFL on both sides"
        ) from error
    if not isinstance(about, dict):
        raise MedFLError(
            "a message came with another text than expected; use the same version of MedFL on both sides"
        )
    return about


def local_versions(medfl: str) -> dict[str, str]:
    """Versions of what a hospital's figures depend on."""
    return {
        "medfl": medfl,
        "flwr": version("flwr"),
        "torch": version("torch").split("+")[0],
        "timm": version("timm"),
    }
