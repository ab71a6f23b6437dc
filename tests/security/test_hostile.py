"""Hospitals that send bad updates, each kind beside four honest ones: the round goes on without it, and the
log says why.

They speak to the real round loop over a grid that needs no network; that a key and a label belong together,
and what an address can do, is test_gateway.py's.
"""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from scripted import TINIER, Worker, facts, federate, make_fast

from federation.protocol.messages import message, read
from federation.protocol.weights import WEIGHTS, pack, to_record
from transunet import ARCHITECTURES, TransUNet

ROUNDS = 2
with mock.patch.dict(ARCHITECTURES, tiny=TINIER):  # the network of these federations
    LENGTH = len(pack(TransUNet("tiny", 32).state_dict()))
SHARED, *OWN = (
    0.01 * torch.randn(LENGTH, generator=torch.Generator().manual_seed(seed)) for seed in range(6)
)


class Honest(Worker):
    """Moves a way along a direction that all share, and as far along one of its own."""

    def __init__(self, number: int):
        super().__init__(f"hospital-{number}", [0.5] * (ROUNDS + 1))
        self.number = number

    def answer(self, incoming: Message) -> Message | None:
        reply = super().answer(incoming)
        about = read(incoming.content)
        if "round" not in about:
            return reply
        return self.send(incoming, self.got[-1] + SHARED + OWN[self.number], about)

    def send(self, incoming: Message, weights: torch.Tensor, about: dict) -> Message:
        return self.reply(incoming, to_record(weights), about["round"], 10)

    def reply(self, incoming: Message, arrays: ArrayRecord | None, number: int, examples: object) -> Message:
        told = {
            "val_dice": 0.5,
            "val_patients": 4,
            "seconds": 1.0,
            "round": number,
            "examples": examples,
            "train_loss": 1.0,
            "patient_epsilon": None,
        }
        return Message(message(told, arrays), reply_to=incoming)


class Hostile(Honest):
    """Sends what a test says instead. spoil: from (its honest weights, what came, the round) to arrays;
    examples; lag: rounds."""

    def __init__(self, spoil=None, examples: object = 10, lag: int = 0):
        super().__init__(4)
        self.spoil, self.examples, self.lag = spoil, examples, lag

    def send(self, incoming: Message, weights: torch.Tensor, about: dict) -> Message:
        arrays = to_record(weights) if self.spoil is None else self.spoil(weights, self.got[-1])
        return self.reply(incoming, arrays, about["round"] - self.lag, self.examples)


def array(**changes) -> callable:
    def spoil(weights, came):
        good = {
            "dtype": "float32",
            "shape": (len(weights),),
            "stype": "numpy.ndarray",
            "data": Array(weights.numpy()).data,
        }
        return ArrayRecord({WEIGHTS: Array(*{**good, **changes}.values())})

    return spoil


def numbers(change) -> callable:
    return lambda weights, came: to_record(change(weights, came))


def poison(weights, value):
    weights = weights.clone()
    weights[7] = value
    return weights


ATTACKS = {
    "NaN": (Hostile(numbers(lambda w, c: poison(w, float("nan")))), "not finite"),
    "infinite": (Hostile(numbers(lambda w, c: poison(w, float("inf")))), "not finite"),
    "huge": (Hostile(numbers(lambda w, c: c + 1e6 * (w - c))), "times as long"),
    "sign-flipped": (Hostile(numbers(lambda w, c: c - (w - c))), "points against"),
    "sign-flipped and long": (Hostile(numbers(lambda w, c: c - 4 * (w - c))), "points against"),
    "stale": (Hostile(lag=1), "is for round"),
    "too short": (Hostile(numbers(lambda w, c: w[:-1])), "weights, but"),
    "too long": (Hostile(numbers(lambda w, c: torch.cat([w, w]))), "weights, but"),
    "wrong shape": (
        Hostile(lambda w, c: ArrayRecord({WEIGHTS: Array(w.numpy()[None])})),
        "another shape or type",
    ),
    "wrong type": (
        Hostile(lambda w, c: ArrayRecord({WEIGHTS: Array(w.double().numpy())})),
        "another shape or type",
    ),
    "renamed": (Hostile(lambda w, c: ArrayRecord({"wieghts": Array(w.numpy())})), "no weights"),
    "doubled": (
        Hostile(lambda w, c: ArrayRecord({WEIGHTS: Array(w.numpy()), "more": Array(w.numpy())})),
        "no weights",
    ),
    "missing": (Hostile(lambda w, c: None), "no weights"),
    "truncated": (Hostile(array(data=Array(np.zeros(9, np.float32)).data[:-3])), "can't be decoded"),
    "made-up type": (Hostile(array(dtype="no such type")), "another shape or type"),
    "claims 10 GB": (Hostile(array(shape=(2_500_000_000,), data=b"\x93NUMPY")), "can't be decoded"),
    "negative count": (Hostile(examples=-5), "says examples -5"),
    "no count": (Hostile(examples=0), "counts 0 slices"),
    "inflated count": (Hostile(examples=10**6), "it joined with"),
    "a count beyond all bounds": (Hostile(examples=10**400), "says examples a number beyond all bounds"),
    "count in words": (Hostile(examples="many"), "no usable examples"),
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    make_fast(monkeypatch)

    def go(workers: list[Honest]):
        code, state, said = federate(workers, ROUNDS, tmp_path, torch.zeros(LENGTH))
        return (
            code,
            state,
            said,
            [
                json.loads(line)
                for line in (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()
            ],
        )

    return go


@pytest.mark.parametrize("name", ATTACKS)
def test_a_bad_update_is_left_out_and_named(run, name):
    hostile, reason = ATTACKS[name]
    code, state, said, events = run([*map(Honest, range(4)), hostile])
    assert code == 0 and state.progress.round == ROUNDS
    left_out = [event for event in events if event["event"] == "left_out"]
    assert [(event["round"], event["hospital"]) for event in left_out] == [
        (k + 1, "hospital-4") for k in range(ROUNDS)
    ], left_out
    assert all(reason in event["why"] for event in left_out), left_out[0]["why"]
    assert any(f"round 1 without hospital-4: {left_out[0]['why']}" in line for line in said)
    rounds = [event["hospitals"] for event in events if event["event"] == "round"]
    assert rounds == [[f"hospital-{k}" for k in range(4)]] * ROUNDS
    expected = ROUNDS * (SHARED + torch.stack(OWN[:4]).mean(dim=0))
    assert torch.allclose(state.weights, expected, atol=1e-6), "the bad update left a trace"


def test_honest_hospitals_are_all_kept(run):
    code, _, _, events = run([*map(Honest, range(5))])
    assert code == 0 and not [event for event in events if event["event"] == "left_out"]


def test_too_many_bad_ones_end_the_federation(run):
    """Three of five: a round needs three updates and gets two, twice."""
    spoil = numbers(lambda w, c: poison(w, float("nan")))
    bad = [Hostile(spoil) for _ in range(3)]
    for number, hospital in enumerate(bad, 2):
        hospital.introduction = facts(f"hospital-{number}")
    code, state, _, events = run([Honest(0), Honest(1), *bad])
    assert code == 3 and state.progress.round == 0
    assert len([event for event in events if event["event"] == "left_out"]) == 6
