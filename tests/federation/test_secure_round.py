"""Secure aggregation: its arithmetic, what a hospital refuses to give, and rounds of real hospitals in this
process."""

import json

import numpy as np
import pytest
import torch
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from in_process import RealHospital

import federation.hospital.answering
import federation.server.secure_round
from common import MedFLError
from federation.protocol.answers import SealedShares, parse
from federation.protocol.masks import binding, from_sum, mask, quantise, steps
from federation.protocol.messages import message
from federation.protocol.secure_aggregation import Party, threshold, unmasked
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack, variance_mask
from transunet import TransUNet

NODES = (5, 2**63 + 11, 7, 40)  # Flower's numbers have 64 bits
LIMIT, LENGTH = 2.0, 1000


class Group:
    """Hospitals that went through the first two stages; `late` gave no shares to the others."""

    def __init__(self, nodes=NODES, late=()):
        self.parties = {node: Party() for node in nodes}
        self.public = {str(node): party.keys(node) for node, party in self.parties.items()}
        self.sealed = {
            node: party.share(dict(self.public)) for node, party in self.parties.items() if node not in late
        }

    def masked(self, node: int, change: torch.Tensor, weight: float = 1.0, of=("run", 1)) -> np.ndarray:
        sealed = {str(by): texts[str(node)] for by, texts in self.sealed.items() if by != node}
        return self.parties[node].masked(sealed, change, weight, LIMIT, list(of))

    def shares(self, summed: list[int], missing: list[int]) -> dict[int, list[str]]:
        codes = {node: self.parties[node].agree(summed, missing) for node in summed}
        given = [
            self.parties[node].reveal(
                summed, missing, {str(by): codes[by][str(node)] for by in summed if by != node}
            )
            for node in summed
        ]
        return {node: [one[str(node)] for one in given] for node in (*summed, *missing)}

    @property
    def bound(self) -> bytes:
        return binding(["run", 1], self.public, {})

    def keys(self) -> dict[int, list[str]]:
        return {int(node): keys for node, keys in self.public.items()}


@pytest.mark.parametrize(
    ("late", "dead"), [((), ()), ((), (40,)), ((40,), ()), ((), (2**63 + 11,)), ((7,), (7,))]
)
def test_masks_cancel_in_the_sum_whoever_is_missing(late, dead):
    """late: dropped out before giving shares; dead: before giving an update."""
    group = Group(late=late)
    changes = {node: torch.randn(LENGTH) * 0.1 for node in group.sealed}
    vectors = {node: group.masked(node, change, 0.25) for node, change in changes.items() if node not in dead}
    summed, missing = list(vectors), [node for node in dead if node in group.sealed]
    total = sum(vectors.values(), np.zeros(LENGTH, np.uint32))
    bare = unmasked(total, group.shares(summed, missing), summed, group.keys(), group.bound)
    wanted = 0.25 * sum(changes[node].double() for node in summed)
    assert torch.allclose(
        from_sum(bare, len(summed), LIMIT, len(NODES)),
        wanted,
        atol=len(summed) * 2 * LIMIT / steps(4),
        rtol=0,
    )
    with pytest.raises(MedFLError, match="still masked"):
        from_sum(total, len(summed), LIMIT, len(NODES))


def test_shares_of_a_long_secret_are_refused():
    """The server opens a secret of 36 kB in minutes where there are 40 hospitals, and the sum is right."""
    parties = {node: Party() for node in NODES}
    public = {str(node): party.keys(node) for node, party in parties.items()}
    parties[7].seed = "ab" * 30_000
    for node, party in parties.items():
        told = {"sealed": party.share(dict(public)), "promised": party.promised, "seed": "0" * 64}
        if node != 7:
            assert parse(SealedShares, told)
            continue
        with pytest.raises(MedFLError, match="sealed"):
            parse(SealedShares, told)


@pytest.mark.parametrize("hospitals", [3, 4, 31, 32, 1000])
def test_sums_fit_into_32_bits_and_rounding_is_right_on_average(hospitals):
    assert hospitals * steps(hospitals) < 2**31 <= hospitals * steps(hospitals) * 4
    step = 2 * LIMIT / steps(hospitals)
    for value in (-LIMIT, LIMIT, 0.3 * step):
        values = quantise(torch.full((20_000,), value), 1.0, LIMIT, hospitals)
        back = from_sum(values, 1, LIMIT, hospitals)
        assert (back - value).abs().max() <= step and abs(float(back.mean()) - value) < 0.02 * step


def test_a_value_out_of_range_is_an_error_and_no_cut():
    for bad in (LIMIT * 1.001, -LIMIT * 1.001, float("nan"), float("inf")):
        change = torch.zeros(10)
        change[3] = bad
        with pytest.raises(MedFLError, match="--secure-range"):
            quantise(change, 0.001, LIMIT, 3)
    with pytest.raises(MedFLError, match="fewer slices than this one"):
        quantise(torch.zeros(10), 1.01, LIMIT, 3)


def test_a_mask_needs_the_whole_key():
    """Keys whose 32-bit words have the same parity give one mask with Flower's generator, so that 2^32 trials
    find it."""
    one, other = bytes(32), bytes(24) + b"\1\2\3\4" * 2
    assert np.array_equal(*(pseudo_rand_gen(key, 2**32, [(100,)])[0] for key in (one, other)))
    assert (mask(one, LENGTH) == mask(other, LENGTH)).mean() < 0.01 and np.array_equal(
        mask(one, LENGTH), mask(one, LENGTH)
    )
    # the stream of RFC 7539's first test vector for ChaCha20: key, nonce and counter all zero
    assert mask(one, 4).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


@pytest.mark.parametrize(
    ("summed", "missing"),
    [
        ([5, 7, 40, 2**63 + 11], [40]),  # both secrets of one
        ([7, 40, 2**63 + 11], [5]),  # this one's key
        ([5, 7], [40, 2**63 + 11]),  # a sum of two
        ([5, 7, 40], []),
        ([5, 7, 40, 6], [2**63 + 11]),
        ([5, 5, 7, 40], [2**63 + 11]),
    ],
)
def test_a_hospital_gives_no_shares_that_would_uncover_an_update(summed, missing):
    group = Group()
    for node in NODES:
        group.masked(node, torch.zeros(LENGTH))
    with pytest.raises(MedFLError, match="uncover an update; nothing was given"):
        group.parties[5].agree(summed, missing)
    with pytest.raises(MedFLError, match="twice or out of order"):
        group.parties[5].agree(list(NODES), [])  # not on a second try either
    with pytest.raises(MedFLError, match="twice or out of order"):
        group.parties[5].reveal(summed, missing, {})
    assert set(group.parties[5].kept()) == {"stage", "given"}


def test_no_sum_is_of_two():
    """One of three that gives another shares it can't use is in a sum of two, and knows the other's update."""
    group = Group(nodes=(5, 7, 40))
    for node in (5, 7):
        group.masked(node, torch.zeros(LENGTH))
    with pytest.raises(MedFLError, match="uncover an update; nothing was given"):
        group.parties[5].agree([5, 7], [40])


@pytest.mark.parametrize("hospitals", range(3, 40))
def test_no_two_groups_can_each_open_another_secret_of_one(hospitals):
    """A server that tells some that a hospital is in the sum and others that it is missing needs a threshold
    of both."""
    assert 2 * threshold(hospitals) > hospitals and threshold(hospitals) < hospitals


def test_a_round_is_summed_again_over_the_same_hospitals_alone():
    """Two sums of one round, with and without a hospital, would differ by its update."""
    first = Group()
    for node in NODES:
        first.masked(node, torch.zeros(LENGTH))
    first.shares(list(NODES), [])
    for of, missing, allowed in ((("run", 1), [], True), (("run", 1), [7], False), (("run", 2), [7], True)):
        again = Group()
        again.parties[5].given = Party(**json.loads(json.dumps(first.parties[5].kept()))).given
        for node in NODES:
            again.masked(node, torch.zeros(LENGTH), of=of)
        summed = [node for node in NODES if node not in missing]
        if allowed:
            again.parties[5].agree(summed, missing)
        else:
            with pytest.raises(MedFLError, match="another sum of a round"):
                again.parties[5].agree(summed, missing)


def test_steps_out_of_order_and_forged_lists_of_keys_are_refused():
    group = Group()
    with pytest.raises(MedFLError, match="out of order"):
        group.parties[5].share(group.public)
    with pytest.raises(MedFLError, match="out of order"):
        group.parties[5].agree(list(NODES), [])
    for forge in (
        lambda keys: keys.pop("7"),
        lambda keys: keys.update({"7": keys["40"]}),
        lambda keys: keys.update({"5": ["a", "b"]}),
    ):
        party, other, third = Party(), Party(), Party()
        keys = {"5": party.keys(5), "7": other.keys(7), "40": third.keys(40)}
        forge(keys)
        with pytest.raises(MedFLError, match="list of keys is not what it should be"):
            party.share(keys)


def test_shares_of_others_that_were_changed_or_exchanged_are_refused():
    for forge, sentence in (
        (lambda texts: texts[7].update({"5": texts[7]["5"][:-4] + "0000"}), "can't be opened"),
        (lambda texts: texts[7].update({"5": texts[40]["5"]}), "can't be opened"),
        (lambda texts: texts[7].update({"5": texts[5]["7"]}), "meant for somebody else"),
        (lambda texts: [texts.pop(node) for node in (7, 40)], "too few hospitals"),
    ):
        group = Group()
        forge(group.sealed)
        with pytest.raises(MedFLError, match=sentence):
            group.masked(5, torch.zeros(LENGTH))


def test_shares_that_are_too_few_open_nothing():
    group = Group()
    vectors = {node: group.masked(node, torch.zeros(LENGTH)) for node in NODES}
    shares = group.shares(list(NODES), [])
    with pytest.raises(MedFLError, match="too few hospitals gave their shares"):
        unmasked(
            sum(vectors.values(), np.zeros(LENGTH, np.uint32)),
            {**shares, 7: shares[7][:2]},
            list(NODES),
            group.keys(),
            group.bound,
        )


def test_another_hospitals_key_in_the_place_of_a_missing_one_is_noticed():
    group = Group()
    vectors = {node: group.masked(node, torch.zeros(LENGTH)) for node in NODES if node != 40}
    shares = group.shares(list(vectors), [40])
    public = group.keys()
    with pytest.raises(MedFLError, match="wrong shares"):
        unmasked(
            sum(vectors.values(), np.zeros(LENGTH, np.uint32)),
            shares,
            list(vectors),
            {**public, 40: public[7]},
            group.bound,
        )


def test_wrong_shares_are_noticed():
    for dead in ([], [40]):
        group = Group()
        vectors = {node: group.masked(node, torch.zeros(LENGTH)) for node in NODES if node not in dead}
        shares = group.shares(list(vectors), dead)
        node = (dead or [7])[0]
        shares[node][0] = shares[node][0][:8] + "00" * 16 + shares[node][0][40:]
        with pytest.raises(MedFLError, match="wrong shares|still masked"):
            total = unmasked(
                sum(vectors.values(), np.zeros(LENGTH, np.uint32)),
                shares,
                list(vectors),
                group.keys(),
                group.bound,
            )
            from_sum(total, len(vectors), LIMIT, 4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"clients": 2}, "takes 3 hospitals or more"),
        ({"strategy": "fedmedian"}, "looks at each hospital's update"),
        ({"strategy": "krum", "clients": 5}, "looks at each hospital's update"),
        ({"strategy": "fedtrimmedavg", "clients": 5}, "looks at each hospital's update"),
        ({"max_update_norm_ratio": 5.0}, "screen single updates"),
        ({"min_update_cosine": -1.0}, "screen single updates"),
        ({"dp_clip": 1.0, "dp_epsilon": 8.0}, "choose one of the two"),
        ({"update_dtype": "float16"}, "whole numbers of 32 bits"),
        ({"secure_range": 0.0}, "--secure-range is 0"),
    ],
)
def test_what_needs_single_updates_is_refused_with_the_reason(settings, sentence):
    with pytest.raises(MedFLError, match=sentence):
        FederationSettings(**{"clients": 3, "secure_aggregation": True, **settings})


@pytest.fixture
def hospitals(tmp_path, phantoms):
    """Makes three real hospitals for a folder's name."""

    def make(out: str) -> list[RealHospital]:
        return [RealHospital(tmp_path / out, cid, phantoms) for cid in range(3)]

    return make


THREE = {"clients": 3, "partition": "iid"}


@pytest.mark.parametrize(
    "more", [{"strategy": "fedprox"}, {"strategy": "fedadam"}, {"keep_norm_local": True}]
)
def test_a_round_is_as_without_it(federate, hospitals, more):
    """It gives the plain round's weights, scores and best model, but for the steps of the quantisation."""
    training = {"freeze_encoder_epochs": 1} if "keep_norm_local" in more else {}
    plain, _, _ = federate(1, training, out="plain", hospitals=hospitals("plain"), **THREE, **more)
    secure, _, _ = federate(
        1, training, out="secure", hospitals=hospitals("secure"), secure_aggregation=True, **THREE, **more
    )
    torch.manual_seed(0)
    moved = (plain.weights - pack(TransUNet("tiny", 32).state_dict())).abs().max()
    difference = (secure.weights - plain.weights).abs().max()
    assert 0 < difference < (2e-5 if more.get("strategy") == "fedadam" else 2e-6) < 0.01 * moved, (
        difference,
        moved,
    )
    for name in ("val_dice", "examples", "site", "bytes_received"):
        assert [row[name] for row in secure.progress.rows[:3]] == [
            row[name] for row in plain.progress.rows[:3]
        ]
    assert secure.best.exists() and secure.progress.best_round == plain.progress.best_round


class Liar(RealHospital):
    """Tells other things of its update than are true."""

    def __init__(self, *where, **lies):
        super().__init__(*where)
        self.lies = lies

    def answer(self, incoming):
        reply = super().answer(incoming)
        about = json.loads(reply.content["about"]["json"])
        if "examples" in about:
            reply.content["about"]["json"] = json.dumps(about | self.lies)
        return reply


@pytest.mark.parametrize(
    ("lies", "reason"), [({"examples": 10_000}, "counts 10000 slices"), ({"round": 7}, "is for round 7")]
)
def test_an_update_that_counts_too_much_or_is_of_another_round_is_left_out(
    federate, hospitals, phantoms, tmp_path, lies, reason
):
    four = [*hospitals("out"), Liar(tmp_path / "out", 3, phantoms, **lies)]
    settings = {**THREE, "clients": 4, "val_fraction": 0.0, "secure_aggregation": True}
    state, _, said = federate(1, hospitals=four, **settings)
    assert any(line.startswith("round 1 without hospital-3") and reason in line for line in said)
    assert {row["site"] for row in state.progress.rows if row["round"] == 1} == {
        f"hospital-{k}" for k in range(3)
    }


def test_no_round_begins_with_two(federate, hospitals, monkeypatch, phantoms, tmp_path):
    """One of three gives no keys: nobody is asked to train for a sum of two."""
    monkeypatch.setattr(federation.server.secure_round, "STAGE_TIME", 1.0)
    three = [
        *hospitals("out")[:2],
        Sleeper(tmp_path / "out", 2, phantoms, stage="keys", says={"failure": "bug"}),
    ]
    with pytest.raises(AssertionError, match="has no sum"):
        federate(1, hospitals=three, secure_aggregation=True, **THREE)
    assert three[0].asked == [] and three[1].asked == []


class Sleeper(RealHospital):
    """Answers everything but one kind of message of secure aggregation; `says`: what it answers then, None
    for nothing."""

    def __init__(self, *where, stage: str, says: dict | None):
        super().__init__(*where)
        self.stage, self.says = stage, says

    def answer(self, incoming):
        about = json.loads(incoming.content["about"]["json"])
        if about.get("query", "update" if "sealed" in about else None) != self.stage:
            return super().answer(incoming)
        return None if self.says is None else type(incoming)(message(self.says), reply_to=incoming)


@pytest.mark.parametrize("says", [None, {"keys": [1, 2], "sealed": {"1": "x"}, "shares": {}}])
@pytest.mark.parametrize("stage", ["keys", "shares", "update", "agree", "unmask"])
def test_one_of_four_that_hangs_or_answers_nonsense_ends_no_round(
    federate, hospitals, monkeypatch, phantoms, tmp_path, stage, says
):
    monkeypatch.setattr(federation.server.secure_round, "STAGE_TIME", 1.0)
    four = [*hospitals("out"), Sleeper(tmp_path / "out", 3, phantoms, stage=stage, says=says)]
    settings = {
        **THREE,
        "clients": 4,
        "secure_aggregation": True,
        "val_fraction": 0.0,
    }  # patients enough for four
    state, _, said = federate(
        1, hospitals=four, round_timeout=4.0 if stage == "update" else 300.0, **settings
    )
    assert {row["site"] for row in state.progress.rows if row["round"] == 1} == {
        f"hospital-{k}" for k in range(4 if stage in ("agree", "unmask") else 3)
    }
    assert any(line.startswith("round 1 without hospital-3") for line in said) == (
        stage not in ("agree", "unmask")
    )


def test_three_hospitals_or_none_are_in_a_sum():
    """In a sum of two, each of the two finds the other's update: to 2e-6, when the third of three dropped out in
    the middle of a round."""
    group = Group(nodes=(5, 7, 40))
    for node in (5, 7):
        group.masked(node, torch.zeros(LENGTH))
    with pytest.raises(MedFLError, match="uncover an update; nothing was given"):
        group.parties[5].agree([5, 7], [40])


@pytest.mark.parametrize("dead", [(2,), (1, 2)])
def test_too_few_for_a_sum_uncover_nothing(federate, hospitals, monkeypatch, phantoms, tmp_path, dead):
    """One or two of three drop out before their updates: the others are never asked for shares, and the run
    ends without a quorum."""
    monkeypatch.setattr(federation.server.secure_round, "STAGE_TIME", 1.0)
    fails = {"stage": "update", "says": {"failure": "bug"}}
    three = hospitals("out")
    for cid in dead:
        three[cid] = Sleeper(tmp_path / "out", cid, phantoms, **fails)
    with pytest.raises(AssertionError, match="has no sum"):
        federate(1, hospitals=three, secure_aggregation=True, min_clients=1, **THREE)
    kept = json.loads(three[0].context.state["secure"]["json"])
    assert kept["stage"] == "masked" and not kept["given"]


def test_an_update_out_of_range_is_that_hospitals_error(federate, hospitals):
    with pytest.raises(AssertionError, match="without hospital-0: its update does not fit"):
        federate(1, hospitals=hospitals("out"), secure_aggregation=True, secure_range=1e-6, **THREE)


def test_a_hospital_under_a_mask_makes_no_variance_negative(federate, hospitals, monkeypatch):
    """Nobody sees its update, and the sum of one running variance would fall below 0."""
    masked = federation.hospital.answering.masked

    def spoilt(task, update, *others):
        below = variance_mask(TransUNet("tiny", 32))
        return masked(task, torch.where(below, torch.full_like(update, -7.0), update), *others)

    monkeypatch.setattr("federation.hospital.answering.masked", spoilt)
    state, _, _ = federate(1, hospitals=hospitals("out"), secure_aggregation=True, **THREE)
    variances = state.weights[variance_mask(state.model)]
    assert (variances >= 0).all() and len(variances)
