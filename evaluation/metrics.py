"""The definitions of all figures in MedFL: Dice, IoU, HD95 and surface Dice of a patient, and their means and
intervals over patients.

A patient's figures come from `score_patient` as a flat dict, a *row*; `summarise` and `report` turn rows into
a table. Everything that is returned can be written as JSON and is never NaN: a figure that is undefined is
None.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtrit  # scipy.stats would take a second at every start

from common import MedFLError
from evaluation.surfaces import hd95, hd95_in_plane, surface_dice, two_masks

MINIMUM_FOR_INTERVAL = 5  # patients: with fewer, no method has the coverage that it promises
NO_INTERVAL = f"under {MINIMUM_FOR_INTERVAL} patients"  # a table shows this instead of an interval
FURTHER_PATIENT = 0.25  # the interval assumes one more patient at this distance from the mean
FIGURES_OF_A_PATIENT = (
    "patient",
    "site",
    "slices",
    "dice",
    "iou",
    "hd95_in_plane_px",
    "slices_with_one_mask",
)
FIGURES_IN_MM = (
    "hd95_mm",
    "surface_dice_2mm",
    "volume_truth_cm3",
    "volume_prediction_cm3",
    "volume_difference_cm3",
)


def counts(prediction: ArrayLike, truth: ArrayLike) -> tuple[int, int, int]:
    """True positive, false positive and false negative pixels of a prediction.

    Both masks: the same shape, with any dimensions and dtype; non-zero is tumour. Raises MedFLError if the
    shapes differ.
    """
    predicted, actual = two_masks(prediction, truth)
    tp = int(np.count_nonzero(predicted & actual))
    return tp, int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(actual)) - tp


def dice(tp: int, fp: int, fn: int) -> float:
    """2TP / (2TP + FP + FN), in [0, 1]; 1 where both masks are empty, so 0 where only the truth is. Takes
    pixel counts."""
    total = 2 * tp + fp + fn
    return float(2 * tp / total) if total else 1.0


def iou(tp: int, fp: int, fn: int) -> float:
    """TP / (TP + FP + FN), in [0, 1]; 1 where both masks are empty, so 0 where only the truth is. Takes pixel
    counts."""
    total = tp + fp + fn
    return float(tp / total) if total else 1.0


def loss_of_volume(probabilities: np.ndarray, truth: ArrayLike) -> float:
    """The training's loss over a whole volume: binary cross-entropy + 1 - soft Dice
    (`training.segmentation_loss`). Of a model of several classes it is that of the region.

    probabilities: (S, H, W) float32, 0 to 1; truth: (S, H, W), non-zero is tumour. The probability
    of the true class counts as at least 1e-7.
    """
    there = np.asarray(truth) > 0
    right = np.where(there, probabilities, 1 - probabilities).clip(1e-7, 1)
    both = float(probabilities[there].sum(dtype=np.float64))
    soft_dice = (2 * both + 1) / (float(probabilities.sum(dtype=np.float64)) + np.count_nonzero(there) + 1)
    return float(1 - soft_dice - np.log(right).mean(dtype=np.float64))


def volume_cm3(mask: ArrayLike, spacing: tuple[float, float, float]) -> float:
    """Volume of a mask (S, H, W), any dtype, non-zero is tumour, in cm³. spacing: mm between slices, rows and
    columns."""
    return float(np.count_nonzero(mask) * np.prod(spacing) / 1_000)


def score_in_mm(prediction: ArrayLike, truth: ArrayLike, spacing: tuple[float, float, float]) -> dict:
    """`FIGURES_IN_MM` of one patient, to be added to the row: HD95 and surface Dice in three dimensions, and
    volumes in cm³.

    Both masks: (S, H, W), any dtype, non-zero is tumour; spacing: mm between slices, rows and columns. The
    difference is the prediction's volume minus the truth's. Raises MedFLError if the shapes differ.
    """
    surfaces = hd95(prediction, truth, spacing), surface_dice(prediction, truth, spacing)
    volumes = volume_cm3(truth, spacing), volume_cm3(prediction, spacing)
    return dict(zip(FIGURES_IN_MM, (*surfaces, *volumes, volumes[1] - volumes[0])))


def score_patient(patient: str, site: str, prediction: ArrayLike, truth: ArrayLike) -> dict:
    """One patient's row: the volume's figures and counts, and the sums from which slice figures are computed.

    Both masks: (S, H, W), any dtype, non-zero is tumour, on the truth's own pixel grid. In the row,
    `slice_dice_sum` is the sum of the Dice of the `tumour_slices` (truth has tumour);
    `empty_slices_with_prediction` counts those of the `empty_slices` (truth has none) in which a pixel was
    predicted; `hd95_in_plane_px` and `slices_with_one_mask` are those of `hd95_in_plane`. Raises MedFLError
    where the shapes differ or aren't (S, H, W).
    """
    predicted, actual = two_masks(prediction, truth, dimensions=3)
    total = counts(predicted, actual)
    has_tumour = actual.any(axis=(1, 2))
    distance, lonely = hd95_in_plane(predicted, actual)
    of_slices = [dice(*counts(predicted[i], actual[i])) for i in np.flatnonzero(has_tumour)]
    return {
        "patient": patient,
        "site": site,
        "slices": len(actual),
        "dice": dice(*total),
        "iou": iou(*total),
        "hd95_in_plane_px": distance,
        "slices_with_one_mask": lonely,
        "tp": total[0],
        "fp": total[1],
        "fn": total[2],
        "slice_dice_sum": float(sum(of_slices)),
        "tumour_slices": len(of_slices),
        "empty_slices": int(np.count_nonzero(~has_tumour)),
        "empty_slices_with_prediction": int(np.count_nonzero(predicted[~has_tumour].any(axis=(1, 2)))),
    }


def score_classes(
    prediction: np.ndarray, classes: np.ndarray, truth: np.ndarray, names: Sequence[str]
) -> dict[str, dict]:
    """For each class, by name: dice, of the volume, and there, whether the truth has it.

    prediction: the region's mask, non-zero inside; classes: the likeliest class of each pixel, from 1; truth: the true
    class, 0 outside of the region; all (S, H, W) uint8.
    """
    found = np.where(prediction > 0, classes, 0)
    return {
        name: {"dice": dice(*counts(found == k, truth == k)), "there": bool((truth == k).any())}
        for k, name in enumerate(names, start=1)
    }


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval [low, high] of the mean of values from 0 to 1, one per patient; None below 5.

    Student's t, with a variance to which one more patient is added, `FURTHER_PATIENT` from the mean: a Dice
    is skewed, and a few patients seldom include the one in whom a model fails. In 20,000 simulated draws of each
    of five skewed Beta distributions it held the true mean in 93.3 to 99.9 % (benchmarks/interval_coverage.py;
    a percentile bootstrap of 5 patients in 79 to 85 %). Never pass figures of slices, which are not independent.
    """
    figures = np.asarray(values, dtype=np.float64)
    count = len(figures)
    if count < MINIMUM_FOR_INTERVAL:
        return None
    mean = figures.mean()
    variance = (np.square(figures - mean).sum() + FURTHER_PATIENT**2) / count
    half = stdtrit(count - 1, 0.975) * np.sqrt(variance / count)
    return [float(max(mean - half, 0.0)), float(min(mean + half, 1.0))]


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> list[float] | None:
    """The 95 % interval [low, high] of the mean of any values, one per patient; None below 5.

    A percentile bootstrap over the patients, with its percentiles widened as Student's t requires for their number
    (the expanded percentile interval of Hesterberg 2015, doi:10.1080/00031305.2015.1089789). Otherwise it would be
    too narrow for few patients. The same values in the same order with the same seed give the same interval.
    """
    figures = np.asarray(values, dtype=np.float64)
    count = len(figures)
    if count < MINIMUM_FOR_INTERVAL:
        return None
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    outside = 100 * ndtr(-np.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.975))
    low, high = np.percentile(figures[drawn].mean(axis=1), [outside, 100 - outside])
    return [float(low), float(high)]


def summarise(rows: list[dict]) -> dict:
    """The figures over some patients, from their rows (`score_patient`).

    Returns volume_dice (mean, median, ci95: [low, high] or None below 5 patients), volume_iou (mean, median),
    pooled_dice, slice_dice_tumour (None without a tumour slice), empty_slice_false_positive_rate (None
    without an empty slice), hd95_in_plane_px (mean and median in pixels, None without a value; undefined:
    patients without one; slices_with_one_mask: their sum), missed_patients (with a tumour, but nothing was
    predicted), patients_without_tumour (in their truth; their Dice is 1 or 0) and patients_scored. Where a
    row has `FIGURES_IN_MM`: hd95_mm and surface_dice_2mm (mean, median, undefined), and volume_cm3 (the means of
    truth, prediction, difference and absolute_difference over those patients, and patients). Where rows have
    `score_classes`: classes (for each, mean, median and ci95 of its volume Dice, and patients_without it in their
    truth, whose Dice is 1 or 0). Raises MedFLError if there are no rows.
    """
    if not rows:
        raise MedFLError("there are no patients to score; choose a part of the split that has some")
    volume_dice = [row["dice"] for row in rows]
    return {
        "volume_dice": {**_mean_and_median(volume_dice), "ci95": mean_interval(volume_dice)},
        "volume_iou": _mean_and_median([row["iou"] for row in rows]),
        "pooled_dice": dice(*(sum(row[name] for row in rows) for name in ("tp", "fp", "fn"))),
        "slice_dice_tumour": _share(rows, "slice_dice_sum", "tumour_slices"),
        "empty_slice_false_positive_rate": _share(rows, "empty_slices_with_prediction", "empty_slices"),
        "hd95_in_plane_px": {
            **_defined([row["hd95_in_plane_px"] for row in rows]),
            "slices_with_one_mask": sum(row["slices_with_one_mask"] for row in rows),
        },
        "missed_patients": sum(row["tp"] + row["fp"] == 0 and row["fn"] > 0 for row in rows),
        "patients_without_tumour": sum(row["tumour_slices"] == 0 for row in rows),
        "patients_scored": len(rows),
        **_summary_in_mm([row for row in rows if "hd95_mm" in row]),
        **_summary_of_classes([row["classes"] for row in rows if "classes" in row]),
    }


def report(rows: list[dict]) -> dict:
    """`summarise` of all rows, with `sites` (the same per site, sorted) and `patients` (each one's figures, in
    order; those in mm are None for a patient of unknown spacing, and are left out if no patient's spacing is known; the
    Dice of a class is called dice_NAME).

    It holds figures of single patients, so only `summarise` is used for what leaves a hospital. Raises MedFLError
    without rows.
    """
    sites = sorted({row["site"] for row in rows})
    names = FIGURES_OF_A_PATIENT + (FIGURES_IN_MM if any("hd95_mm" in row for row in rows) else ())
    return {
        **summarise(rows),
        "sites": {site: summarise([row for row in rows if row["site"] == site]) for site in sites},
        "patients": [
            {name: row.get(name) for name in names}
            | {f"dice_{name}": one["dice"] for name, one in row.get("classes", {}).items()}
            for row in rows
        ],
    }


def paired_difference(first: list[dict], second: list[dict]) -> dict:
    """How much higher the second model's volume Dice is: mean over the patients, ci95 and the number of
    patients.

    Both lists are rows of the same patients, in any order; ci95 is [low, high], or None below 5 patients.
    Raises MedFLError if the lists name different patients, one patient twice, or none.
    """
    before, after = ({row["patient"]: row["dice"] for row in rows} for rows in (first, second))
    if not first or before.keys() != after.keys() or not len(before) == len(first) == len(second):
        raise MedFLError(
            "the two models were not scored on the same patients, each once; evaluate both on the same split"
        )
    differences = [after[patient] - before[patient] for patient in sorted(before)]
    return {
        "mean": float(np.mean(differences)),
        "ci95": bootstrap_interval(differences),
        "patients": len(differences),
    }


def _defined(distances: list[float | None]) -> dict:
    """Mean and median of the figures that are defined, and how many are not."""
    known = [distance for distance in distances if distance is not None]
    return {**_mean_and_median(known), "undefined": len(distances) - len(known)}


def _summary_in_mm(rows: list[dict]) -> dict:
    """hd95_mm, surface_dice_2mm and volume_cm3 of the rows, which have `FIGURES_IN_MM`; an empty dict without rows."""
    if not rows:
        return {}
    differences = [row["volume_difference_cm3"] for row in rows]
    means = {
        "truth": [row["volume_truth_cm3"] for row in rows],
        "prediction": [row["volume_prediction_cm3"] for row in rows],
        "difference": differences,
        "absolute_difference": [abs(difference) for difference in differences],
    }
    return {
        **{name: _defined([row[name] for row in rows]) for name in ("hd95_mm", "surface_dice_2mm")},
        "volume_cm3": {
            **{name: float(np.mean(values)) for name, values in means.items()},
            "patients": len(rows),
        },
    }


def _summary_of_classes(scores: list[dict[str, dict]]) -> dict:
    """classes of the patients' `score_classes`; an empty dict without any."""
    if not scores:
        return {}
    summary = {}
    for name in scores[0]:
        dices = [one[name]["dice"] for one in scores]
        without = sum(not one[name]["there"] for one in scores)
        summary[name] = {
            **_mean_and_median(dices),
            "ci95": mean_interval(dices),
            "patients_without": without,
        }
    return {"classes": summary}


def _mean_and_median(values: list[float]) -> dict:
    if not values:
        return {"mean": None, "median": None}
    return {"mean": float(np.mean(values)), "median": float(np.median(values))}


def _sum(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows)


def _share(rows: list[dict], part: str, whole: str) -> float | None:
    total = _sum(rows, whole)
    return float(_sum(rows, part) / total) if total else None
