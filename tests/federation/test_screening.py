"""Which updates may count, and which are left out; each kind of bad one as a hostile hospital would send it."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from common import MedFLError
from federation.weights import from_record
from federation.screening import Update, check_update, outliers
from federation.settings import FederationSettings

N = 400
SENT = torch.randn(N, generator=torch.Generator().manual_seed(0))
STEP = torch.randn(N, generator=torch.Generator().manual_seed(1))


def honest(label: str, seed: int, scale: float = 1.0) -> Update:
    """A step that all share, and as much again of the hospital's own."""
    own = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    return Update(label, SENT + scale * (STEP + own), 10)


HONEST = [honest(f"h{k}", 10 + k, 1 + k / 3) for k in range(4)]  # lengths from 1 to 2
SETTINGS = FederationSettings(clients=5)


def found(*bad: Update, **settings) -> set[str]:
    return set(outliers([*HONEST, *bad], SENT, FederationSettings(clients=5, **settings) if settings else SETTINGS))


def change(update: Update, factor: float) -> Update:
    return Update("bad", SENT + factor * (update.weights - SENT), update.examples)


def test_honest_hospitals_of_different_size_are_kept():
    assert found() == set()
    assert outliers([HONEST[0], change(HONEST[1], 50)], SENT, SETTINGS) == {}, "of two, none is the odd one"


@pytest.mark.parametrize("factor", [20, -20, 1e6, -1, -0.5])
def test_huge_and_sign_flipped_updates_are_left_out(factor):
    assert found(change(honest("x", 99), factor)) == {"bad"}


def test_two_of_five_that_work_together_are_left_out():
    flipped = [change(honest("x", seed), -2.0) for seed in (98, 99)]
    flipped[1].label = "worse"
    assert outliers([*HONEST[:3], *flipped], SENT, SETTINGS).keys() == {"bad", "worse"}


def test_the_reason_names_what_is_odd():
    reasons = outliers([*HONEST, change(honest("x", 99), 100)], SENT, SETTINGS)
    assert "times as long as the median" in reasons["bad"]
    assert "points against" in outliers([*HONEST, change(honest("x", 99), -1)], SENT, SETTINGS)["bad"]


def test_both_bounds_can_be_moved():
    huge, flipped = change(honest("x", 99), 20), change(honest("x", 99), -1)
    assert found(huge, max_update_norm_ratio=1e9) == set() and found(flipped, min_update_cosine=-1.0) == set()
    for wrong in ({"max_update_norm_ratio": 0}, {"min_update_cosine": -2}, {"min_update_cosine": float("nan")}):
        with pytest.raises(MedFLError, match="choose a number"):
            FederationSettings(**wrong)


@pytest.mark.parametrize(("weights", "examples", "text"), [
    ([1.0, float("nan")], 5, "not finite"), ([1.0, float("inf")], 5, "not finite"), ([1.0], 5, "1 weights"),
    ([1.0, 2.0, 3.0], 5, "3 weights"), ([1.0, 2.0], 0, "0 slices"), ([1.0, 2.0], -5, "-5 slices"),
    ([1.0, 2.0], 10**9, "it joined with 8")])
def test_updates_that_cant_be_averaged_are_refused(weights, examples, text):
    with pytest.raises(MedFLError, match=text):
        check_update(Update("a", torch.tensor(weights), examples), 2, 8)
    check_update(Update("a", torch.tensor([1.0, 2.0]), 8), 2, 8)


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("code from the network was run",))


def pickled() -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, np.array([Boom()], object), allow_pickle=True)
    return file.getvalue()


GOOD = Array(np.zeros(3, np.float32))


@pytest.mark.parametrize(("name", "array"), [
    ("weights", Array("float32", (2_500_000_000,), "numpy.ndarray", GOOD.data)),  # claims 10 GB
    ("weights", Array("float32", (3,), "numpy.ndarray", GOOD.data[:-5])),  # truncated
    ("weights", Array("float32", (3,), "numpy.ndarray", b"")), ("weights", Array("float32", (3,), "numpy.ndarray", pickled())),
    ("weights", Array(np.zeros(3, np.float64))), ("weights", Array(np.zeros((1, 3), np.float32))),
    ("weights", Array(np.zeros(3, np.int32))), ("Weights", GOOD)], ids=str)
def test_weights_in_another_form_are_refused_without_running_or_reserving_anything(name, array):
    with pytest.raises(MedFLError):
        vector = from_record(ArrayRecord({name: array}))
        check_update(Update("a", vector, 1), 2_500_000_000, 1)  # a claim that is believed would be found here
