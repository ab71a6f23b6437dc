"""evaluation/metrics.py against scikit-learn, brute force, identities and masks that are counted by hand."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score

from common import MedFLError
from evaluation import metrics, surfaces
from training import segmentation_loss

SEEDS = range(6)


def random_masks(seed, shape=(4, 11, 13), share=0.3):
    return np.random.default_rng(seed).random((2, *shape)) < share


def blobs(seed, slices=3, side=24):
    """Two overlapping discs per slice, some cut off by the picture's edge: (S, H, W) uint8 0/255 each."""
    rng = np.random.default_rng(seed)
    centres, radii = rng.integers(2, side - 2, (slices, 2)), rng.integers(4, 8, (2, slices))
    shifted = centres + rng.integers(-3, 4, (slices, 2))
    y, x = np.mgrid[:side, :side]
    discs = [
        [(y - cy) ** 2 + (x - cx) ** 2 <= r**2 for (cy, cx), r in zip(*of_mask)]
        for of_mask in ((centres, radii[0]), (shifted, radii[1]))
    ]
    return np.array(discs, dtype=np.uint8) * 255


def brute_force_hd95_in_plane(prediction, truth):
    distances = []
    for first, second in zip(prediction, truth):
        a, b = boundary_by_loop(first), boundary_by_loop(second)
        if a and b:
            distances += [min(np.hypot(p[0] - q[0], p[1] - q[1]) for q in b) for p in a]
            distances += [min(np.hypot(p[0] - q[0], p[1] - q[1]) for q in a) for p in b]
    return float(np.percentile(distances, 95)) if distances else None


def boundary_by_loop(mask):
    height, width = mask.shape

    def inside(y, x):
        return 0 <= y < height and 0 <= x < width and mask[y, x] != 0

    return [
        (y, x)
        for y in range(height)
        for x in range(width)
        if inside(y, x) and not all(inside(*n) for n in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)))
    ]


def row(patient="p", site="CS", prediction=(1, 0), truth=(1, 0)):
    """A patient of one slice with two pixels."""
    return metrics.score_patient(patient, site, np.array([[prediction]]), np.array([[truth]]))


def rows_with_dice(values, prefix="p"):
    return [{**row(f"{prefix}{i}"), "dice": value} for i, value in enumerate(values)]


# Counts, Dice and IoU


def test_counts_by_hand():
    prediction = np.array([[255, 255, 0], [0, 1, 0]], dtype=np.uint8)
    truth = np.array([[1, 0, 0], [0, 1, 1]])
    assert metrics.counts(prediction, truth) == (2, 1, 1)
    assert metrics.dice(2, 1, 1) == pytest.approx(2 / 3)
    assert metrics.iou(2, 1, 1) == 0.5
    assert all(type(count) is int for count in metrics.counts(prediction, truth))


def test_counts_of_255_do_not_overflow():
    full = np.full((300, 300), 255, dtype=np.uint8)
    assert metrics.counts(full, full) == (90_000, 0, 0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_dice_and_iou_agree_with_scikit_learn(seed, share):
    prediction, truth = random_masks(seed, share=share)
    scored = metrics.score_patient("p", "CS", prediction, truth)
    assert scored["dice"] == pytest.approx(f1_score(truth.ravel(), prediction.ravel()), abs=1e-12)
    assert scored["iou"] == pytest.approx(jaccard_score(truth.ravel(), prediction.ravel()), abs=1e-12)
    assert scored["dice"] == pytest.approx(2 * scored["iou"] / (1 + scored["iou"]), abs=1e-12)


@pytest.mark.parametrize("figure", [metrics.dice, metrics.iou])
def test_empty_truth(figure):
    assert figure(0, 0, 0) == 1.0
    assert figure(0, 1, 0) == 0.0
    assert figure(0, 0, 5) == 0.0
    assert figure(7, 0, 0) == 1.0


def test_different_shapes_are_refused():
    for call in (metrics.counts, surfaces.hd95, lambda p, t: metrics.score_patient("p", "CS", p, t)):
        with pytest.raises(MedFLError, match="differ in shape"):
            call(np.zeros((1, 4, 4)), np.zeros((1, 4, 5)))


def test_a_single_slice_is_no_volume():
    for call in (surfaces.hd95, lambda p, t: metrics.score_patient("p", "CS", p, t)):
        with pytest.raises(MedFLError, match="stack the slices"):
            call(np.ones((4, 4)), np.ones((4, 4)))


# HD95 and surface Dice

SPACING = (5.0, 0.5, 2.0)  # mm


def surface_by_loop(mask):
    """Voxels with one of six neighbours outside of the mask, or of the volume."""
    voxels = {tuple(map(int, place)) for place in np.argwhere(mask)}
    steps = [(s, 0, 0) for s in (1, -1)] + [(0, s, 0) for s in (1, -1)] + [(0, 0, s) for s in (1, -1)]
    return [v for v in voxels if any((v[0] + a, v[1] + b, v[2] + c) not in voxels for a, b, c in steps)]


def brute_force_distances(prediction, truth, spacing):
    a, b = (np.array(surface_by_loop(mask)) * spacing for mask in (prediction, truth))
    pairs = np.linalg.norm(a[:, None] - b[None], axis=2)
    return np.concatenate([pairs.min(axis=1), pairs.min(axis=0)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masks", [random_masks, blobs, lambda seed: random_masks(seed, share=0.01)])
def test_surfaces_in_three_dimensions_agree_with_brute_force(masks, seed):
    prediction, truth = masks(seed)
    distances = brute_force_distances(prediction, truth, SPACING)
    assert surfaces.hd95(prediction, truth, SPACING) == pytest.approx(np.percentile(distances, 95))
    assert surfaces.surface_dice(prediction, truth, SPACING) == pytest.approx(np.mean(distances <= 2.0))


def test_a_false_tumour_on_other_slices_is_far_and_never_hidden():
    """The distance in the plane is 0 there, and says beside it on how many slices only one mask is."""
    truth = np.zeros((20, 64, 64), bool)
    truth[5:8, 20:30, 20:30] = 1
    false, missing = truth.copy(), np.zeros_like(truth)
    false[15:18, 5:60, 5:60] = 1
    missing[5, 20:30, 20:30] = 1
    assert surfaces.hd95_in_plane(false, truth) == (0.0, 3)
    assert surfaces.hd95(false, truth, (5.0, 1.0, 1.0)) > 40
    assert surfaces.hd95_in_plane(missing, truth) == (0.0, 2)
    assert surfaces.hd95(missing, truth, (5.0, 1.0, 1.0)) == 10.0
    assert surfaces.surface_dice(missing, truth, (5.0, 1.0, 1.0)) < 0.7


def test_an_empty_mask_has_no_distance_and_no_surface_in_common():
    empty, full = np.zeros((2, 3, 4, 4))
    full[1, 1, 1] = 1
    assert surfaces.hd95(empty, full) is surfaces.hd95(full, empty) is surfaces.hd95(empty, empty) is None
    assert surfaces.surface_dice(empty, full, SPACING) == surfaces.surface_dice(full, empty, SPACING) == 0
    assert surfaces.surface_dice(empty, empty, SPACING) is None


def test_surface_dice_counts_what_lies_within_two_millimetres():
    prediction, truth = np.zeros((2, 1, 1, 9))
    prediction[0, 0, 2], truth[0, 0, 4] = 1, 1
    assert surfaces.surface_dice(prediction, truth, (1.0, 1.0, 1.0)) == 1
    assert surfaces.surface_dice(prediction, truth, (1.0, 1.0, 1.01)) == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masks", [random_masks, blobs, lambda seed: random_masks(seed, share=0.01)])
def test_hd95_in_the_plane_agrees_with_brute_force(masks, seed):
    prediction, truth = masks(seed)
    expected = brute_force_hd95_in_plane(prediction, truth)
    got, lonely = surfaces.hd95_in_plane(prediction, truth)
    assert got is expected is None or got == pytest.approx(expected, abs=1e-9)
    assert lonely == sum(bool(p.any()) != bool(t.any()) for p, t in zip(prediction, truth))


def test_hd95_by_hand():
    prediction, truth = np.zeros((2, 1, 9, 9))
    prediction[0, 1, 1] = truth[0, 4, 5] = 1
    assert surfaces.hd95(prediction, truth) == 5.0
    assert surfaces.hd95_in_plane(prediction, truth) == (5.0, 0)


def test_hd95_pools_the_distances_of_both_directions_and_all_slices():
    prediction, truth = np.zeros((2, 2, 3, 40))
    prediction[0, 1, :19] = truth[0, 1, :19] = 1  # 38 distances of 0
    prediction[1, 1, 0] = truth[1, 1, 10] = 1  # 2 distances of 10
    assert surfaces.hd95_in_plane(prediction, truth)[0] == pytest.approx(0.5)
    far = (30.0, 1.0, 1.0)  # so that the nearest lies in the same slice
    assert surfaces.hd95(prediction, truth, far) == pytest.approx(0.5)


def test_hd95_takes_the_volumes_edge_as_outside():
    full, corner = np.ones((1, 5, 5)), np.zeros((1, 5, 5))
    corner[0, 0, 0] = 1
    assert len(boundary_by_loop(full[0])) == 16
    assert surfaces.hd95_in_plane(full, full)[0] == 0.0
    assert surfaces.hd95_in_plane(full, corner)[0] == pytest.approx(brute_force_hd95_in_plane(full, corner))
    block = np.ones((3, 3, 3))
    assert len(surface_by_loop(block)) == 26
    assert surfaces.hd95(block, block) == 0.0


def test_hd95_in_the_plane_is_none_where_no_slice_has_both():
    prediction, truth = np.zeros((2, 2, 4, 4))
    assert surfaces.hd95_in_plane(prediction, truth) == (None, 0)
    prediction[0, 1, 1] = truth[1, 1, 1] = 1
    assert surfaces.hd95_in_plane(prediction, truth) == (None, 2)


def test_hd95_does_not_depend_on_where_the_tumour_lies():
    prediction, truth = blobs(1)
    moved = [np.pad(mask, ((2, 1), (30, 5), (7, 40))) for mask in (prediction, truth)]
    padded = [np.pad(mask, 1) for mask in (prediction, truth)]
    assert surfaces.hd95(*moved) == surfaces.hd95(*padded)
    assert surfaces.hd95_in_plane(*moved) == surfaces.hd95_in_plane(*padded)


# One patient


@pytest.mark.parametrize("seed", SEEDS)
def test_symmetry(seed):
    prediction, truth = blobs(seed)
    one, other = (
        metrics.score_patient("p", "CS", prediction, truth),
        metrics.score_patient("p", "CS", truth, prediction),
    )
    for figure in ("dice", "iou", "hd95_in_plane_px", "tp"):
        assert one[figure] == other[figure]
    assert (one["fp"], one["fn"]) == (other["fn"], other["fp"])


@pytest.mark.parametrize("seed", SEEDS)
def test_order_of_slices_does_not_matter(seed):
    prediction, truth = blobs(seed, slices=5)
    order = np.random.default_rng(seed).permutation(5)
    one = metrics.score_patient("p", "CS", prediction, truth)
    other = metrics.score_patient("p", "CS", prediction[order], truth[order])
    assert one == pytest.approx(other)


def test_a_patient_by_hand():
    truth = np.array([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]])
    prediction = np.array([[[1, 1, 1, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]], [[0, 0, 0, 0]]])
    scored = metrics.score_patient("TCGA_CS_1", "CS", prediction, truth)
    assert scored == {
        "patient": "TCGA_CS_1",
        "site": "CS",
        "slices": 4,
        "dice": pytest.approx(4 / 7),
        "iou": pytest.approx(2 / 5),
        "hd95_in_plane_px": pytest.approx(0.8),
        "slices_with_one_mask": 2,
        "tp": 2,
        "fp": 2,
        "fn": 1,
        "slice_dice_sum": pytest.approx(0.8),
        "tumour_slices": 2,
        "empty_slices": 2,
        "empty_slices_with_prediction": 1,
    }
    assert all(type(value) in (str, int, float) for value in scored.values())


def test_patients_without_tumour():
    assert row(prediction=(0, 0), truth=(0, 0))["dice"] == row(prediction=(0, 0), truth=(0, 0))["iou"] == 1.0
    assert row(prediction=(0, 1), truth=(0, 0))["dice"] == row(prediction=(0, 1), truth=(0, 0))["iou"] == 0.0


# The intervals

INTERVALS = (metrics.mean_interval, metrics.bootstrap_interval)


@pytest.mark.parametrize("interval", INTERVALS)
def test_no_interval_below_five_values(interval):
    assert interval([]) is interval([0.5, 0.6, 0.7, 0.8]) is None
    assert interval([0.5, 0.6, 0.7, 0.8, 0.9]) is not None


@pytest.mark.parametrize("count", [5, 8, 15, 40])
@pytest.mark.parametrize("shape", [(4, 1.5), (8, 2), (6, 1), (2, 0.5), (1, 6)])
def test_the_interval_of_the_mean_covers_what_it_says(count, shape):
    """Of skewed values between 0 and 1, as a Dice is: at least 0.93, where a percentile bootstrap of 5 covers
    0.83. The bound leaves three standard errors of 2,000 draws."""
    draws = np.random.default_rng(count).beta(*shape, (2_000, count))
    true = shape[0] / sum(shape)
    covered = [low <= true <= high for low, high in map(metrics.mean_interval, draws)]
    assert np.mean(covered) >= 0.93 - 3 * np.sqrt(0.93 * 0.07 / 2_000)


def test_the_bootstrap_covers_differences_of_few_patients():
    """Hesterberg's correction: without it 0.83 of 5 patients."""
    random = np.random.default_rng(0)
    draws = random.normal(0.02, 0.05, (300, 5))
    covered = [
        low <= 0.02 <= high for low, high in (metrics.bootstrap_interval(d, resamples=1_000) for d in draws)
    ]
    assert np.mean(covered) > 0.88


def test_interval_is_reproducible_and_contains_the_mean():
    values = np.random.default_rng(0).random(20)
    low, high = metrics.bootstrap_interval(values)
    assert metrics.bootstrap_interval(values) == [low, high]
    assert metrics.bootstrap_interval(values, seed=1) != [low, high]
    assert values.min() < low < values.mean() < high < values.max()
    low, high = metrics.mean_interval(values)
    assert values.min() < low < values.mean() < high < values.max()


def test_interval_is_about_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=200)
    half_width = 1.96 * values.std() / np.sqrt(200)
    expected = [values.mean() - half_width, values.mean() + half_width]
    assert metrics.bootstrap_interval(values) == pytest.approx(expected, abs=0.02)
    shares = np.clip(0.5 + values / 10, 0, 1)
    assert np.diff(metrics.mean_interval(shares))[0] == pytest.approx(2 * half_width / 10, rel=0.05)


def test_intervals_of_equal_values():
    """Differences of 0 are 0; but equal Dice of five patients don't say what a sixth would have."""
    assert metrics.bootstrap_interval([0.5] * 5) == [0.5, 0.5]
    low, high = metrics.mean_interval([0.95] * 5)
    assert low < 0.85 and high == 1.0


# Over patients


def test_summary_by_hand():
    rows = [
        row("a", prediction=(1, 0), truth=(1, 0)),
        row("b", prediction=(1, 1), truth=(1, 0)),
        row("c", prediction=(0, 0), truth=(1, 1)),
        row("d", prediction=(0, 1), truth=(0, 0)),
        row("e", prediction=(0, 0), truth=(0, 0)),
    ]
    summary = metrics.summarise(rows)
    assert summary["volume_dice"]["mean"] == pytest.approx((1 + 2 / 3 + 0 + 0 + 1) / 5)
    assert summary["volume_dice"]["median"] == pytest.approx(2 / 3)
    assert summary["volume_dice"]["ci95"] == metrics.mean_interval([r["dice"] for r in rows])
    assert summary["volume_iou"] == {"mean": pytest.approx((1 + 0.5 + 0 + 0 + 1) / 5), "median": 0.5}
    assert summary["pooled_dice"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 2))
    assert summary["slice_dice_tumour"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert summary["empty_slice_false_positive_rate"] == 0.5
    assert summary["hd95_in_plane_px"] == {
        "mean": pytest.approx(np.mean([0, 0.9])),
        "median": pytest.approx(0.45),
        "undefined": 3,
        "slices_with_one_mask": 2,
    }
    assert summary["missed_patients"] == 1
    assert summary["patients_scored"] == 5


def test_missed_patients_have_a_tumour_and_no_prediction_at_all():
    missed, elsewhere, healthy = (
        row(prediction=(0, 0)),
        row(prediction=(0, 1)),
        row(prediction=(0, 0), truth=(0, 0)),
    )
    assert [metrics.summarise([r])["missed_patients"] for r in (missed, elsewhere, healthy)] == [1, 0, 0]


def test_empty_slices_do_not_lift_the_slice_dice():
    prediction, truth = blobs(3)
    with_empty = [np.concatenate([mask, np.zeros((50, *mask.shape[1:]))]) for mask in (prediction, truth)]
    bare = metrics.summarise([metrics.score_patient("p", "CS", prediction, truth)])
    padded = metrics.summarise([metrics.score_patient("p", "CS", *with_empty)])
    assert 0 < bare["slice_dice_tumour"] < 1
    assert padded["slice_dice_tumour"] == bare["slice_dice_tumour"]
    assert padded["volume_dice"] == bare["volume_dice"]
    assert (bare["empty_slice_false_positive_rate"], padded["empty_slice_false_positive_rate"]) == (None, 0.0)


def test_slice_dice_is_a_mean_over_slices_and_not_over_patients():
    many = metrics.score_patient("many", "CS", np.ones((3, 1, 1)), np.ones((3, 1, 1)))
    one = row("one", prediction=(0, 0))
    assert metrics.summarise([many, one])["slice_dice_tumour"] == 0.75


def test_what_is_undefined_is_none_and_valid_json():
    summary = metrics.report([row(prediction=(0, 0), truth=(0, 0))])
    assert summary["slice_dice_tumour"] is None
    assert summary["volume_dice"]["ci95"] is None
    assert summary["hd95_in_plane_px"] == {
        "mean": None,
        "median": None,
        "undefined": 1,
        "slices_with_one_mask": 0,
    }
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_no_patients_are_refused():
    for call in (metrics.summarise, metrics.report):
        with pytest.raises(MedFLError, match="no patients"):
            call([])


def test_report_by_site_and_patient():
    rows = [
        metrics.score_patient(f"p{i}", site, *blobs(i))
        for i, site in enumerate(["HT", "CS", "HT", "DU", "HT"])
    ]
    result = metrics.report(rows)
    assert list(result["sites"]) == ["CS", "DU", "HT"]
    assert result["sites"]["HT"] == metrics.summarise([rows[0], rows[2], rows[4]])
    assert {name: result[name] for name in metrics.summarise(rows)} == metrics.summarise(rows)
    assert [patient["patient"] for patient in result["patients"]] == ["p0", "p1", "p2", "p3", "p4"]
    assert set(result["patients"][0]) == set(metrics.FIGURES_OF_A_PATIENT)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# Two models


def test_paired_difference_is_second_minus_first_by_patient():
    first, second = rows_with_dice([0.5, 0.6, 0.7, 0.2, 0.4]), rows_with_dice([0.6, 0.7, 0.9, 0.2, 0.5])
    difference = metrics.paired_difference(first, second[::-1])
    assert difference["mean"] == pytest.approx(0.1)
    assert difference["ci95"][0] < 0.1 < difference["ci95"][1]
    assert difference["ci95"] == pytest.approx(metrics.bootstrap_interval([0.1, 0.1, 0.2, 0.0, 0.1]))
    assert difference["patients"] == 5
    assert metrics.paired_difference(second, first)["mean"] == pytest.approx(-0.1)


def test_paired_difference_of_few_patients_has_no_interval():
    assert metrics.paired_difference(rows_with_dice([0.5]), rows_with_dice([0.75])) == {
        "mean": 0.25,
        "ci95": None,
        "patients": 1,
    }


@pytest.mark.parametrize(
    "second", [rows_with_dice([0.5]), rows_with_dice([0.5, 0.5], "q"), rows_with_dice([0.5, 0.5]) * 2, []]
)
def test_paired_difference_refuses_other_patients(second):
    for one, other in ((rows_with_dice([0.5, 0.5]), second), (second, rows_with_dice([0.5, 0.5]))):
        with pytest.raises(MedFLError, match="same patients"):
            metrics.paired_difference(one, other)


def test_paired_difference_refuses_nobody():
    with pytest.raises(MedFLError, match="same patients"):
        metrics.paired_difference([], [])


def test_the_loss_of_a_volume_is_the_trainings():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 8, 8)).astype(np.float32)
    truth = rng.random((2, 8, 8)) < 0.3
    wanted, _ = segmentation_loss(torch.from_numpy(logits)[:, None], torch.from_numpy(truth).float()[:, None])
    probabilities = 1 / (1 + np.exp(-logits))
    assert metrics.loss_of_volume(probabilities, truth) == pytest.approx(float(wanted), abs=1e-5)
    assert np.isfinite(metrics.loss_of_volume(1.0 - truth.astype(np.float32), truth))
