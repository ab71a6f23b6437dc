"""Cross-validation: who is in which fold, what is kept, what goes on after an interruption."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from running import run_here

import cross_validate
from common import MedFLError
from dataset import load_dataset
from split import make_folds

SITES = {f"p{k:02}": "AABBBBBBBCCCCCCCCCCCD"[k] for k in range(21)}


def test_every_patient_is_tested_once_and_sites_are_shared_out():
    splits = make_folds(SITES, 5, seed=0)
    assert Counter(p for split in splits for p in split.test) == Counter(SITES.keys())
    for split in splits:
        assert sorted(split.part("all")) == sorted(SITES) and len(split.val) == 2
        assert 4 <= len(split.test) <= 5 and 1 <= sum(SITES[p] == "B" for p in split.test) <= 2
    assert make_folds(SITES, 5, seed=0) == splits != make_folds(SITES, 5, seed=1)


@pytest.mark.parametrize("folds", [0, 1, 22])
def test_impossible_numbers_of_folds_are_refused(folds):
    with pytest.raises(MedFLError, match="can't be divided"):
        make_folds(SITES, folds, seed=0)


def test_it_goes_on_where_it_was_interrupted(phantoms, home, tmp_path, monkeypatch):
    """The second fold is stopped within its second epoch: the first is kept, and the second goes on."""
    command = ("cross_validate.py", "--data-dir", phantoms, "--out", tmp_path, "--folds", 2, "--epochs", 2)
    command += ("--model", "mini", "--encoder", "random", "--image-size", 32, "--batch-size", 8)
    begun: list = []
    train = cross_validate.CentralTraining._train

    def stop_in_the_fourth(self):
        begun.append((self.out.name, self.progress.epoch + 1))
        if len(begun) == 4:
            raise KeyboardInterrupt
        return train(self)

    monkeypatch.setattr(cross_validate.CentralTraining, "_train", stop_in_the_fourth)
    assert run_here(*command).returncode == 130
    assert begun == [("fold_1", 1), ("fold_1", 2), ("fold_2", 1), ("fold_2", 2)]
    kept = (tmp_path / "fold_1" / "rows.json").read_bytes()
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    assert begun[4:] == [("fold_2", 2)] and (tmp_path / "fold_1" / "rows.json").read_bytes() == kept
    scores = json.loads((tmp_path / "scores.json").read_text())
    patients = {p.name for p in load_dataset(phantoms, progress=False).patients}
    assert {p["patient"] for p in scores["patients"]} == patients and scores["patients_scored"] == 10
    assert scores["volume_dice"]["ci95"] and "10 patients, each scored by the one of 2 models" in done.stdout
    other = run_here(*command[:-1], 4)
    assert other.returncode == 2 and "folds with other settings" in other.stderr
    fewer = run_here("cross_validate.py", "--data-dir", phantoms, "--out", tmp_path, "--folds", 3)
    assert fewer.returncode == 2 and "patients and settings" in fewer.stderr


def test_masks_that_changed_between_two_folds_are_not_pooled(phantoms, home, tmp_path, monkeypatch):
    data, out = shutil.copytree(phantoms, tmp_path / "data"), tmp_path / "out"
    command = ("cross_validate.py", "--data-dir", data, "--out", out, "--folds", 2, "--steps", 1)
    command += ("--model", "mini", "--encoder", "random", "--image-size", 32, "--batch-size", 8)
    fold_rows = cross_validate.fold_rows

    def stop_in_the_second(dataset, split, settings, device, folder):
        if folder.name == "fold_2":
            raise KeyboardInterrupt
        return fold_rows(dataset, split, settings, device, folder)

    with monkeypatch.context() as patched:
        patched.setattr(cross_validate, "fold_rows", stop_in_the_second)
        assert run_here(*command).returncode == 130
    for path in data.rglob("*_mask.tif"):
        Image.fromarray(np.roll(np.asarray(Image.open(path)), 5, axis=1)).save(path)
    done = run_here(*command)
    assert done.returncode == 2 and "holds folds with other scans or masks; give the command" in done.stderr
    assert not (out / "scores.json").exists()
