"""The study that compares a federation with hospitals alone and a central model: all of it, small; resumed;
failing."""

import csv
import sys

import pytest

from benchmarks import federated_study
from benchmarks.federated_study import FEDAVG, Study, finished
from common import MedFLError
from evaluation.comparison import ALL


@pytest.mark.slow
def test_a_whole_study_and_its_resumption(home, phantoms, tmp_path, monkeypatch, capsys):
    study = Study(FEDAVG, clients=2, rounds=1, image_size=32, model="mini", tune_passes=1)
    monkeypatch.setattr(federated_study, "STUDIES", {"small": study})
    monkeypatch.setattr(
        sys, "argv", ["federated_study.py", "small", "--data-dir", str(phantoms), "--out", str(tmp_path)]
    )
    federated_study.main()
    told = capsys.readouterr().out
    with open(tmp_path / "study.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    names = [line["model"] for line in lines if line["hospital"] == ALL]
    assert names == [
        "fedavg",
        "each hospital fine-tuned from fedavg",
        "hospital-0 alone",
        "hospital-1 alone",
        "each hospital alone",
        "centralised",
    ]
    steps = {
        line.split(", ")[2]: int(line.split(", ")[3].split(" steps")[0])
        for line in told.splitlines()
        if " steps" in line
    }
    alone = [steps[f"hospital-{k} alone"] for k in (0, 1)]
    assert steps["fedavg"] == steps["centralised"] == sum(alone) and min(alone) > 0
    assert (tmp_path / "site.png").stat().st_size > 10_000 and "centralised" in told

    federated_study.main()
    assert " steps" not in capsys.readouterr().out  # nothing was trained again
    (tmp_path / "site_0" / "alone_1" / "done.json").unlink()
    federated_study.main()
    trained = [line for line in capsys.readouterr().out.splitlines() if " steps" in line]
    assert len(trained) == 1 and "hospital-1 alone" in trained[0]

    monkeypatch.setattr(
        federated_study, "STUDIES", {"small": Study(FEDAVG, clients=2, rounds=2, image_size=32)}
    )
    with pytest.raises(MedFLError, match="holds another study"):
        federated_study.main()


def test_a_training_that_fails_ends_the_others_and_leaves_no_mark(tmp_path):
    waits_for_hospitals = ["run_server.py", "--address", "127.0.0.1:0", "--out", "."]
    with pytest.raises(MedFLError, match="log.txt"):
        finished(
            tmp_path,
            "one that fails",
            [["partition.py", "--clients", "0", "--data-dir", str(tmp_path)], waits_for_hospitals],
        )
    assert not (tmp_path / "done.json").exists() and "partition.py" in (tmp_path / "log.txt").read_text()
    finished(tmp_path, "one that works", [["partition.py", "--help"]])
    assert (tmp_path / "done.json").exists()
