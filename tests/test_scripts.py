"""The three commands as a user runs them: real processes on phantoms."""

import csv
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT, run_here, run_script

from checkpoint import load_checkpoint, update_metadata
from common import MedFLError
from dataset import load_dataset
from evaluation.metrics import FIGURES_OF_A_PATIENT
from evaluation.tables import sites_told
from inference import predict_volume, to_mask
from split import make_split

pytestmark = pytest.mark.slow
SHORT = ("--model", "mini", "--image-size", 32, "--batch-size", 8)
BEST, LAST = "transunet_centralized_best.pth", "transunet_centralized_last.pth"


def history(folder) -> list[dict]:
    with open(folder / "centralized_history.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expect_sentence(done: subprocess.CompletedProcess, text: str) -> None:
    """The script ended with 2 and one sentence on the error stream, no traceback."""
    assert done.returncode == 2, done.stderr
    assert text in done.stderr and "Traceback" not in done.stderr
    assert (
        len([line for line in done.stderr.splitlines() if line.startswith(("train_", "evaluate", "predict"))])
        == 1
    )


def test_training_writes_what_it_says(trained):
    written = {p.name for p in trained.iterdir()}
    assert written == {
        BEST,
        LAST,
        "split.json",
        ".training.lock",  # that no second one writes there
        *(f"centralized{end}" for end in ("_history.csv", "_curves.png", ".log")),
    }
    assert Image.open(trained / "centralized_curves.png").size[0] > 500
    rows = history(trained)
    assert [row["epoch"] for row in rows] == ["1", "2"] and all(
        0 <= float(row["val_dice"]) <= 1 for row in rows
    )
    metadata = load_checkpoint(trained / BEST).metadata
    assert metadata["data"]["name"] == "phantoms" and metadata["origin"] == {"kind": "centralised"}
    assert [metadata["data"][part]["patients"] for part in ("train", "val", "test")] == [7, 1, 2]
    assert metadata["training"]["epochs_done"] <= 2 and metadata["training"]["selected_by"].startswith(
        "validation"
    )


def test_a_checkpoint_names_no_patient(trained, phantoms):
    content = (trained / BEST).read_bytes() + (trained / LAST).read_bytes()
    for patient in load_dataset(phantoms, progress=False).patients:
        assert patient.name.encode() not in content


def test_resume_after_a_kill_equals_an_unbroken_run(phantoms, tmp_path):
    """The plateau's state as well (test_central.py has the rest of that)."""
    options = (
        "--data-dir",
        phantoms,
        *SHORT,
        "--epochs",
        4,
        "--schedule",
        "plateau",
        "--freeze-encoder-epochs",
        1,
    )
    assert run_script("train_centralized.py", *options, "--out", tmp_path / "whole").returncode == 0
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_centralized.py", *map(str, options), "--out", broken],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (broken / LAST).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (broken / LAST).exists() and len(
        history(broken) if (broken / "centralized_history.csv").exists() else []
    ) < 4
    done = run_script("train_centralized.py", "--data-dir", phantoms, "--out", broken, "--resume")
    assert done.returncode == 0, done.stderr
    for name in (BEST, LAST):
        one, other = (
            load_checkpoint(tmp_path / run / name).model.state_dict() for run in ("whole", "broken")
        )
        assert all(torch.equal(one[key], other[key]) for key in one), name
    for one, other in zip(history(tmp_path / "whole"), history(broken), strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}


def test_resume_refuses_another_split_and_keeps_its_own(phantoms, trained, tmp_path):
    for name in (BEST, LAST, "split.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    split = json.loads((trained / "split.json").read_text())
    split["test"], split["val"] = split["val"], split["test"]
    (tmp_path / "other.json").write_text(json.dumps(split))
    resume = ("train_centralized.py", "--data-dir", phantoms, "--out", tmp_path, "--resume")
    expect_sentence(run_here(*resume, "--split-file", tmp_path / "other.json"), "another split")
    assert (tmp_path / "split.json").read_bytes() == (trained / "split.json").read_bytes()
    (tmp_path / LAST).write_bytes((trained / BEST).read_bytes())
    expect_sentence(run_here(*resume), "no run to continue")


def test_a_new_run_leaves_nothing_to_resume_of_the_old(phantoms, trained, tmp_path):
    for name in (BEST, LAST, "split.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    done = run_here(
        "train_centralized.py",
        "--data-dir",
        phantoms,
        "--out",
        tmp_path,
        *SHORT,
        "--lr",
        1e30,
        "--epochs",
        3,
        "--clip",
        1e30,
        "--overwrite",
    )
    expect_sentence(done, "lower --lr")
    assert (
        not (tmp_path / LAST).exists() or load_checkpoint(tmp_path / LAST).metadata["training"]["lr"] == 1e30
    )


def test_ctrl_c_ends_with_130_and_can_be_resumed(phantoms, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train_centralized.py",
            "--data-dir",
            phantoms,
            "--out",
            tmp_path,
            *map(str, SHORT),
            "--epochs",
            "50",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stdout:
        if re.match(r"epoch +1 ", line):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 130 and "--resume continues after epoch" in rest
    assert load_checkpoint(tmp_path / LAST).state["progress"]["epoch"] >= 1


def test_minutes_end_in_time(phantoms, tmp_path):
    done = run_script(
        "train_centralized.py", "--data-dir", phantoms, "--out", tmp_path, *SHORT, "--minutes", 0.2
    )
    assert done.returncode == 0, done.stderr
    # far down the cosine: one step of a slow machine is a good part of twelve seconds
    assert float(history(tmp_path)[-1]["learning_rate"]) < 0.5 * 1e-3


def test_everybody_trains_when_nobody_is_held_out(phantoms, tmp_path):
    done = run_here(
        "train_centralized.py",
        "--data-dir",
        phantoms,
        "--out",
        tmp_path,
        *SHORT,
        "--epochs",
        1,
        "--val-fraction",
        0,
        "--test-fraction",
        0,
    )
    assert done.returncode == 0 and "no validation patients" in done.stdout
    metadata = load_checkpoint(tmp_path / BEST).metadata
    assert metadata["training"]["selected_by"].startswith("nothing") and metadata["scores"] == {}


def test_early_stop(phantoms, tmp_path):
    done = run_here(
        "train_centralized.py",
        "--data-dir",
        phantoms,
        "--out",
        tmp_path,
        *SHORT,
        "--epochs",
        20,
        "--patience",
        1,
        "--lr",
        1e-9,
    )
    assert done.returncode == 0 and "stopped after epoch" in done.stdout and len(history(tmp_path)) < 20


def test_training_says_what_is_wrong(phantoms, trained, tmp_path):
    expect_sentence(
        run_here("train_centralized.py", "--data-dir", tmp_path / "none", "--out", tmp_path),
        "make_phantoms.py",
    )
    train = ("train_centralized.py", "--data-dir", phantoms, "--out")
    expect_sentence(run_here(*train, tmp_path / "a", "--image-size", 100), "multiple of 16")
    expect_sentence(run_here(*train, tmp_path / "b", "--resume"), "start without --resume")
    expect_sentence(run_here(*train, trained, "--test-fraction", 0), "another --out")
    expect_sentence(run_here(*train, trained, "--seed", 1), "drawn with --seed 0")
    (tmp_path / "split.json").write_text(
        json.dumps({"version": 1, "seed": 0, "train": ["nobody"], "val": [], "test": []})
    )
    expect_sentence(run_here(*train, tmp_path / "c", "--split-file", tmp_path / "split.json"), "names nobody")


def test_evaluate_writes_the_figures(phantoms, trained, tmp_path):
    done = run_script(
        "evaluate.py",
        "--checkpoint",
        trained / BEST,
        "--data-dir",
        phantoms,
        "--json",
        tmp_path / "s.json",
        "--csv",
        tmp_path / "s.csv",
        "--overlays",
        tmp_path / "o",
        "--reliability",
        tmp_path / "r.png",
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "s.json").read_text())
    assert figures["volume_dice"].keys() == {"mean", "median", "ci95"}
    assert figures["hd95_in_plane_px"].keys() == {"mean", "median", "undefined", "slices_with_one_mask"}
    assert {
        "pooled_dice",
        "slice_dice_tumour",
        "empty_slice_false_positive_rate",
        "missed_patients",
        "sites",
    } <= figures.keys()
    assert all(set(p) == set(FIGURES_OF_A_PATIENT) for p in figures["patients"])
    assert {"calibration", "lesions", "risk_coverage", "worst_patients"} <= figures.keys()
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    worst = min(figures["patients"], key=lambda patient: patient["dice"])["patient"]
    assert figures["worst_patients"][0]["patient"] == worst and f"worst: {worst}" in done.stdout
    assert {p["patient"] for p in figures["patients"]} == set(
        json.loads((trained / "split.json").read_text())["test"]
    )
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 3
    assert sorted(p.name.split("_")[0] for p in (tmp_path / "o").iterdir()) == ["best", "median", "worst"]


def test_evaluate_writes_back_no_figure_of_one_patient(phantoms, trained, tmp_path):
    for name in (BEST, "split.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    assert (
        run_here(
            "evaluate.py", "--checkpoint", tmp_path / BEST, "--data-dir", phantoms, "--write-back"
        ).returncode
        == 0
    )
    scores = load_checkpoint(tmp_path / BEST).metadata["scores"]
    assert scores["test"]["patients"] == 2 and scores["test"]["sites"] == {} and "val" in scores
    test = scores["test"]
    assert (
        set(test["calibration"]) == {"ece", "ece_all_pixels", "unseen_tumour"}
        and "worst_patients" not in test
    )
    assert set(test["lesions"]) == {"found", "missed", "false"}


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"CS": 10, "DU": 1}, []),  # eleven less ten are one
        ({"CS": 10, "DU": 5, "FG": 1, "HT": 1}, ["CS"]),
        ({"CS": 3, "DU": 4}, ["CS", "DU"]),
        ({"CS": 5, "DU": 1, "FG": 2}, ["CS"]),
        ({"CS": 2}, []),
    ],
)
def test_no_two_figures_of_a_checkpoint_give_one_patient_by_subtraction(counts, told):
    sites = {site: {"patients_scored": count} for site, count in counts.items()}
    assert list(sites_told({"patients_scored": sum(counts.values()), "sites": sites})) == told


def test_the_temperature_is_fitted_on_validation_patients_and_kept(phantoms, trained, tmp_path):
    """By the training at its end, and again by evaluate.py, for a federation's model."""
    for name in (BEST, "split.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    fitted = load_checkpoint(trained / BEST)
    dataset = load_dataset(phantoms, progress=False)
    assert fitted.model.temperature == fitted.metadata["temperature"] != 1.0
    update_metadata(tmp_path / BEST, temperature=1.0)
    plain = load_checkpoint(tmp_path / BEST)
    patient = dataset.patients[0].name
    volume = dataset.volume(patient)[0]
    before, after = (predict_volume(c.model, volume) for c in (plain, fitted))
    assert (to_mask(before, 0.5) == to_mask(after, 0.5)).all() and (before != after).any()
    done = run_here(
        "evaluate.py", "--checkpoint", tmp_path / BEST, "--data-dir", phantoms, "--fit-temperature"
    )
    assert done.returncode == 0 and "fitted on 1 validation patient" in done.stdout, done.stderr
    again = load_checkpoint(tmp_path / BEST)
    assert again.model.temperature == pytest.approx(fitted.model.temperature)
    for value in (0, -1.0, True, "1"):
        update_metadata(tmp_path / BEST, temperature=value)
        with pytest.raises(MedFLError, match="has the temperature"):
            load_checkpoint(tmp_path / BEST)


def test_evaluate_says_what_is_wrong(phantoms, trained, tmp_path):
    split = json.loads((trained / "split.json").read_text())
    split["test"], split["train"] = split["train"][:2], split["test"] + split["train"][2:]
    (tmp_path / "other.json").write_text(json.dumps(split))
    check = ("evaluate.py", "--checkpoint", trained / BEST, "--data-dir", phantoms)
    expect_sentence(run_here(*check, "--split-file", tmp_path / "other.json"), "not the split")
    expect_sentence(run_here(*check, "--split-file", tmp_path / "missing.json"), "there is no split file")
    missing = ("--checkpoint", tmp_path / "no.pth", "--data-dir", phantoms)
    expect_sentence(run_here("evaluate.py", *missing), "there is no checkpoint")
    expect_sentence(run_here(*check, "--split", "all", "--write-back"), "leave --split at test")


def test_predictions_are_bit_equal_with_what_is_scored(phantoms, trained, tmp_path):
    dataset = load_dataset(phantoms, progress=False)
    folder = dataset.patients[0].images[0].parent
    done = run_script(
        "predict.py", folder, "--checkpoint", trained / BEST, "--out", tmp_path, "--probabilities"
    )
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(trained / BEST)
    probabilities = predict_volume(checkpoint.model, dataset.volume(folder.name)[0])
    wanted = to_mask(probabilities, checkpoint.threshold)
    with open(tmp_path / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(wanted) == len(list(tmp_path.glob("*_mask.png")))
    for number, (row, image) in enumerate(zip(rows, dataset.patients[0].images)):
        mask = np.asarray(Image.open(tmp_path / f"{image.stem}_mask.png"))
        assert np.array_equal(mask, wanted[number])
        shown = np.asarray(Image.open(tmp_path / f"{image.stem}_probability.png"))
        assert np.abs(shown / 255 - probabilities[number]).max() <= 0.5 / 255 + 1e-6
        assert (row["patient"], row["slice"], int(row["tumour_pixels"])) == (
            folder.name,
            str(number + 1),
            np.count_nonzero(mask),
        )


def test_predict_takes_any_picture_and_says_what_is_wrong(trained, tmp_path):
    given = tmp_path / "in"
    given.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    for name in ("scan.png", "other.jpg", "a_1.tif", "a_2.tif", "a_1_mask.tif"):
        Image.fromarray(pixels).save(given / name)
    options = ("--checkpoint", trained / BEST, "--out", given / "out", "--probabilities")
    for _ in range(2):  # what the first run wrote is not taken for slices
        done = run_here("predict.py", given, *options)
        assert done.returncode == 0 and "4 slices segmented" in done.stdout, done.stderr
    assert Image.open(given / "out" / "scan_mask.png").size == (56, 40)
    assert run_here("predict.py", given, "--checkpoint", trained / BEST, "--out", tmp_path).returncode == 0
    expect_sentence(
        run_here("predict.py", given, "--checkpoint", trained / BEST, "--out", given), "another --out"
    )
    expect_sentence(run_here("predict.py", tmp_path / "missing", *options), "there is no")
    (given / "text.tif").write_text("hello")
    expect_sentence(run_here("predict.py", given / "text.tif", *options), "can't be read as a picture")
    expect_sentence(run_here("predict.py", given / "a_1_mask.tif", *options), "there is no slice")


def test_the_checkpoints_threshold_and_the_part_asked_for_decide(phantoms, trained, tmp_path):
    """A threshold that every pixel reaches: the scores are those of masks without a hole."""
    for name in (BEST, "split.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    update_metadata(tmp_path / BEST, threshold=0.0)
    dataset = load_dataset(phantoms, progress=False)
    split = json.loads((trained / "split.json").read_text())
    done = run_here(
        "evaluate.py",
        "--checkpoint",
        tmp_path / BEST,
        "--data-dir",
        phantoms,
        "--split",
        "train",
        "--json",
        tmp_path / "s.json",
        "--overlays",
        tmp_path / "o",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["patients"]
    assert sorted(row["patient"] for row in rows) == split["train"]
    for row in rows:
        truth = dataset.volume(row["patient"])[1] > 0
        assert row["dice"] == pytest.approx(2 * truth.sum() / (truth.sum() + truth.size))
    ranked = sorted(rows, key=lambda row: row["dice"])
    assert (tmp_path / "o" / f"best_{ranked[-1]['patient']}.png").exists()
    assert (tmp_path / "o" / f"worst_{ranked[0]['patient']}.png").exists()
    given = tmp_path / "in"
    for folder in ("a", "b"):
        (given / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(given / folder / "scan.png")
    about = {"version": 1, "spacing_mm": [5.0, 1.0, 0.5], "slice_positions_mm": [0.0]}
    (given / "b" / "volume.json").write_text(json.dumps(about))
    done = run_here(
        "predict.py", given, given / "a", "--checkpoint", tmp_path / BEST, "--out", tmp_path / "p"
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "p").glob("*.png")} == {"a_scan_png_mask.png", "b_scan_png_mask.png"}
    with open(tmp_path / "p" / "predictions.csv", encoding="utf-8") as file:
        assert [(row["tumour_pixels"], row["tumour_share"]) for row in csv.DictReader(file)] == [
            ("1536", "1.0")
        ] * 2
    with open(tmp_path / "p" / "components.csv", encoding="utf-8") as file:
        a, b = csv.DictReader(file)
    assert (a["volume_cm3"], a["diameter_mm"], b["diameter_px"]) == ("", "", "")
    assert float(b["volume_cm3"]) == pytest.approx(1536 * 2.5 / 1000) and int(a["voxels"]) == 1536
    assert float(a["diameter_px"]) == pytest.approx(np.hypot(31, 47))
    assert float(b["diameter_mm"]) == pytest.approx(np.hypot(31, 47 / 2))
    assert float(b["volume_low_cm3"]) <= float(b["volume_cm3"]) <= float(b["volume_high_cm3"])


def test_validation_patients_of_another_split_are_not_scored(phantoms, trained, tmp_path):
    split = json.loads((trained / "split.json").read_text())
    split["val"], split["train"] = split["train"][:1], split["val"] + split["train"][1:]
    (tmp_path / "other.json").write_text(json.dumps(split))
    expect_sentence(
        run_here(
            "evaluate.py",
            "--checkpoint",
            trained / BEST,
            "--data-dir",
            phantoms,
            "--split",
            "val",
            "--split-file",
            tmp_path / "other.json",
        ),
        "not the split",
    )


def test_a_federations_split_is_made_anew_with_its_fractions(phantoms, trained, tmp_path):
    dataset = load_dataset(phantoms, progress=False)
    asked = {"seed": 3, "val_fraction": 0.2, "test_fraction": 0.3}
    split = make_split({p.name: p.site for p in dataset.patients}, **asked)
    (tmp_path / BEST).write_bytes((trained / BEST).read_bytes())
    update_metadata(tmp_path / BEST, data={"split": asked, "split_sha256": split.sha256()})
    done = run_here(
        "evaluate.py", "--checkpoint", tmp_path / BEST, "--data-dir", phantoms, "--csv", tmp_path / "s.csv"
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "s.csv", encoding="utf-8") as file:
        assert sorted(row["patient"] for row in csv.DictReader(file)) == sorted(split.test)


def test_all_patients_of_a_foreign_dataset_need_no_split(phantoms, trained, tmp_path):
    (tmp_path / BEST).write_bytes((trained / BEST).read_bytes())
    done = run_here("evaluate.py", "--checkpoint", tmp_path / BEST, "--data-dir", phantoms, "--split", "all")
    assert done.returncode == 0 and "all: 10 patients" in done.stdout, done.stderr
