"""Ten thousand answers and introductions that no hospital of ours would give, thrown at the server's own code:
each is that hospital's failure, and nothing ends or stays."""

import copy
import itertools
import json
import random

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scripted import VERSIONS, Grid, facts, make_fast

from appearance.features import MEASURES
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import WEIGHTS, to_record
from federation.server.audit import AuditLog
from federation.server.rounds import Federation
from federation.server.secure_round import SecureRound
from federation.server.state import RunState, load_run
from training import TrainingSettings
from transunet import TransUNet

EACH = 125  # answers of a batch
KINDS = ("introduction", "update", "score", "keys")
BATCHES = 20  # of each kind: 10,000 answers

IMAGES = {name: {"mean": [0.5] * w, "deviation": [0.1] * w} for name, w in MEASURES.items()}
TOLD = {"val_dice": 0.5, "val_patients": 4, "seconds": 1.0}
HONEST = {
    "introduction": {**facts("mercy"), "images": IMAGES},
    "update": {**TOLD, "round": 1, "examples": 10, "train_loss": 1.0, "patient_epsilon": None},
    "score": TOLD,
    "keys": {"keys": ["00" * 8, "11" * 8]},
    "sealed": {"sealed": {"1": "aa", "2": "bb"}},
    "shares": {"shares": {"1": "aa", "2": "bb"}},
}
NUMBERS = (0, -1, 2**63, 2**2100, 10**400, 1e308, -1e308, 5e-324, 0.5, True)
TEXTS = ("", "x" * 5_000, "\x1b[2J", "\ud800", "../../etc", "hospital-0", "=cmd|x", "failure", "DATA", "\0")
HOSTILE = st.one_of(
    st.sampled_from([*NUMBERS, *TEXTS, None, [], {}, [[]] * 9, {"failure": []}, {"": {"": {}}}]),
    st.recursive(
        st.none() | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=4
    ),
)
# texts in the place of the whole answer
RAW = ("", "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "1e999", "NaN", '{"round": NaN}', "9" * 5_000, "[]", "{}",
       '{"failure": {"a": 1}}', '{"failure": "bug", "label": ' + '"x' * 500 + '"}', '{"failure": 1e999}')  # fmt: skip
ARRAYS = (
    {"dtype": "no such type"},
    {"dtype": "O"},
    {"dtype": "V9999999"},
    {"shape": (2**62, 2**62)},
    {"shape": (-1,)},
    {"shape": ()},
    {"data": b""},
    {"data": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 900},
    {"stype": "pickle"},
    None,
)
# what a batch is made of: chance that can be repeated, and values that it puts where others belong
BATCH = st.tuples(st.integers(0, 2**32), st.lists(HOSTILE, min_size=10, max_size=20))
HOWS = ("entries", "entries", "more", "raw", "arrays", "record", "objects")


def mutations(batch: tuple[int, list]) -> list[dict]:
    """How each answer of a batch is changed."""
    rng, values = random.Random(batch[0]), batch[1]
    return [
        {
            "changes": [(rng.randrange(100), rng.choice(values)) for _ in range(rng.randint(1, 3))],
            "how": rng.choice(HOWS),
            "raw": rng.choice(RAW),
            "arrays": rng.choice(ARRAYS),
            "seed": rng.randrange(2**32),
        }
        for _ in range(EACH)
    ]


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The ways to all entries of nested dicts and lists."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [place for key, inner in entries for place in [(*path, key), *places(inner, (*path, key))]]


def mutated(kind: str, how: dict) -> RecordDict:
    """An answer's content: one that a hospital would give, changed."""
    about = copy.deepcopy(HONEST[kind])
    if how["how"] == "entries":
        for number, value in how["changes"]:
            every = places(about)
            *way, key = every[number % len(every)] if every else (("x",))
            inner = about
            for step in way:
                inner = inner[step]
            inner[key] = value
    if how["how"] == "more":
        about |= {str(value)[:70]: value for _, value in how["changes"]}
    text = how["raw"] if how["how"] == "raw" else json.dumps(about)
    records = {"about": ConfigRecord({"json": text}), "arrays": to_record(torch.zeros(9))}
    if how["how"] == "arrays":
        fields = {
            "dtype": "float32",
            "shape": (9,),
            "stype": "numpy.ndarray",
            "data": b"x",
            **(how["arrays"] or {}),
        }
        records["arrays"] = ArrayRecord({WEIGHTS: Array(**fields)} if how["arrays"] else {})
    if how["how"] == "record":
        odd = (MetricRecord({"json": 1}), ConfigRecord({}), ConfigRecord({"json": [1.0]}), ArrayRecord({}))
        records[("about", "arrays", "more")[how["seed"] % 3]] = odd[how["seed"] % 4]
    return RecordDict(records)


def spoilt(reply: Message, seed: int) -> Message:
    """The message as Flower reads it of its pieces, one of which was changed, lost or exchanged."""
    rng = random.Random(seed)
    with no_object_id_recompute():
        pieces, top = (
            {name: one.deflate() for name, one in get_all_nested_objects(reply).items()},
            reply.object_id,
        )
    name = rng.choice(list(pieces))
    content = bytearray(pieces[name])
    way = rng.randrange(5)
    if way == 0:
        pieces[name] = bytes(content[: rng.randrange(len(content))])
    elif way == 1:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        pieces[name] = bytes(content)
    elif way == 2:
        head, _, body = bytes(content).partition(b"\0")
        pieces[name] = b"Message  " + str(len(body)).encode() + b"\0" + body  # no child
    elif way == 3:
        pieces[name] = pieces[rng.choice(list(pieces))]
    else:
        top = name  # a piece in the place of the message
    return inflate_object_from_contents(top, pieces)


class Thrower(Grid):
    """Nodes that answer with mutations, each of which is made when it is asked for, as Flower does."""

    def __init__(self):
        super().__init__()
        self.numbers, self.kind, self.batch, self.thrown = itertools.count(1), "introduction", [], 0

    def push_messages(self, messages):
        for sent in messages:
            identity = f"message {next(self.ids)}"
            sent.metadata.__dict__["_message_id"] = identity
            self.replies[identity] = sent
            yield identity

    def pull_messages(self, identities):
        for sent in [self.replies.pop(one) for one in identities if one in self.replies]:
            if not self.batch:
                return
            how, self.thrown = self.batch.pop(), self.thrown + 1
            reply = Message(mutated(self.kind, how), reply_to=sent)
            yield spoilt(reply, how["seed"]) if how["how"] == "objects" else reply


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A federation with a grid that throws, and a round that other hospitals have brought."""
    make_fast(monkeypatch)
    monkeypatch.setattr("federation.server.membership.JOIN_TRIES", 1)
    monkeypatch.setattr("federation.server.secure_round.STAGE_TIME", 0.2)
    monkeypatch.setattr("os.fsync", lambda file: None)  # a line of the audit log for each
    shape = FederationSettings(clients=EACH + 5, min_clients=1, round_timeout=5.0)
    state = RunState(TransUNet("tiny", 32), TrainingSettings(image_size=32), shape, tmp_path, None)
    state.weights, state.progress.started_from = torch.zeros(len(state.weights)), "random weights"
    return Federation(
        Thrower(), state, VERSIONS, tmp_path, False, AuditLog(tmp_path / "audit.jsonl"), say=str
    )


def members(server, count: int) -> list:
    """Hospitals that have joined; they answer with what is thrown next."""
    answer = type("Joined", (), {"failure": None, "purpose": "join"})
    server.membership.members.clear()
    for node in range(1, count + 1):
        answer.node, answer.about = node, facts(f"mercy-{node}")
        server.membership.handle(answer)
    server.membership._asked = set(range(1, count + 1))
    server.mailbox._grid.nodes = dict.fromkeys(range(1, count + 1))
    return server.membership.present


def introduce(server) -> None:
    """Newcomers say who they are."""
    grid = server.mailbox._grid
    server.membership.members.clear()
    server.membership._asked = set()
    grid.nodes = {next(grid.numbers): None for _ in range(EACH)}
    while grid.batch:
        for _ in server.exchange._attend():
            pass


def throw(server, kind: str, batch: list[dict]) -> None:
    """Have the batch come as answers of this kind."""
    grid = server.mailbox._grid
    grid.kind, grid.batch = kind, []
    if kind == "introduction":
        grid.batch = list(batch)
        introduce(server)
        return
    there = members(server, len(batch))
    grid.batch = list(batch)
    if kind == "update":
        server.collector.collect(1, 1, None).updates.close()
    elif kind == "score":
        server._scored(server.state.weights, 1, f"final.{next(grid.numbers)}")
    else:
        stage = SecureRound(
            server.mailbox, server.exchange.wait, server.settings, 1, "round-1.1", 9, "r", "m", [], None
        )
        stage.prepare(there)


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_ends_the_server(server, kind):
    grid = server.mailbox._grid

    @settings(
        max_examples=BATCHES,
        phases=[Phase.generate],  # without a search for the smallest batch that fails
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(BATCH)
    def check(batch):
        throw(server, kind, mutations(batch))
        grid.replies.clear()  # to sentences of farewell that nobody answers
        server.mailbox._open.clear()

    check()
    assert grid.thrown >= EACH * BATCHES
    server.state.save_last()
    load_run(server.out)
