"""A report's pictures and the figures, pixel by pixel: outline, threshold, diameter, ZIP."""

import csv
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from deployment.app.case import Case
from deployment.app.pictures import ORANGE, enlargement, flair_picture, outline, probability_picture
from deployment.app.readout import (
    Prediction,
    csv_text,
    mask_name,
    slice_rows,
    summary,
    zip_masks,
)
from deployment.app.report import draw_report
from evaluation.diameters import largest_diameter
from inference import to_mask

SIDE = 64


@pytest.fixture
def mask():
    made = np.zeros((SIDE, SIDE), np.uint8)
    made[10:30, 20:50] = 255
    return made


@pytest.fixture
def grey():
    return flair_picture(np.full((SIDE, SIDE, 3), (0, 100, 200), np.uint8))


def test_an_outline_is_an_edge_in_flair(grey, mask):
    times = enlargement(mask.shape)
    out = outline(grey, mask)
    drawn = (out != grey).any(axis=2)
    assert out.shape == (SIDE * times, SIDE * times, 3) and tuple(out[10 * times, 20 * times]) == ORANGE
    assert not drawn[20 * times, 35 * times] and not drawn[10 * times - 1, 30 * times]
    assert np.array_equal(outline(grey, np.zeros_like(mask)), grey)
    assert outline(grey, np.full_like(mask, 255))[300, 300].tolist() == [100] * 3


def test_probabilities_are_seen_as_colours():
    out = probability_picture(np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE))
    assert out[0, 0].tolist() == [0, 34, 77] and out[-1, -1].tolist() == [253, 231, 55]  # the ends of cividis


@pytest.mark.parametrize(
    ("points", "wanted"),
    [
        ([], 0),
        ([(3, 3)], 0),
        ([(3, c) for c in range(3, 8)], 4),
        ([(3, 3), (3, 7)], 0),
        ([(k, k) for k in range(10)], 9 * 2**0.5),
        ([(r, c) for r in range(5) for c in range(13)], (4**2 + 12**2) ** 0.5),
        ([(0, 0), (1, 1), (19, 19)], 2**0.5),
    ],
)
def test_the_largest_diameter(points, wanted):
    mask = np.zeros((20, 20), np.uint8)
    for point in points:
        mask[point] = 255
    assert largest_diameter(mask) == pytest.approx(wanted)
    stretched = largest_diameter(mask, (2.0, 2.0))
    assert stretched == pytest.approx(2 * wanted)


@pytest.fixture
def case(mask):
    volume = np.zeros((3, SIDE, SIDE, 3), np.uint8)
    volume[:, 5:45, 5:55] = 120
    truth = np.stack([mask, np.zeros_like(mask), np.zeros_like(mask)])
    return Case(
        "anna", [f"anna_{k}.tif" for k in (1, 2, 3)], volume, np.zeros(3, int), truth, (0.5, 0.5, 4.0)
    )


@pytest.fixture
def prediction(mask):
    probability = np.zeros((3, SIDE, SIDE), np.float32)
    probability[0][mask > 0] = 0.8
    probability[1, :2, :2] = 0.4
    return Prediction(probability)


def test_figures_follow_threshold_and_spacing(case, prediction):
    rows = slice_rows(case, prediction, 0.5)
    assert [row["tumour_pixels"] for row in rows] == [600, 0, 0] and rows[0][
        "mean_probability"
    ] == pytest.approx(0.8)
    assert (rows[0]["dice"], rows[1]["dice"], rows[0]["tumour_mm2"]) == (1.0, None, 150.0)
    figures = summary(case, rows, to_mask(prediction.probability, 0.5))
    assert (
        figures["volume_cm3"] == pytest.approx(600 * 0.5 * 0.5 * 4 / 1000)
        and figures["slices_with_tumour"] == 1
    )
    assert figures["foreground_share"] == pytest.approx(600 / (3 * 40 * 50)) and figures["dice"] == 1.0
    assert figures["largest_diameter_mm"] == pytest.approx(0.5 * (19**2 + 29**2) ** 0.5)
    lower = slice_rows(case, prediction, 0.3)
    assert [row["tumour_pixels"] for row in lower] == [600, 4, 0] and lower[1]["dice"] == 0.0
    case.spacing = None
    assert not {"tumour_mm2", "largest_diameter_mm"} & slice_rows(case, prediction, 0.5)[0].keys()


def test_the_zip_holds_masks_and_figures(case, prediction):
    mask = to_mask(prediction.probability, 0.5)
    with zipfile.ZipFile(io.BytesIO(zip_masks(case, mask, slice_rows(case, prediction, 0.5)))) as archive:
        assert archive.namelist() == ["anna_1_mask.png", "anna_2_mask.png", "anna_3_mask.png", "readout.csv"]
        for k in (0, 1):
            assert np.array_equal(np.asarray(Image.open(archive.open(f"anna_{k + 1}_mask.png"))), mask[k])
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open("readout.csv"))))
    assert rows[0]["tumour_pixels"] == "600" and rows[1]["mean_probability"] == "" and len(rows) == 3
    assert mask_name("a.b.tif") == "a.b_mask.png" and csv_text(slice_rows(case, prediction, 0.5)).startswith(
        "slice,file,"
    )


def test_the_report_is_one_page(case, prediction, grey):
    content = draw_report(
        "anna",
        [("a", grey), ("b", grey)],
        slice_rows(case, prediction, 0.5),
        [("Tumour", "600 pixels")],
        [("Trained", "in one place"), ("SHA-256", "0" * 64)],
        ["It does not look like a brain. " * 20],
        "tumour",
    )
    page = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    assert page.shape[0] / page.shape[1] == pytest.approx(2**0.5, abs=0.01)
    for part in (page[:, :40], page[:, -40:], page[:30], page[-30:]):
        assert (part == 255).all(), "something runs into the margin"
