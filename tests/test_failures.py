"""Calibration, lesions and risk over coverage, on values that are counted by hand."""

import numpy as np
import pytest

from evaluation.calibration import TemperatureFit, calibration, draw_reliability, reliability
from evaluation.failures import confidence, failures, lesions, risk_coverage


def test_reliability_by_hand():
    probabilities = np.array([0.001, 0.05, 0.05, 0.85, 0.85, 1.0, 0.0], np.float32)
    truth = np.array([255, 0, 0, 255, 0, 255, 0], np.uint8)
    figures = calibration([reliability(probabilities, truth)] * 2)
    bins = {b["from"]: b for b in figures["bins"] if b["pixels"]}
    assert {low: b["pixels"] for low, b in bins.items()} == {0.0: 4, 0.01: 4, 0.8: 4, 0.9: 2}
    assert bins[0.8]["tumour"] == 0.5 and bins[0.8]["probability"] == pytest.approx(0.85)
    gaps = 4 * 0.05 + 4 * 0.35 + 0
    assert figures["ece"] == pytest.approx(gaps / 10, abs=1e-6)
    assert figures["ece_all_pixels"] == pytest.approx((gaps + 1.998) / 14, abs=1e-6)
    assert figures["unseen_tumour"] == pytest.approx(1 / 3)


def test_the_sure_background_does_not_make_a_model_calibrated():
    probabilities, truth = np.full(1_000, 0.9, np.float32), np.zeros(1_000)
    background = np.zeros(1_000_000, np.float32)
    alone = calibration([reliability(probabilities, truth)])
    beside = calibration([reliability(probabilities, truth), reliability(background, background)])
    assert alone["ece"] == beside["ece"] == pytest.approx(0.9) and beside["ece_all_pixels"] < 0.001


def test_nothing_to_calibrate_is_none():
    nothing = calibration([reliability(np.zeros(9, np.float32), np.zeros(9))])
    assert nothing["ece"] is None and nothing["unseen_tumour"] is None


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_the_fitted_temperature_is_the_true_one(true):
    random = np.random.default_rng(0)
    logits = random.normal(-1, 3, 200_000)
    tumour = random.random(logits.size) < 1 / (1 + np.exp(-logits / true))
    fit = TemperatureFit()
    for part in range(2):
        fit.add((1 / (1 + np.exp(-logits[part::2]))).astype(np.float32), tumour[part::2])
    assert fit.temperature() == pytest.approx(true, rel=0.03)


def test_certain_and_missing_kinds_leave_a_temperature_within_bounds():
    sure = TemperatureFit()
    sure.add(np.array([0.0, 1.0], np.float32), np.array([0, 1]))
    assert 0.2 < sure.temperature() < 5
    alone = TemperatureFit()
    alone.add(np.array([0.2], np.float32), np.array([0]))
    assert alone.temperature() == 1.0


def test_lesions_by_hand():
    truth, prediction = np.zeros((2, 4, 40, 40), np.uint8)
    truth[0, 0, :20] = 255  # 20 voxels, of which 2 are predicted
    prediction[0, 0, 18:20] = 255
    truth[2, 10:20, 10:20] = 1  # 100, of which 9 are: no detection
    prediction[2, 10, 10:19] = 1
    truth[0, 30, 30] = truth[1, 31, 31] = 1  # touch across a corner: one lesion of 2
    prediction[3, 30:35, 0:5] = 1  # 25 that are none
    figures = lesions(prediction, truth)
    assert sorted((lesion["voxels"], lesion["found"]) for lesion in figures["lesions"]) == [
        (2, False),
        (20, True),
        (100, False),
    ]
    assert figures["false_lesions"] == [25]


def test_a_blob_over_everything_detects_but_is_false():
    truth = np.zeros((3, 30, 30), bool)
    truth[1, 4:8, 4:8] = 1
    figures = lesions(np.ones_like(truth), truth)
    assert figures["lesions"] == [{"voxels": 16, "found": True}] and figures["false_lesions"] == [2_700]
    assert lesions(0 * truth, 0 * truth) == {"lesions": [], "false_lesions": []}


def test_the_expected_dice_of_a_mask():
    certain = np.array([1.0, 1.0, 0.0], np.float32)
    assert confidence(certain, certain > 0.5) == 1.0
    doubted = np.full(1_000, 0.5, np.float32)
    assert confidence(doubted, doubted >= 0.5) == pytest.approx(2 / 3, abs=1e-3)
    assert confidence(np.zeros(9, np.float32), np.zeros(9)) == 1.0
    assert confidence(np.full(1_000, 0.4, np.float32), np.zeros(1_000)) < 0.01  # doubts, and predicts nothing


def row(patient: str, dice: float, sureness: float) -> dict:
    truth = np.ones((1, 2, 2))
    return {
        "patient": patient,
        "site": "CS",
        "dice": dice,
        "confidence": sureness,
        "reliability": reliability(truth.astype(np.float32), truth),
        **lesions(truth, truth),
    }


def test_risk_over_coverage():
    dice = [0.9, 0.8, 0.7, 0.6, 0.1]
    knows = risk_coverage([row(str(k), d, d) for k, d in enumerate(dice)])
    errs = risk_coverage([row(str(k), d, -d) for k, d in enumerate(dice)])
    same = risk_coverage([row(str(k), d, 0.5) for k, d in enumerate(dice)])
    assert (
        knows["area"]
        == pytest.approx(knows["best"])
        == pytest.approx(np.mean([0.1, 0.3 / 2, 0.6 / 3, 1.0 / 4, 1.9 / 5]))
    )
    assert knows["best"] < knows["blind"] < errs["area"] == same["area"]
    assert knows["blind"] == pytest.approx(0.38)
    assert risk_coverage([row("a", 0.5, 0.5)] * 4) is None


def test_failures_name_the_worst_and_can_be_drawn(tmp_path):
    rows = [row(name, dice, 0.9) for name, dice in zip("abcde", (0.9, 0.2, 0.5, 0.7, 0.1))]
    figures = failures(rows)
    assert [worst["patient"] for worst in figures["worst_patients"]] == ["e", "b", "c"]
    assert figures["lesions"]["found"] == 5 and figures["lesions"]["by_size"][0]["found"] == 5
    draw_reliability(figures["calibration"], tmp_path / "r.png", r"$\no formula$: five patients")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
