"""Which updates may count, which are cut, and which are left out; each kind of bad one as a hostile hospital
would send it."""

import io

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from common import MedFLError
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import from_record
from federation.server.screening import check_update, screen
from federation.server.updates import Updates

N = 400
SENT = torch.randn(N, generator=torch.Generator().manual_seed(0))
STEP = torch.randn(N, generator=torch.Generator().manual_seed(1))
STATISTICS = torch.arange(N) >= 320  # a fifth of the values, and most of an update's length
SCALE = torch.where(STATISTICS, 30.0, 1.0)


def honest(seed: int, scale: float = 1.0) -> torch.Tensor:
    """A change: a step that all share, and as much again of the hospital's own."""
    return SCALE * scale * (STEP + torch.randn(N, generator=torch.Generator().manual_seed(seed)))


HONEST = {f"h{k}": honest(10 + k, 1 + k / 3) for k in range(4)}  # lengths from 1 to 2


@pytest.fixture
def screened(tmp_path):
    """Why updates are left out, by label, and the changes of the rest, as they are cut, by label."""

    def run(changes: dict[str, torch.Tensor], **settings) -> tuple[dict, dict]:
        updates = Updates(SENT, STATISTICS, tmp_path)
        for label, change in changes.items():
            updates.add(label, SENT + change, 10)
        found = screen(updates, FederationSettings(clients=5, **settings))
        blocks = np.concatenate([block for _, block in updates.blocks()], axis=1)
        return found, dict(zip(updates.labels, torch.from_numpy(blocks)))

    return run


def length(change: torch.Tensor, part: torch.Tensor) -> float:
    return float(change[part].norm())


def test_honest_hospitals_of_different_size_are_kept_whole(screened):
    found, kept = screened(HONEST)
    assert found == {} and all(
        torch.allclose(kept[label].float(), change, atol=1e-4) for label, change in HONEST.items()
    )


def test_of_two_none_is_the_odd_one(screened):
    found, kept = screened({"a": HONEST["h0"], "b": -50 * HONEST["h0"]})
    assert found == {} and length(kept["b"], ~STATISTICS) > 40 * length(kept["a"], ~STATISTICS)


@pytest.mark.parametrize("factor", [40, -40, 1e6, -1, -0.5])
def test_huge_and_sign_flipped_updates_are_left_out(screened, factor):
    found, kept = screened({**HONEST, "bad": factor * honest(99)})
    assert found.keys() == {"bad"} and kept.keys() == HONEST.keys()


@pytest.mark.parametrize("part", [STATISTICS, ~STATISTICS], ids=["statistics", "trained weights"])
def test_a_long_update_is_cut_to_the_bound_and_not_thrown_away(screened, part):
    long = honest(99)
    long[part] *= 6
    found, kept = screened({**HONEST, "long": long})
    median = sorted(length(change, part) for change in [*HONEST.values(), long])[2]
    assert found == {} and length(kept["long"], part) == pytest.approx(2 * median, rel=1e-3)
    assert torch.allclose(kept["long"][~part].float(), long[~part], atol=1e-4), "the other part stays"
    direction = torch.nn.functional.cosine_similarity(kept["long"][part].float(), long[part], dim=0)
    assert direction == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("factor", [-1.0, -5.0])
def test_honest_statistics_do_not_hide_what_was_done_to_the_weights(screened, factor):
    """The statistics are most of the update's length, so that all of it still points as the others do."""
    bad = honest(99)
    bad[~STATISTICS] *= factor
    every = torch.stack([*HONEST.values()]).sum(dim=0)
    assert torch.nn.functional.cosine_similarity(bad, every, dim=0) > 0.5
    found, _ = screened({**HONEST, "bad": bad})
    assert found.keys() == {"bad"} and "trained weights points against" in found["bad"]


def test_statistics_that_point_against_the_others_do_not_count_and_the_weights_do(screened):
    """Late in a training an honest hospital's can: two of 480 updates of real sites did."""
    odd = honest(99)
    odd[STATISTICS] *= -1
    found, kept = screened({**HONEST, "odd": odd})
    assert found == {} and length(kept["odd"], STATISTICS) == 0
    assert torch.allclose(kept["odd"][~STATISTICS].float(), odd[~STATISTICS], atol=1e-4)
    assert all(length(kept[label], STATISTICS) > 0 for label in HONEST)


def test_statistics_that_are_far_beyond_are_left_out(screened):
    bad = honest(99)
    bad[STATISTICS] *= 50
    found, _ = screened({**HONEST, "bad": bad})
    assert "statistics is" in found["bad"] and "times as long as the median" in found["bad"]


def test_two_of_five_that_work_together_are_left_out(screened):
    flipped = {"bad": -2 * honest(98), "worse": -2 * honest(99)}
    found, _ = screened({**{label: HONEST[label] for label in ("h0", "h1", "h2")}, **flipped})
    assert found.keys() == flipped.keys()


def test_the_bounds_can_be_moved(screened):
    assert screened({**HONEST, "x": 40 * honest(99)}, max_update_norm_ratio=1e9)[0] == {}
    assert screened({**HONEST, "x": -honest(99)}, min_update_cosine=-1.0)[0] == {}
    _, kept = screened({**HONEST, "x": 6 * honest(99)}, cut_update_norm_ratio=1e9)
    assert torch.allclose(kept["x"].float(), 6 * honest(99), atol=1e-3)
    for wrong in (
        {"max_update_norm_ratio": 0},
        {"min_update_cosine": -2},
        {"min_update_cosine": float("nan")},
        {"cut_update_norm_ratio": 0},
        {"max_weight_ratio": -1},
    ):
        with pytest.raises(MedFLError, match="choose a number"):
            FederationSettings(**wrong)


@pytest.mark.parametrize("norm", ["without statistics", "nobody moved"])
def test_changes_of_nothing_are_compared_without_a_fault(screened, norm):
    given = {label: change.clone() for label, change in HONEST.items()}
    for change in given.values():
        change[STATISTICS if norm == "without statistics" else slice(None)] = 0
    found, kept = screened(given)
    assert found == {} and kept.keys() == HONEST.keys()


@pytest.mark.parametrize(
    ("weights", "examples", "text"),
    [
        ([1.0, float("nan")], 5, "not finite"),
        ([1.0, float("inf")], 5, "not finite"),
        ([1.0], 5, "1 weights"),
        ([1.0, 2.0, 3.0], 5, "3 weights"),
        ([1.0, 2.0], 0, "0 slices"),
        ([1.0, 2.0], -5, "-5 slices"),
        ([1.0, 2.0], 10**9, "it joined with 8"),
        ([1.0, -1e-9], 5, "running variances below 0"),
    ],
)
def test_updates_that_cant_be_averaged_are_refused(weights, examples, text):
    variances = torch.tensor([False, True])
    with pytest.raises(MedFLError, match=text):
        check_update(torch.tensor(weights), examples, 2, 8, variances)
    check_update(torch.tensor([-1.0, 0.0]), 8, 2, 8, variances)


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("code from the network was run",))


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Boom()], object), allow_pickle=True)
    return file.getvalue()


GOOD = Array(np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("weights", Array("float32", (2_500_000_000,), "numpy.ndarray", GOOD.data)),  # claims 10 GB
        ("weights", Array("float32", (3,), "numpy.ndarray", GOOD.data[:-5])),  # truncated
        ("weights", Array("float32", (3,), "numpy.ndarray", b"")),
        ("weights", Array("float32", (3,), "numpy.ndarray", pickled())),
        ("weights", Array(np.zeros(3, np.float64))),
        ("weights", Array(np.zeros((1, 3), np.float32))),
        ("weights", Array(np.zeros(3, np.int32))),
        ("Weights", GOOD),
    ],
    ids=str,
)
def test_weights_in_another_form_are_refused_without_running_or_reserving_anything(name, array):
    with pytest.raises(MedFLError):
        vector = from_record(ArrayRecord({name: array}))
        # a claim that is believed would be found here
        check_update(vector, 1, 2_500_000_000, 1, torch.zeros(0, dtype=torch.bool))
