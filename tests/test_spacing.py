"""What volume.json adds: read and refused, HD95 in mm against brute force, volumes by hand, and evaluate.py
with and without."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import run_here

from checkpoint import load_checkpoint
from common import MedFLError
from dataset import load_dataset
from evaluation import metrics
from evaluation.scoring import score_patients
from scans.spacing import read_spacing

BEST = "transunet_centralized_best.pth"
GOOD = {
    "version": 1,
    "spacing_mm": [5.0, 0.5, 0.75],
    "slice_positions_mm": [0.0, 5.0],
    "manufacturer": "somebody",
}


def test_the_spacing_is_read_from_disk_or_memory(tmp_path):
    path = tmp_path / "volume.json"
    path.write_text(json.dumps(GOOD))
    assert (
        read_spacing(path, 2)
        == (5.0, 0.5, 0.75)
        == read_spacing(Path("volume.json"), 2, json.dumps(GOOD).encode())
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not the volume.json of a prepared patient"),
        (b"[1]", "is not the volume.json"),
        (b"{}", "is not the volume.json"),
        (b"\xff\xfe", "is not the volume.json"),
        ({"version": 2}, "has version 2"),
        ({"spacing_mm": None}, "must have three sizes"),
        ({"spacing_mm": [1.0, 1.0]}, "must have three sizes"),
        ({"spacing_mm": [5.0, 0.0, 1.0]}, "must have three sizes"),
        ({"spacing_mm": [5.0, "1", 1.0]}, "must have three sizes"),
        ({"spacing_mm": [5.0, float("nan"), 1.0]}, "must have three sizes"),
        ({"spacing_mm": [True, 1.0, 1.0]}, "must have three sizes"),
        ({"slice_positions_mm": [0.0]}, "describes 1 slices, but the patient has 2"),
        ({"slice_positions_mm": None}, "describes 0 slices"),
    ],
    ids=str,
)
def test_a_broken_one_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "volume.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps({**GOOD, **content}).encode())
    with pytest.raises(MedFLError, match=sentence) as error:
        read_spacing(path, 2)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_volumes_by_hand_and_their_means():
    truth, prediction = np.zeros((2, 2, 10, 10), np.uint8)
    truth[0, :5, :4], prediction[:, 0, :5] = 255, 1
    scored = metrics.score_in_mm(prediction, truth, (5.0, 2.0, 1.0))
    assert [scored[name] for name in metrics.FIGURES_IN_MM[2:]] == pytest.approx([0.2, 0.1, -0.1])
    rows = [
        {**metrics.score_patient(name, "CS", prediction, truth), **more}
        for name, more in (
            ("a", scored),
            ("b", metrics.score_in_mm(truth, prediction, (5.0, 2.0, 1.0))),
            ("c", {}),
        )
    ]
    figures = metrics.report(rows)
    assert figures["volume_cm3"] == pytest.approx(
        {"truth": 0.15, "prediction": 0.15, "difference": 0.0, "absolute_difference": 0.1, "patients": 2}
    )
    assert figures["hd95_mm"]["undefined"] == 0 and figures["patients"][2]["hd95_mm"] is None
    assert metrics.score_in_mm(0 * truth, truth, (5.0, 2.0, 1.0))["hd95_mm"] is None


@pytest.fixture(scope="module")
def measured(phantoms, trained, tmp_path_factory):
    """The phantoms, with a volume.json for one of the two test patients, and that patient's name."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copytree(phantoms, folder, dirs_exist_ok=True)
    one = json.loads((trained / "split.json").read_text())["test"][0]
    slices = len(list((folder / "kaggle_3m" / one).glob("*_mask.tif")))
    told = {**GOOD, "slice_positions_mm": [5.0 * k for k in range(slices)]}
    (folder / "kaggle_3m" / one / "volume.json").write_text(json.dumps(told))
    return folder, one


@pytest.mark.slow
def test_evaluate_adds_mm_where_they_are_known_and_changes_nothing_else(
    phantoms, trained, measured, tmp_path
):
    folder, one = measured
    told = {}
    for name, data in (("without", phantoms), ("with", folder)):
        copied = tmp_path / name
        copied.mkdir()
        for file in (BEST, "split.json"):
            shutil.copyfile(trained / file, copied / file)
        done = run_here(
            "evaluate.py",
            "--checkpoint",
            copied / BEST,
            "--data-dir",
            data,
            "--json",
            copied / "s.json",
            "--csv",
            copied / "s.csv",
            "--write-back",
        )
        assert done.returncode == 0, done.stderr
        with open(copied / "s.csv", encoding="utf-8", newline="") as file:
            told[name] = (
                done.stdout,
                json.loads((copied / "s.json").read_text()),
                list(csv.DictReader(file)),
                copied,
            )
    (plain, figures, lines, where), (text, more, rows, other) = told["without"], told["with"]
    table = plain.splitlines()[1:5]
    assert text.splitlines()[1:5] == table and "mm" not in "".join(table) and "cm³" not in plain
    assert "HD95 in the plane px" in table[0] and "slices of one only" in table[0]
    assert list(lines[0]) == list(metrics.FIGURES_OF_A_PATIENT)
    assert [{name: row[name] for name in metrics.FIGURES_OF_A_PATIENT} for row in rows] == lines
    for name in figures.keys() - {"created", "sites", "patients", "checkpoint_sha256"}:
        assert more[name] == figures[name], name
    assert more.keys() - figures.keys() == {"hd95_mm", "surface_dice_2mm", "volume_cm3"}
    assert more["volume_cm3"]["patients"] == 1
    known, unknown = sorted(rows, key=lambda row: row["patient"] != one)
    truth = load_dataset(folder, progress=False).volume(one)[1] > 0
    assert float(known["volume_truth_cm3"]) == pytest.approx(truth.sum() * 5 * 0.5 * 0.75 / 1000)
    assert float(known["volume_difference_cm3"]) == pytest.approx(
        float(known["volume_prediction_cm3"]) - float(known["volume_truth_cm3"])
    )
    assert [unknown[name] for name in metrics.FIGURES_IN_MM] == [""] * 5
    assert (
        f"{float(known['volume_truth_cm3']):.2f}" in text
        and "HD95 mm" in text
        and "surface Dice 2 mm" in text
    )
    scores = [load_checkpoint(folder / BEST).metadata["scores"]["test"] for folder in (where, other)]
    assert scores[0] == scores[1]  # no word of the tumours' sizes in a checkpoint


def test_a_broken_one_is_told_before_anybody_is_scored(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path, dirs_exist_ok=True)
    dataset = load_dataset(tmp_path, progress=False)
    names = [patient.name for patient in dataset.patients[:3]]
    assert dataset.spacing(names[-1]) is None
    (dataset.root / names[-1] / "volume.json").write_text("{")
    with pytest.raises(MedFLError, match="is not the volume.json of a prepared patient"):
        score_patients(None, dataset, names, 0.5, closely=True)  # without a model nobody can be scored
