"""An answer counts only if its hospital signed it, for this request: another's, a former one, a changed one and
one without a signature are refused, and the audit log shows who sent what."""

import hashlib
import json

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, Message
from scripted import Worker, federate, make_fast

from common import MedFLError
from federation.protocol import proofs
from federation.protocol.messages import message, read
from federation.protocol.proofs import PROOF, check, sign_answer
from federation.protocol.weights import to_record

KEYS = [ec.generate_private_key(ec.SECP384R1()) for _ in range(3)]
OPENSSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
PUBLIC = {node: key.public_key().public_bytes(*OPENSSH).decode() for node, key in enumerate(KEYS, 1)}


class Signing(Worker):
    """A hospital that signs with its key; `spoil` changes its answers to training."""

    def __init__(self, number: int, spoil=lambda *_: None):
        super().__init__(f"hospital-{number}", [0.5] * 9)
        self.key, self.spoil = KEYS[number], spoil

    def answer(self, incoming: Message) -> Message | None:
        reply, about = super().answer(incoming), read(incoming.content)
        sign_answer(reply.content, about, self.key)
        if "round" in about:
            self.spoil(reply.content, about)
        return reply


def by_another(content, about):
    sign_answer(content, about, KEYS[1])


def changed(content, about):
    content["arrays"] = to_record(torch.full(content["arrays"]["weights"].shape, 7.0))


def rewritten(content, about):
    content["about"] = message({**read(content), "val_dice": 0.9})["about"]


def unsigned(content, about):
    del content[PROOF]


def of_another_request(content, about):
    sign_answer(content, {**about, "ticket": "0" * 32}, KEYS[2])


def of_another_round(content, about):
    sign_answer(content, {**about, "round": about["round"] + 1}, KEYS[2])


def of_another_run(content, about):
    sign_answer(content, {**about, "run": "another"}, KEYS[2])


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Federate two honest hospitals and one: the rounds' hospitals, and the audit log."""
    make_fast(monkeypatch)

    def go(spoil=lambda *_: None):
        code, _, _ = federate([Signing(0), Signing(1), Signing(2, spoil)], 2, tmp_path, keys=PUBLIC)
        assert code == 0
        return list(map(json.loads, (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()))

    return go


@pytest.mark.parametrize(
    "spoil",
    [by_another, changed, rewritten, unsigned, of_another_request, of_another_round, of_another_run],
    ids=lambda spoil: spoil.__name__,
)
def test_an_answer_that_its_hospital_did_not_sign_does_not_count(run, spoil):
    events = run(spoil)
    rounds = [event["hospitals"] for event in events if event["event"] == "round"]
    assert rounds == [["hospital-0", "hospital-1"]] * 2
    left = [event for event in events if event["event"] == "left_out"]
    assert [event["hospital"] for event in left] == ["hospital-2"] * 2
    assert all(event["why"].startswith("an answer came in its name that") for event in left)


def under_many_names(content, about):
    content["arrays"] = ArrayRecord({str(n): content["arrays"]["weights"] for n in range(1_000)})


def described(one, **otherwise):
    about = {"dtype": one.dtype, "shape": one.shape, "stype": one.stype, "data": one.data}
    return ArrayRecord({"weights": Array(**about | otherwise)})


def of_many_fields(content, about):
    content["arrays"] = described(content["arrays"]["weights"], dtype="f4," * 1_000)


def of_many_sides(content, about):
    content["arrays"] = described(content["arrays"]["weights"], shape=(1,) * 1_000)


@pytest.mark.parametrize("spoil", [under_many_names, of_many_fields, of_many_sides])
def test_arrays_that_cost_the_server_more_than_their_sender_are_not_worked_through(monkeypatch, run, spoil):
    """A megabyte of names for one array would have the server hash it for many minutes, while no round goes on."""
    hashed = []
    hash_of = proofs.update_sha256
    monkeypatch.setattr(proofs, "update_sha256", lambda arrays: hashed.append(arrays) or hash_of(arrays))
    events = run(spoil)
    left = [event for event in events if event["event"] == "left_out"]
    assert [event["hospital"] for event in left] == ["hospital-2"] * 2
    assert {(*arrays, *(one.dtype for one in arrays.values())) for arrays in hashed} == {
        ("weights", "float32")
    }
    assert all(len(one.shape) == 1 for arrays in hashed for one in arrays.values())


def test_who_is_revoked_while_it_works_is_not_called_a_forger(monkeypatch, tmp_path):
    make_fast(monkeypatch)
    keys = dict(PUBLIC)
    revoked = Signing(2, lambda _, about: about["round"] == 2 and keys.pop(3, None))
    code, _, said = federate([Signing(0), Signing(1), revoked], 2, tmp_path, keys=keys)
    events = list(map(json.loads, (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()))
    why = {event["why"] for event in events if event["event"] == "left_out"}
    assert code == 0 and why == {"its key is revoked or its admission has ended"}
    end = next(line for line in said if "the model was not delivered to" in line)
    assert end == "the model was not delivered to hospital-2: its key is revoked or its admission has ended"


def test_the_log_shows_who_sent_what(run):
    """Each update's signature is the hospital's, of what the log says, and of nobody else's key."""
    signed = [event for event in run() if event["event"] == "signed"]
    assert [(event["round"], event["hospital"]) for event in signed] == [
        (number, f"hospital-{k}") for number in (1, 2) for k in range(3)
    ]
    assert len({event["ticket"] for event in signed}) == 6
    for event in signed:
        one = {name: event[name] for name in ("ticket", "run", "round", "answer", "update")}
        node = int(event["hospital"][-1]) + 1
        check(PUBLIC[node], "answer", one, event["signature"])
        assert event["signature_sha256"] == hashlib.sha256(bytes.fromhex(event["signature"])).hexdigest()
        with pytest.raises(MedFLError):
            check(PUBLIC[node % 3 + 1], "answer", one, event["signature"])
        with pytest.raises(MedFLError):
            check(PUBLIC[node], "answer", {**one, "round": 9}, event["signature"])


def test_without_keys_nothing_is_signed_and_each_request_has_a_ticket_of_its_own(monkeypatch, tmp_path):
    make_fast(monkeypatch)
    workers = [Worker(f"hospital-{k}", [0.5] * 9) for k in range(2)]
    assert federate(workers, 2, tmp_path)[0] == 0
    tickets = [about["ticket"] for worker in workers for about in worker.heard]
    assert len(set(tickets)) == len(tickets) == 6 and "signed" not in (tmp_path / "audit.jsonl").read_text()
