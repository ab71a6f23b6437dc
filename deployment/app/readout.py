"""The figures beside the picture: areas, diameters, the model's sureness, agreement with a truth; and the
downloads."""

import csv
import io
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from appearance.features import FLAIR
from borders.escaping import cell
from deployment.app.case import Case
from deployment.app.pictures import png
from deployment.app.turns import TURNS
from evaluation import metrics
from evaluation.components import COLUMNS, Component
from evaluation.diameters import largest_diameter
from inference import predict_classes, to_mask
from transunet import TransUNet

SPREAD_FLOOR = 0.05  # probability; a pixel below it in both readings is background and is not counted


@dataclass
class Prediction:
    """The model's output for a case. probability: (S, H, W) float32; spread: (S,) float32, None until it is
    requested; classes: the likeliest class of each pixel, from 1, (S, H, W) uint8, None for a region as a whole."""

    probability: np.ndarray
    spread: np.ndarray | None = None
    classes: np.ndarray | None = None


def predict_case(
    model: TransUNet, case: Case, told: Callable[[int, int], None] = lambda done, others: None
) -> Prediction:
    """One pass of the model over the case; slices are normalised with those of their group, as in predict.py.
    A DICOM study is prepared for the network as for training, and a NIfTI file is framed like one. In the
    black margins and outside the head there is no tumour. Several readers' scans take turns. told: receives
    the number of finished slices and of other scans in progress."""
    probability, classes = _read(model, case, told=told)
    return Prediction(probability, classes=classes)


def _read(
    model: TransUNet, case: Case, step: int = 1, told: Callable[[int, int], None] = lambda done, others: None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Probability and classes. step: -1 mirrors the slices, and mirrors the answer back."""
    groups = case.groups if case.feed is None else np.zeros(len(case.fed), int)
    volume = np.ascontiguousarray(case.fed[:, :, ::step])
    parts: list[np.ndarray] = []
    of_parts: list[np.ndarray] = []

    def turn(done: int) -> AbstractContextManager:
        told(done + sum(map(len, parts)), TURNS.others)
        return TURNS.turn()

    with TURNS.scan():
        for group in np.unique(groups):
            probability, classes = predict_classes(model, volume[groups == group], turn)
            parts.append(probability)
            of_parts.append(classes)
    probability, classes = (np.concatenate(arrays)[:, :, ::step] for arrays in (parts, of_parts))
    several = range(1, model.classes + 1) if model.classes > 1 else ()
    if case.feed is None:
        return probability, classes if several else None
    onto = case.feed.onto_page
    shares = [onto((classes == number).astype(np.float32)) for number in several]
    return onto(probability), np.argmax(shares, axis=0).astype(np.uint8) + 1 if several else None


def flip_spread(model: TransUNet, case: Case, probability: np.ndarray) -> np.ndarray:
    """For each slice, (S,) float32: the average change of the probability when the slice is mirrored, over
    the pixels where either reading is above 0.05; 0 if there are none. It needs a second pass."""
    mirrored, _ = _read(model, case, step=-1)
    spread = np.zeros(len(probability), np.float32)
    for number, (one, other) in enumerate(zip(probability, mirrored)):
        asked = np.maximum(one, other) > SPREAD_FLOOR
        if asked.any():
            spread[number] = np.abs(one - other)[asked].mean()
    return spread


def slice_rows(
    case: Case, prediction: Prediction, threshold: float, masks: np.ndarray | None = None
) -> list[dict]:
    """The read-out of each slice of the mask at a threshold, or of a corrected one (S, H, W) uint8 0/255, in
    the order of the case: slice, file, tumour_pixels, share_of_slice, largest_diameter_px, mean_probability
    (inside the mask, None if it is empty), flip_spread (None until it is requested), and with a spacing
    tumour_mm2 and largest_diameter_mm, with a truth dice and iou (None if both are empty)."""
    rows = []
    for number, probability in enumerate(prediction.probability):
        mask = to_mask(probability, threshold) if masks is None else masks[number]
        count = int(np.count_nonzero(mask))
        row = {
            "slice": number + 1,
            "file": case.slices[number],
            "tumour_pixels": count,
            "share_of_slice": count / mask.size,
            "largest_diameter_px": largest_diameter(mask),
            "mean_probability": float(probability[mask > 0].mean()) if count else None,
            "flip_spread": None if prediction.spread is None else float(prediction.spread[number]),
        }
        if case.spacing:
            row["tumour_mm2"] = count * case.spacing[0] * case.spacing[1]
            row["largest_diameter_mm"] = largest_diameter(mask, case.spacing[:2])
        if case.truth is not None:
            row["dice"], row["iou"] = agreement(mask, case.truth[number])
        rows.append(row)
    return rows


def agreement(prediction: np.ndarray, truth: np.ndarray) -> tuple[float | None, float | None]:
    """Dice and IoU of two masks of one shape, by the rules in evaluation/metrics.py; None if both are
    empty."""
    overlap = metrics.counts(prediction, truth)
    return (metrics.dice(*overlap), metrics.iou(*overlap)) if any(overlap) else (None, None)


def summary(case: Case, rows: list[dict], mask: np.ndarray) -> dict:
    """The case's figures. mask: (S, H, W) uint8. foreground_share is the tumour's share of the pixels
    brighter than the mean of FLAIR, roughly the head; volume_cm3 and diameters in mm need a spacing; dice and
    iou a truth, and slices of one patient."""
    pixels = sum(row["tumour_pixels"] for row in rows)
    flair = case.volume[..., FLAIR]
    foreground = int(np.count_nonzero(flair > flair.mean()))
    figures = {
        "tumour_pixels": pixels,
        "foreground_share": pixels / max(foreground, 1),
        "slices_with_tumour": sum(row["tumour_pixels"] > 0 for row in rows),
        "slices": len(rows),
        "largest_diameter_px": max(row["largest_diameter_px"] for row in rows),
    }
    if case.spacing:
        figures["volume_cm3"] = pixels * float(np.prod(case.spacing)) / 1_000
        figures["largest_diameter_mm"] = max(row["largest_diameter_mm"] for row in rows)
    if case.truth is not None and (case.is_volume or len(rows) == 1):
        figures["dice"], figures["iou"] = agreement(mask, case.truth)
    return figures


def class_texts(
    case: Case, mask: np.ndarray, classes: np.ndarray | None, labels: Mapping[str, int]
) -> list[tuple[str, str]]:
    """How much of the mask (S, H, W) each class is, in words: in cm³ where the spacing is known. classes: as in a
    `Prediction`; labels: the names, in the order of the numbers."""
    if classes is None:
        return []
    counts = [np.count_nonzero((mask > 0) & (classes == number)) for number in range(1, len(labels) + 1)]
    cm3 = float(np.prod(case.spacing)) / 1_000 if case.spacing else None
    return [
        (f"Of which {name}", f"{count:,} pixels" if cm3 is None else f"{count * cm3:.1f} cm³")
        for name, count in zip(labels, counts)
    ]


def component_rows(parts: list[Component]) -> list[dict]:
    """A line for each component, or one of empty cells if there is none, so that the table keeps its
    header."""
    return [part.row() for part in parts] or [dict.fromkeys(COLUMNS)]


def csv_text(rows: list[dict]) -> str:
    """Rows of a table as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)])
    return file.getvalue()


def mask_name(name: str) -> str:
    """The name of a slice's mask, as in predict.py."""
    return f"{PurePosixPath(name).stem if '.' in name else name}_mask.png"


def zip_masks(case: Case, mask: np.ndarray, rows: list[dict], parts: list[dict] | None = None) -> bytes:
    """All masks as PNG, as given and of the slices' own size, and the read-out of slices and components as CSV,
    in one ZIP."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, pixels in zip(case.slices, mask):
            archive.writestr(mask_name(name), png(pixels))
        archive.writestr("readout.csv", csv_text(rows))
        if parts:
            archive.writestr("components.csv", csv_text(parts))
    return file.getvalue()
