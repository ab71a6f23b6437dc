"""The comparison of several models: who is scored on whom, paired differences, what is refused."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import run_here

from benchmarks.federated_study import pooled
from checkpoint import load_checkpoint, update_metadata
from common import MedFLError
from dataset import load_dataset
from evaluation.alike import made
from evaluation.comparison import (
    ALL,
    COLUMNS,
    Row,
    as_text,
    hospitals_of,
    kind_of,
    lines_of,
    make_rows,
    table_of,
)
from split import load_split

HOSPITALS = {"hospital-0": ("a", "b"), "hospital-1": ("c",), "hospital-2": ()}
PATIENTS = ["a", "b", "c"]


def model(name: str, **origin) -> SimpleNamespace:
    """A checkpoint that is not scored by running it."""
    return SimpleNamespace(
        path=Path(name), metadata={"origin": origin, "training": {"update_dtype": "float32"}}
    )


def own(kind: str, k: int, **more) -> SimpleNamespace:
    return model(f"{kind}-{k}", kind=kind, hospital=f"hospital-{k}", **more)


def score(checkpoint: SimpleNamespace, patients: list[str]) -> list[dict]:
    """Every model has a Dice of its own, told by the number at its name's end."""
    place = int(checkpoint.path.name[-1]) if checkpoint.path.name[-1].isdigit() else 5
    return [
        {"patient": patient, "dice": 0.1 * place + 0.01 * PATIENTS.index(patient)} for patient in patients
    ]


def test_rows_are_models_and_complete_sets():
    models = [
        model("f", kind="federated", strategy="fedavg"),
        *(own("local", k) for k in range(3)),
        *(own("local", k, started_from="fedavg") for k in range(3)),
        model("c", kind="centralised"),
    ]
    rows = make_rows(models, HOSPITALS, PATIENTS, score)
    assert [row.name for row in rows] == [
        "fedavg",
        "hospital-0 alone",
        "hospital-1 alone",
        "hospital-2 alone",
        "each hospital alone",
        "each hospital fine-tuned from fedavg",
        "centralised",
    ]
    each = {figures["patient"]: figures["dice"] for figures in rows[4].patients}
    assert each == {
        "a": pytest.approx(0.0),
        "b": pytest.approx(0.01),
        "c": pytest.approx(0.12),
    }  # each by its own hospital's model
    assert len(rows[1].patients) == 3


def test_an_incomplete_set_is_shown_one_by_one():
    models = [own("federated", 0, strategy="fedavg"), own("federated", 1, strategy="fedavg")]
    rows = make_rows(models, HOSPITALS, PATIENTS, score)
    assert [row.name for row in rows] == [
        "hospital-0 fedavg, own normalisation",
        "hospital-1 fedavg, own normalisation",
    ]


def test_two_of_one_name_are_refused():
    with pytest.raises(MedFLError, match="both centralised"):
        make_rows([model("c", kind="centralised"), model("d", kind="centralised")], {}, PATIENTS, score)


def test_no_model_is_dropped_without_a_word():
    twice = [
        own("local", 0, started_from="fedavg"),
        own("local", 1, started_from="fedavg"),
        own("local", 0, started_from="fedavg"),
    ]
    with pytest.raises(MedFLError, match="both hospital-0 fine-tuned from fedavg"):
        make_rows(twice, HOSPITALS, PATIENTS, score)


def test_half_precision_is_part_of_the_name():
    half = model("f", kind="federated", strategy="krum")
    half.metadata["training"]["update_dtype"] = "float16"
    assert kind_of(half) == "krum, float16"


def test_columns_intervals_and_differences():
    models = [model("m1", kind="centralised"), model("m3", kind="federated", strategy="fedavg")]
    rows = make_rows(models, HOSPITALS, PATIENTS, score)
    table = table_of(rows, {**HOSPITALS, ALL: tuple(PATIENTS)})
    assert table["columns"] == {"hospital-0": 2, "hospital-1": 1, "hospital-2": 0, "all": 3}
    first, second = table["rows"]
    assert first["scores"]["hospital-0"] == {"mean": pytest.approx(0.105), "ci95": None, "patients": 2}
    assert first["scores"]["hospital-2"] is None and first["scores"]["all"]["mean"] == pytest.approx(0.11)
    assert first["scores"]["all"]["ci95"] is None  # of three patients
    assert first["difference"]["mean"] == 0 and second["difference"]["mean"] == pytest.approx(0.2)
    text = as_text(table)
    assert "hospital-1 (1)" in text and "+0.200" in text and "under 5 patients" in text and "–" in text
    lines = lines_of(table)
    assert len(lines) == 6 and all(len(line) == len(COLUMNS) for line in lines)
    assert lines[0][6] is None and lines[-1][6] == pytest.approx(
        0.2
    )  # the difference stands with all patients


def central_model(**training) -> SimpleNamespace:
    told = {"epochs": 30, "minutes": None, "steps": None, "batch_size": 16, "ema_decay": 0.999}
    told |= {"selected_by": "validation mean volume Dice", "encoder": "random", "weights": "averaged"}
    data = {"train": {"slices": 160}}
    return SimpleNamespace(path=Path("m1"), metadata={"training": {**told, **training}, "data": data})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, []),
        ({"weights": "raw"}, ["raw weights, not averaged ones"]),
        ({"selected_by": "nothing: the last model"}, ["chosen by being the last, not validation"]),
        ({"steps": 100}, ["10 passes, not 30"]),
        ({"steps": 300}, []),
        ({"minutes": 5, "epochs_done": 12}, ["12 passes, not 30"]),
        ({"rounds": 15, "local_epochs": 2, "local_steps": None}, []),
        ({"rounds": 20, "local_epochs": 1, "local_steps": 5}, ["10 passes, not 30"]),
        ({"encoder": "pretrained"}, ["pretrained encoder, not random"]),
    ],
)
def test_what_was_not_made_alike_is_said(other, words):
    first, second = made(central_model()), made(central_model(**other))
    assert second.unlike(first) == words and first.unlike(first) == []
    rows = [
        Row("one", score(central_model(), PATIENTS), first),
        Row("two", score(central_model(), PATIENTS), second),
    ]
    table = table_of(rows, {ALL: tuple(PATIENTS)})
    assert table["rows"][1]["unlike"] == words and lines_of(table)[1][-1] == "; ".join(words)
    assert ("two: " + ", ".join(words) in as_text(table)) == bool(words)


def test_seeds_are_pooled_by_patient():
    """A patient who is tested under two seeds counts once, with the mean."""

    def table(dice: dict[str, float]) -> dict:
        rows = [make_rows([model("m", kind="centralised")], {}, [], lambda *_: [])[0]]
        rows[0].patients = [{"patient": p, "dice": value} for p, value in dice.items()]
        return table_of(rows, {ALL: tuple(dice)})

    joined = pooled([table({"a": 0.2, "b": 0.4}), table({"b": 0.8, "c": 0.9})])["rows"][0]
    assert {row["patient"]: row["dice"] for row in joined["patients"]} == {
        "a": 0.2,
        "b": pytest.approx(0.6),
        "c": 0.9,
    }
    assert joined["scores"][ALL]["mean"] == pytest.approx((0.2 + 0.6 + 0.9) / 3)


@pytest.fixture(scope="module")
def trained(home, phantoms, tmp_path_factory):
    """Two hospitals alone, one of them started from the other's model, and
    a central model, a few steps each."""
    out = tmp_path_factory.mktemp("compared")
    common = ("--data-dir", phantoms, "--image-size", 32, "--batch-size", 8, "--steps", 5)
    shares = [("alone_0", "--cid", 0), ("alone_1", "--cid", 1), ("central",)]
    for name, *options in [
        *shares,
        ("tuned_0", "--cid", 0, "--init", out / "central" / "transunet_centralized_best.pth"),
    ]:
        done = run_here("train_centralized.py", *common, "--out", out / name, *options)
        assert done.returncode == 0, done.stderr
    return out


def checkpoint(trained: Path, name: str) -> Path:
    return next((trained / name).glob("transunet_*_best.pth"))


def test_a_hospital_alone_trains_on_its_share_of_the_central_split(trained, phantoms):
    dataset = load_dataset(phantoms, progress=False)
    about = [
        load_checkpoint(checkpoint(trained, name)).metadata for name in ("alone_0", "alone_1", "central")
    ]
    assert [a["origin"]["kind"] for a in about] == ["local", "local", "centralised"]
    assert len({a["data"]["split_sha256"] for a in about}) == 1
    assert (
        about[0]["data"]["train"]["patients"] + about[1]["data"]["train"]["patients"]
        == about[2]["data"]["train"]["patients"]
    )
    assert all(a["training"]["steps"] == 5 for a in about)
    split = load_split(trained / "alone_0" / "split.json", {p.name for p in dataset.patients})
    shares = hospitals_of([load_checkpoint(checkpoint(trained, "alone_0"))], dataset, split)
    assert sorted(name for share in shares.values() for name in share) == sorted(split.test)


def test_a_start_from_a_checkpoint_is_one(trained):
    tuned = load_checkpoint(checkpoint(trained, "tuned_0"))
    assert (
        tuned.metadata["origin"]["started_from"] == "centralised"
        and kind_of(tuned) == "fine-tuned from centralised"
    )
    start, alone = (
        load_checkpoint(checkpoint(trained, name)).model.state_dict() for name in ("central", "alone_0")
    )

    def distance(one: dict, other: dict) -> float:
        return sum(
            float((one[name] - other[name]).square().sum()) for name in one if one[name].is_floating_point()
        )

    assert distance(tuned.model.state_dict(), start) < distance(tuned.model.state_dict(), alone)


def test_evaluate_compares(trained, phantoms, tmp_path):
    paths = [checkpoint(trained, name) for name in ("central", "alone_0", "alone_1", "tuned_0")]
    files = {kind: tmp_path / f"table.{kind}" for kind in ("json", "csv", "png")}
    done = run_here(
        "evaluate.py",
        "--compare",
        *paths,
        "--data-dir",
        phantoms,
        "--json",
        files["json"],
        "--csv",
        files["csv"],
        "--plot",
        files["png"],
    )
    assert done.returncode == 0, done.stderr
    table = json.loads(files["json"].read_text())
    assert [row["name"] for row in table["rows"]] == [
        "centralised",
        "hospital-0 alone",
        "hospital-1 alone",
        "each hospital alone",
        "hospital-0 fine-tuned from centralised",
    ]
    assert set(table["columns"]) == {"hospital-0", "hospital-1", "all"} and len(table["checkpoints"]) == 4
    alone = run_here(
        "evaluate.py", "--checkpoint", paths[1], "--data-dir", phantoms, "--json", tmp_path / "alone.json"
    )
    assert alone.returncode == 0, alone.stderr
    figures = json.loads((tmp_path / "alone.json").read_text())
    assert table["rows"][1]["scores"]["all"]["mean"] == figures["volume_dice"]["mean"]  # one way to score
    with open(files["csv"], encoding="utf-8") as file:
        assert {line["model"] for line in csv.DictReader(file)} == {row["name"] for row in table["rows"]}
    assert files["png"].read_bytes()[:4] == b"\x89PNG"


def test_models_that_can_not_be_compared_are_refused(trained, phantoms, tmp_path):
    central, alone = checkpoint(trained, "central"), checkpoint(trained, "alone_0")
    other = tmp_path / "other" / alone.name
    other.parent.mkdir()
    for name in (alone.name, "split.json"):
        (other.parent / name).write_bytes((alone.parent / name).read_bytes())
    update_metadata(other, origin={**load_checkpoint(other).metadata["origin"], "partition": "iid"})
    for options, sentence in (
        (("--compare", alone, other), "differently divided"),
        (("--compare", central, "--overlays", tmp_path), "leave the other options out"),
        (("--checkpoint", central, "--plot", tmp_path / "x.png"), "--plot draws the table"),
    ):
        done = run_here("evaluate.py", *options, "--data-dir", phantoms)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--cid", 2), "numbered from 0"),
        (("--steps", 0), "--steps is 0"),
        (("--steps", 1, "--minutes", 1), "give one of them"),
        (("--init", "nothing.pth"), "nothing.pth"),
    ],
)
def test_bad_options_of_the_training(phantoms, home, tmp_path, options, sentence):
    done = run_here(
        "train_centralized.py", "--data-dir", phantoms, "--image-size", 32, "--out", tmp_path, *options
    )
    assert done.returncode == 2 and sentence in done.stderr, done.stderr


def test_a_start_of_another_network_is_refused(trained, phantoms, home, tmp_path):
    done = run_here(
        "train_centralized.py",
        "--data-dir",
        phantoms,
        "--image-size",
        48,
        "--out",
        tmp_path,
        "--init",
        checkpoint(trained, "central"),
    )
    assert done.returncode == 2 and "give --model tiny --image-size 32" in done.stderr
