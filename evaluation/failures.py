"""Where a model fails, and whether it knows: lesions, the worst patients, risk by coverage."""

import numpy as np
from scipy.ndimage import label

from evaluation.calibration import calibration
from evaluation.components import NEIGHBOURS
from evaluation.metrics import MINIMUM_FOR_INTERVAL

FOUND = 0.1  # of a lesion's voxels: with less overlap, a true lesion is missed and a predicted one is a false alarm
SIZES = ((0, 100), (100, 1_000), (1_000, None))  # voxels of a lesion, from and to below
WORST = 3  # patients that are named


def lesions(prediction: np.ndarray, truth: np.ndarray) -> dict:
    """The lesions of a patient, which are the connected parts of a mask in three dimensions.

    Both masks: (S, H, W), non-zero is tumour. Returns lesions: size in voxels and whether it was found, for each true
    lesion; and false_lesions: the sizes of the false ones among the predicted lesions. A tenth of a true lesion's
    voxels must be predicted, and a tenth of a predicted lesion's voxels must be tumour: one common voxel is no
    detection.
    """
    predicted, actual = prediction != 0, truth != 0
    sizes, shares = _parts(actual, predicted)
    wrong, overlaps = _parts(predicted, actual)
    return {
        "lesions": [{"voxels": int(n), "found": bool(share >= FOUND)} for n, share in zip(sizes, shares)],
        "false_lesions": [int(n) for n, share in zip(wrong, overlaps) if share < FOUND],
    }


def _parts(mask: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The voxels of each connected part of a mask, and the share of them that the other mask has."""
    numbered, count = label(mask, NEIGHBOURS)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    shared = np.bincount(numbered[other], minlength=count + 1)[1:]
    return sizes, shared / np.maximum(sizes, 1)


def confidence(probabilities: np.ndarray, mask: np.ndarray) -> float:
    """The Dice that the model itself expects of its mask, 0 to 1: the Dice between the mask and the probabilities.

    probabilities: float32, 0 to 1; mask: the same shape, non-zero is tumour. A pixel is added to both, so that
    an empty mask without any doubt gives 1.
    """
    chosen = mask != 0
    shared = float(probabilities[chosen].sum(dtype=np.float64))
    return (2 * shared + 1) / (float(probabilities.sum(dtype=np.float64)) + float(chosen.sum()) + 1)


def risk_coverage(rows: list[dict]) -> dict | None:
    """Whether the model fails in the patients of whom it is least sure; None below 5 patients.

    Patients are kept in order, the surest first; the risk is 1 - mean Dice of the kept ones. Returns area: the mean
    risk over all numbers of kept patients (Geifman and El-Yaniv 2017, arXiv:1705.08500); blind: the same in random
    order; best: in the order of the true Dice, which no model can beat. Ties are broken against the model.
    """
    if len(rows) < MINIMUM_FOR_INTERVAL:
        return None
    risks = np.array([1 - row["dice"] for row in rows])
    sureness = np.array([row["confidence"] for row in rows])
    return {
        "area": _area(risks[np.lexsort((-risks, -sureness))]),
        "blind": float(risks.mean()),
        "best": _area(np.sort(risks)),
    }


def _area(risks: np.ndarray) -> float:
    return float(np.mean(np.cumsum(risks) / np.arange(1, len(risks) + 1)))


def failures(rows: list[dict]) -> dict:
    """The figures that rows of `score_patients(..., closely=True)` give beyond `metrics.report`: calibration, lesions
    (found, missed, false, and by_size), risk_coverage, and worst_patients (patient, site, dice, confidence), the
    lowest Dice first."""
    every = [lesion for row in rows for lesion in row["lesions"]]
    wrong = [size for row in rows for size in row["false_lesions"]]
    by_size = []
    for low, high in SIZES:
        fits = [lesion for lesion in every if low <= lesion["voxels"] < (high or np.inf)]
        by_size.append(
            {
                "from": low,
                "to": high,
                "found": sum(lesion["found"] for lesion in fits),
                "missed": sum(not lesion["found"] for lesion in fits),
                "false": sum(low <= size < (high or np.inf) for size in wrong),
            }
        )
    ranked = sorted(rows, key=lambda row: (row["dice"], row["patient"]))
    return {
        "calibration": calibration(row["reliability"] for row in rows),
        "lesions": {
            "found": sum(lesion["found"] for lesion in every),
            "missed": sum(not lesion["found"] for lesion in every),
            "false": len(wrong),
            "by_size": by_size,
        },
        "risk_coverage": risk_coverage(rows),
        "worst_patients": [
            {name: row[name] for name in ("patient", "site", "dice", "confidence")} for row in ranked[:WORST]
        ],
    }


def without_sizes(figures: dict) -> dict:
    """`failures` in the form that a checkpoint may carry: no patient's name, no size of a tumour, no pixel counts."""
    told = {name: figures["calibration"][name] for name in ("ece", "ece_all_pixels", "unseen_tumour")}
    counted = {name: figures["lesions"][name] for name in ("found", "missed", "false")}
    return {"calibration": told, "lesions": counted, "risk_coverage": figures["risk_coverage"]}


def as_lines(figures: dict, region: str) -> list[str]:
    """`failures` in words, for a terminal. region: what is outlined."""
    measured, found, risk = figures["calibration"], figures["lesions"], figures["risk_coverage"]
    lines = []
    if measured["ece"] is not None:
        lines.append(
            f"calibration: ECE {measured['ece']:.3f} over pixels of 1 % or more "
            f"({measured['ece_all_pixels']:.4f} over all)"
        )
    if measured["unseen_tumour"] is not None:
        lines.append(f"{region} that got under 1 %: {100 * measured['unseen_tumour']:.1f} % of its pixels")
    sizes = ", ".join(
        f"{_size(part)} {part['found']} of {part['found'] + part['missed']}, {part['false']} false"
        for part in found["by_size"]
    )
    lines.append(
        f"lesions: {found['found']} of {found['found'] + found['missed']} found, {found['false']} false "
        f"({sizes})"
    )
    if risk:
        lines.append(
            f"risk over coverage: area {risk['area']:.3f} (blind {risk['blind']:.3f}, best {risk['best']:.3f})"
        )
    worst = ", ".join(
        f"{row['patient']} {row['dice']:.3f} (expected {row['confidence']:.3f})"
        for row in figures["worst_patients"]
    )
    return [*lines, f"worst: {worst}"]


def _size(part: dict) -> str:
    return f"under {part['to']} voxels" if part["to"] else f"{part['from']} and more"
