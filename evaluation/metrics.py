"""What every figure of MedFL means: Dice, IoU and HD95 of a patient, and their means and intervals over
patients.

A patient's figures come from `score_patient` as a flat dict, a *row*; `summarise` and `report` turn rows into
a table. Everything that is returned can be written as JSON and is never NaN: a figure that is undefined is
None.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import distance_transform_edt

from common import MedFLError

MINIMUM_FOR_INTERVAL = 3
FIGURES_OF_A_PATIENT = ("patient", "site", "slices", "dice", "iou", "hd95_px")
FIGURES_IN_MM = ("hd95_mm", "volume_truth_cm3", "volume_prediction_cm3", "volume_difference_cm3")


def counts(prediction: ArrayLike, truth: ArrayLike) -> tuple[int, int, int]:
    """True positive, false positive and false negative pixels of a prediction.

    Both masks: the same shape, whatever it is; any dtype, non-zero is tumour. Raises MedFLError where the
    shapes differ.
    """
    predicted, actual = _tumour(prediction, truth)
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


def hd95(prediction: ArrayLike, truth: ArrayLike, pixel: tuple[float, float] = (1.0, 1.0)) -> float | None:
    """The 95th percentile of the distances between two volumes' boundaries; None where no slice has both.

    Both masks: (S, H, W), any dtype, non-zero is tumour. pixel: the distance of rows and of columns, in whose
    unit the result is: in pixels unless given in mm. Distances are Euclidean, within a slice, from every
    boundary pixel of one mask to the other's nearest, both directions and all slices pooled before the
    percentile is taken (linear interpolation). Other definitions take the larger of two directed percentiles
    and give other numbers. Raises MedFLError where the shapes differ or aren't (S, H, W).
    """
    predicted, actual = _tumour(prediction, truth, dimensions=3)
    both = predicted.any(axis=(1, 2)) & actual.any(axis=(1, 2))
    if not both.any():
        return None
    distances = [_boundary_distances(predicted[i], actual[i], pixel) for i in np.flatnonzero(both)]
    return float(np.percentile(np.concatenate(distances), 95))


def volume_cm3(mask: ArrayLike, spacing: tuple[float, float, float]) -> float:
    """Volume of a mask (S, H, W), any dtype, non-zero is tumour, in cm³. spacing: mm between slices, rows and
    columns."""
    return float(np.count_nonzero(mask) * np.prod(spacing) / 1_000)


def score_in_mm(prediction: ArrayLike, truth: ArrayLike, spacing: tuple[float, float, float]) -> dict:
    """`FIGURES_IN_MM` of one patient, to be added to the row: HD95 in mm and volumes in cm³.

    Both masks: (S, H, W), any dtype, non-zero is tumour; spacing: mm between slices, rows and columns. HD95
    lies within the slice, as in pixels. The difference is the prediction's volume less the truth's. Raises
    MedFLError where the shapes differ.
    """
    volumes = volume_cm3(truth, spacing), volume_cm3(prediction, spacing)
    return dict(zip(FIGURES_IN_MM, (hd95(prediction, truth, spacing[1:]), *volumes, volumes[1] - volumes[0])))


def score_patient(patient: str, site: str, prediction: ArrayLike, truth: ArrayLike) -> dict:
    """One patient's row: the volume's figures and counts, and the sums that slice figures are made of.

    Both masks: (S, H, W), any dtype, non-zero is tumour, on the truth's own pixel grid. In the row,
    `slice_dice_sum` is the sum of the Dice of the `tumour_slices` (truth has tumour);
    `empty_slices_with_prediction` counts those of the `empty_slices` (truth has none) in which a pixel was
    predicted; `hd95_px` is None where it is undefined. Raises MedFLError where the shapes differ or aren't
    (S, H, W).
    """
    predicted, actual = _tumour(prediction, truth, dimensions=3)
    total = counts(predicted, actual)
    has_tumour = actual.any(axis=(1, 2))
    of_slices = [dice(*counts(predicted[i], actual[i])) for i in np.flatnonzero(has_tumour)]
    return {
        "patient": patient,
        "site": site,
        "slices": len(actual),
        "dice": dice(*total),
        "iou": iou(*total),
        "hd95_px": hd95(predicted, actual),
        "tp": total[0],
        "fp": total[1],
        "fn": total[2],
        "slice_dice_sum": float(sum(of_slices)),
        "tumour_slices": len(of_slices),
        "empty_slices": int(np.count_nonzero(~has_tumour)),
        "empty_slices_with_prediction": int(np.count_nonzero(predicted[~has_tumour].any(axis=(1, 2)))),
    }


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> list[float] | None:
    """The 95 % interval [low, high] of the mean, a percentile bootstrap; None below 3 values.

    Takes one value per patient: slices of one patient aren't independent, and resampling them would make the
    interval too narrow. The same values in the same order and the same seed give the same interval. Efron and
    Tibshirani 1993, chapter 13.
    """
    figures = np.asarray(values, dtype=np.float64)
    if len(figures) < MINIMUM_FOR_INTERVAL:
        return None
    drawn = np.random.default_rng(seed).integers(len(figures), size=(resamples, len(figures)))
    low, high = np.percentile(figures[drawn].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def summarise(rows: list[dict]) -> dict:
    """The figures over some patients, from their rows (`score_patient`).

    Returns volume_dice (mean, median, ci95: [low, high] or None below 3 patients), volume_iou (mean, median),
    pooled_dice, slice_dice_tumour (None without a tumour slice), empty_slice_false_positive_rate (None
    without an empty slice), hd95_px (mean and median in pixels, None without a value; undefined: patients
    without one), missed_patients (who have a tumour, and nothing was predicted), patients_without_tumour (in
    their truth; their Dice is 1 or 0) and patients_scored. Where a
    row has `FIGURES_IN_MM`: hd95_mm as hd95_px, and volume_cm3 (over those patients the means of truth,
    prediction, difference and absolute_difference, and patients). Raises MedFLError where there are no rows.
    """
    if not rows:
        raise MedFLError("there are no patients to score; choose a part of the split that has some")
    volume_dice = [row["dice"] for row in rows]
    return {
        "volume_dice": {**_mean_and_median(volume_dice), "ci95": bootstrap_interval(volume_dice)},
        "volume_iou": _mean_and_median([row["iou"] for row in rows]),
        "pooled_dice": dice(*(sum(row[name] for row in rows) for name in ("tp", "fp", "fn"))),
        "slice_dice_tumour": _share(rows, "slice_dice_sum", "tumour_slices"),
        "empty_slice_false_positive_rate": _share(rows, "empty_slices_with_prediction", "empty_slices"),
        "hd95_px": _defined([row["hd95_px"] for row in rows]),
        "missed_patients": sum(row["tp"] + row["fp"] == 0 and row["fn"] > 0 for row in rows),
        "patients_without_tumour": sum(row["tumour_slices"] == 0 for row in rows),
        "patients_scored": len(rows),
        **_summary_in_mm([row for row in rows if "hd95_mm" in row]),
    }


def report(rows: list[dict]) -> dict:
    """`summarise` of all rows, and `sites` (the same per site, sorted) and `patients` (each one's figures, in
    order; those in mm are None for a patient of unknown spacing, and are left out where it is known of none).

    It holds figures of single patients: what leaves a hospital is made from `summarise`. Raises MedFLError
    without rows.
    """
    sites = sorted({row["site"] for row in rows})
    names = FIGURES_OF_A_PATIENT + (FIGURES_IN_MM if any("hd95_mm" in row for row in rows) else ())
    return {
        **summarise(rows),
        "sites": {site: summarise([row for row in rows if row["site"] == site]) for site in sites},
        "patients": [{name: row.get(name) for name in names} for row in rows],
    }


def paired_difference(first: list[dict], second: list[dict]) -> dict:
    """How much higher the second model's volume Dice is: mean over the patients, ci95 and the number of
    patients.

    Both lists are rows of the same patients, in any order; ci95 is [low, high], or None below 3 patients.
    Raises MedFLError where the lists name different patients, one patient twice, or none.
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


def _tumour(
    prediction: ArrayLike, truth: ArrayLike, dimensions: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    predicted, actual = np.asarray(prediction) != 0, np.asarray(truth) != 0
    if predicted.shape != actual.shape:
        raise MedFLError(
            f"prediction {predicted.shape} and truth {actual.shape} differ in shape; "
            "resize the prediction's logits to the truth's pixel grid"
        )
    if dimensions is not None and actual.ndim != dimensions:
        raise MedFLError(
            f"a patient's masks must be (slices, height, width), not {actual.shape}; stack the slices"
        )
    return predicted, actual


def _boundary(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)  # a tumour that the picture's edge cuts off ends there
    return mask & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def _boundary_distances(predicted: np.ndarray, actual: np.ndarray, pixel: tuple[float, float]) -> np.ndarray:
    either = predicted | actual
    rows, columns = np.flatnonzero(either.any(axis=1)), np.flatnonzero(either.any(axis=0))
    # Both boundaries lie inside the crop, so the distances stay exact while the transforms see far fewer
    # pixels.
    crop = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    first, second = _boundary(predicted[crop]), _boundary(actual[crop])
    return np.concatenate(
        [
            distance_transform_edt(~second, sampling=pixel)[first],
            distance_transform_edt(~first, sampling=pixel)[second],
        ]
    )


def _defined(distances: list[float | None]) -> dict:
    """Mean and median of the distances that are defined, and how many are not."""
    known = [distance for distance in distances if distance is not None]
    return {**_mean_and_median(known), "undefined": len(distances) - len(known)}


def _summary_in_mm(rows: list[dict]) -> dict:
    """hd95_mm and volume_cm3 of the rows, which have `FIGURES_IN_MM`; an empty dict without rows."""
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
        "hd95_mm": _defined([row["hd95_mm"] for row in rows]),
        "volume_cm3": {
            **{name: float(np.mean(values)) for name, values in means.items()},
            "patients": len(rows),
        },
    }


def _mean_and_median(values: list[float]) -> dict:
    if not values:
        return {"mean": None, "median": None}
    return {"mean": float(np.mean(values)), "median": float(np.median(values))}


def _sum(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows)


def _share(rows: list[dict], part: str, whole: str) -> float | None:
    total = _sum(rows, whole)
    return float(_sum(rows, part) / total) if total else None
