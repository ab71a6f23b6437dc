"""What people do wrong, and the sentence that they need: twenty of each, side by side."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cohort import patient, save

from checkpoint import load_checkpoint
from common import MedFLError
from dataset import load_dataset
from deployment.app.cases import read_case
from federation.runtime.processes import parse_address
from federation.server.exchange import Exchange
from predict import find_slices
from split import load_split, make_split
from training import TrainingSettings
from transunet import TransUNet

BLACK = np.zeros((16, 16), np.uint8)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))


def scans(folder):
    for k, name in enumerate(("anna", "bert")):
        patient(folder / name, k)
    return folder


def load(folder):
    load_dataset(folder, progress=False)


def upload(folder):
    read_case([(str(p.relative_to(folder)), p.read_bytes()) for p in sorted(folder.rglob("*.png"))])


def loaded(change):
    def wrong(folder):
        change(scans(folder))
        load(folder)

    return wrong


def uploaded(change):
    def wrong(folder):
        change(folder)
        upload(folder)

    return wrong


def text(path, content="no picture"):
    path.write_text(content)


def trees_of_other_names(f):
    patient(f / "scan", 1, masks=f / "seg", mask="{}")


WRONG = {
    "a misspelt folder": (lambda f: load(f / "scnas"), "there is no folder .*scnas; fetch the scans"),
    "a patient's own folder": (
        lambda f: load(scans(f) / "anna"),
        "anna holds slices itself.*name the folder above it",
    ),
    "no mask": (
        loaded(lambda f: (f / "anna" / "p_2_mask.png").unlink()),
        r"p_2.png has no mask \(p_2_mask.png\), and no tree of masks has one of its name; add",
    ),
    "a mask alone": (
        loaded(lambda f: (f / "anna" / "p_2.png").unlink()),
        r"p_2_mask.png has no slice .*add the slice",
    ),
    "two masks": (
        loaded(lambda f: save(f / "anna" / "p_2_mask.tif", BLACK)),
        "are two masks of one slice; remove one",
    ),
    "two formats": (
        loaded(lambda f: [save(f / "anna" / f"p_2{s}.tif", BLACK) for s in ("", "_mask")]),
        "twice|two masks",
    ),
    "two sizes": (
        loaded(lambda f: save(f / "anna" / "p_2.png", np.zeros((20, 16, 3), np.uint8))),
        "p_2.png is 16×20 pixels and p_1.png is 16×16; all slices and masks of a patient must have the same size",
    ),
    "text for a picture": (
        loaded(lambda f: text(f / "anna" / "p_2.png")),
        "p_2.png can't be read as a picture",
    ),
    "a file not fetched": (
        loaded(lambda f: text(f / "anna" / "p_2.png", "version https://git-lfs.github.com/spec/v1")),
        "p_2.png only points to the picture, which was not fetched; fetch it with `git lfs pull`",
    ),
    "a share that is away": (
        loaded(lambda f: (f / "carl").symlink_to("/mnt/away/carl")),
        "carl is a link to /mnt/away/carl, which does not exist; fetch it .*connect the share",
    ),
    "grey masks": (
        loaded(lambda f: save(f / "anna" / "p_2_mask.png", BLACK + 7)),
        "p_2_mask.png has the value 7, but a mask only holds 0",
    ),
    "two patients in one folder": (
        loaded(lambda f: patient(f / "anna", 3, name="q_{}")),
        r"anna holds slices with 2 names and the same numbers \(p, q\); give each patient a folder",
    ),
    "images and masks in two folders of other names": (
        uploaded(trees_of_other_names),
        r"slices of 2 patients \(scan/p, seg/p\); open one at a time; masks have the slice's name with _mask",
    ),
    "nothing but masks": (
        uploaded(lambda f: save(f / "p_1_mask.png", BLACK)),
        "there is no slice in the upload",
    ),
    "a scan for predict.py": (
        lambda f: (text(f / "brain.nii"), find_slices([f / "brain.nii"], f / "out")),
        "brain.nii is no TIFF, PNG or JPEG; convert it first",
    ),
    "no model": (lambda f: load_checkpoint(f / "best.pth"), "there is no checkpoint .*best.pth .*train one"),
    "another program's model": (
        lambda f: (torch.save({"a": torch.ones(1)}, f / "m.pth"), load_checkpoint(f / "m.pth")),
        "m.pth holds no model of MedFL; choose a file that train_centralized.py wrote",
    ),
    "a truncated model": (
        lambda f: ((f / "m.pth").write_bytes(b"PK\3\4cut"), load_checkpoint(f / "m.pth")),
        "is truncated",
    ),
    "a split of other patients": (
        lambda f: (
            text(f / "s.json", '{"version": 1, "seed": 0, "train": ["zoe"], "val": [], "test": []}'),
            load_split(f / "s.json", {"anna"}),
        ),
        r"s.json names zoe \(and 0 more\) that the dataset does not hold|names zoe that the dataset does not hold",
    ),
    "a split without anybody to train": (
        lambda f: load_dataset(scans(f), progress=False).check_trainable([]),
        "leaves no patient to train on; ",
    ),
    "one patient, half for the test": (
        lambda f: make_split({"anna": "own", "bert": "own", "carl": "own"}, 0, 0.0, 1.0),
        "fractions must be 0 or more",
    ),
    "an address without a port": (lambda f: parse_address("fl.example.org"), "write it as HOST:PORT"),
    "an IPv6 address without brackets": (lambda f: parse_address("2001:db8::1"), "in brackets"),
    "a side that the network can't have": (lambda f: TransUNet("tiny", 100), "16"),
    "a seed that torch can't count to": (
        lambda f: TrainingSettings(seed=10**23),
        "--seed is 10{23}; choose a number below",
    ),
    "a batch of nothing": (
        lambda f: TrainingSettings(batch_size=0),
        "--batch-size is 0; choose a number above 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_mistake_gets_the_sentence_that_helps(tmp_path, name):
    wrong, sentence = WRONG[name]
    (tmp_path / "scans").mkdir()
    with pytest.raises(MedFLError, match=sentence) as told:
        wrong(tmp_path / "scans")
    words = str(told.value)
    assert "\n" not in words and ";" in words, words
    assert "1 patients" not in words and "1 slices" not in words, words


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_not_called_truncated(tmp_path):
    (scans(tmp_path) / "anna" / "p_1.png").chmod(0)
    with pytest.raises(MedFLError, match="permission"):
        load(tmp_path)


@pytest.mark.parametrize(
    "here, admitted, clients, known, missing",
    [
        (["ada"], ["ada", "bob"], 2, [], ["bob"]),
        (
            ["ada"],
            ["ada", "bob", "grace"],
            2,
            [],
            [],
        ),  # either may come, and nobody in particular is expected
        (["ada"], ["ada", "bob", "grace"], 2, ["grace"], ["grace"]),
        ([], None, 2, [], ["hospital-0", "hospital-1"]),
        (["mercy"], None, 2, [], []),  # with own data, which gives itself a name
    ],
)
def test_nobody_is_missed_whom_nobody_expects(here, admitted, clients, known, missing):
    members = {label: SimpleNamespace(facts=SimpleNamespace(own_data=label == "mercy")) for label in here}
    labels = None if admitted is None else dict(enumerate(admitted))
    membership = SimpleNamespace(members=members, training=set(members), labels=lambda: labels)
    exchange = Exchange(None, membership, SimpleNamespace(clients=clients), {}, None, lambda: known, print)
    assert exchange.missing() == missing
