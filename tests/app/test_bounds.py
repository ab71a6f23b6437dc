"""What of an upload, a figure and a picture is easily lost: order, bounds, labels, limits, names."""

import gzip
import os
import subprocess
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from appearance.doubts import doubts
from appearance.features import describe_volume
from checkpoint import load_checkpoint
from common import MedFLError
from deployment.app import archives, cases, readout
from deployment.app.card import card_rows
from deployment.app.case import Case
from deployment.app.cases import add_truth, read_case
from deployment.app.nifti import write_nifti
from deployment.app.pictures import enlargement
from deployment.app.readout import Prediction, flip_spread, predict_case, slice_rows, summary
from deployment.serve_browser import headers, server
from deployment.staging import ROOT, stage_space
from inference import to_mask
from runs import models
from runs.models import find_checkpoints


def test_a_zip_of_a_folder_with_masks_has_a_truth_and_hidden_files_are_left_out(slices, picture, zipped):
    masks = [
        (f"anna_{k}_mask.png", picture(np.full((32, 32), 255 * (k == 2), np.uint8))) for k in range(1, 13)
    ]
    hidden = [(".DS_Store", b""), ("p/.x/b_1.png", b""), ("__MACOSX/p/b_1.png", b"")]
    case = read_case(
        [("p.zip", zipped(hidden + [("p/" + name, content) for name, content in slices + masks]))]
    )
    assert case.truth.any(axis=(1, 2)).tolist() == [k == 2 for k in range(1, 13)] and not case.notes


def test_what_is_passed_over_is_told(slices, picture):
    masks = [(f"anna_{k}_mask.png", picture(mode="L")) for k in range(1, 13)]
    case = read_case(
        [
            *slices,
            *masks,
            ("bert_1_mask.png", picture(mode="L")),
            ("bert_2_mask.png", picture(mode="L")),
            ("readme.txt", b""),
        ]
    )
    assert [note.split()[:2] for note in case.notes] == [["2", "masks"], ["1", "file"]]


def test_bounds_hold_to_the_last_one(slices, zipped, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILES", 12)
    monkeypatch.setattr(cases, "MAX_PIXELS", 12 * 32 * 32)
    read_case(slices)
    for files in ([*slices, ("x.txt", b"")], [("p.zip", zipped([(f".{k}", b"") for k in range(13)]))]):
        with pytest.raises(MedFLError, match="13 files are more than the 12"):
            read_case(files)
    monkeypatch.setattr(cases, "MAX_PIXELS", 12 * 32 * 32 - 1)
    with pytest.raises(MedFLError, match="12 slices of 32×32 pixels are more than this page can hold"):
        read_case(slices)
    scan = nibabel.Nifti1Image(np.zeros((32, 32, 12), np.uint8), np.eye(4)).to_bytes()
    monkeypatch.setattr("deployment.app.nifti.MAX_PIXELS", 12 * 32 * 32 - 1)
    with pytest.raises(MedFLError, match="which this page can't hold"):
        read_case([("a.nii", scan)])


def test_a_strip_is_no_slice(picture):
    with pytest.raises(MedFLError, match="40×15 pixels, too small"):
        read_case([("a_1.png", picture(mode="L", size=(40, 15)))])


def test_masks_that_come_later_may_have_capitals(slices, picture):
    masks = [(f"ANNA_{k}_MASK.PNG", picture(np.full((32, 32), 255, np.uint8))) for k in range(1, 13)]
    assert add_truth(read_case(slices), masks).all()


def test_intensities_of_any_scale_fill_the_range_and_background_does_not_count():
    values = np.zeros(
        (20, 24, 18), np.float32
    )  # two thirds background, as in a scan, and a little of it below 0
    values[:, :8] = np.random.default_rng(0).random((20, 8, 18)) * 1e-2
    values[:, 10] = -0.01
    volume = read_case([("a.nii", nibabel.Nifti1Image(values, np.eye(4)).to_bytes())]).volume
    top = np.percentile(values[values > 0], 99.9)
    assert np.array_equal(volume[..., 0], np.round((values / top * 255).clip(0, 255)).T[:, ::-1, ::-1])


def test_every_label_of_a_nifti_mask_is_tumour_and_it_may_come_with_the_scan():
    scan = nibabel.Nifti1Image(
        np.random.default_rng(0).integers(0, 9, (20, 24, 18)).astype(np.int16), np.eye(4)
    ).to_bytes()
    labels = np.zeros((20, 24, 18), np.uint8)
    labels[3, 4, 5], labels[6, 7, 8] = 1, 4
    for name in ("a_seg.nii", "a_mask.nii"):
        case = read_case([("a.nii", scan), (name, nibabel.Nifti1Image(labels, np.eye(4)).to_bytes())])
        assert np.argwhere(case.truth).tolist() == [[5, 24 - 1 - 4, 20 - 1 - 3], [8, 24 - 1 - 7, 20 - 1 - 6]]
        back = nibabel.Nifti1Image.from_bytes(gzip.decompress(write_nifti(case.nifti, case.truth)))
        assert back.header.get_xyzt_units()[0] == "mm"


def test_each_slice_keeps_its_place_and_the_mirrored_reading_is_turned_back(monkeypatch):
    volume = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    case = Case("a", ["a", "b", "c"], volume, np.arange(3))
    model = SimpleNamespace(classes=1)
    monkeypatch.setattr(
        readout, "predict_classes", lambda _, pixels, turn: (pixels[..., 1] / np.float32(255), pixels[..., 1])
    )
    probability = predict_case(model, case).probability
    assert np.array_equal(probability, volume[..., 1] / np.float32(255))
    assert flip_spread(model, case, probability).tolist() == [0, 0, 0]
    left = np.zeros((1, 32, 32), np.float32)
    left[..., :8] = 0.8  # whatever is shown: what either reading sees is asked, and there they differ by 0.8
    monkeypatch.setattr(readout, "predict_classes", lambda _, pixels, turn: (left, left))
    assert flip_spread(model, case, np.repeat(left, 3, axis=0)) == pytest.approx([0.8] * 3)


def test_lone_slices_have_no_dice_together_and_pixels_need_not_be_square():
    truth = np.zeros((2, 32, 32), np.uint8)
    truth[0, 4, 4:14] = 255
    probability = np.where(truth > 0, np.linspace(0.6, 0.8, 32, dtype=np.float32), 0).astype(np.float32)
    case = Case("a", ["a", "b"], np.zeros((2, 32, 32, 3), np.uint8), np.arange(2), truth, (0.5, 2.0, 3.0))
    rows = slice_rows(case, Prediction(probability), 0.5)
    assert rows[0]["tumour_mm2"] == 10.0 and rows[0]["largest_diameter_mm"] == 18.0
    assert rows[0]["mean_probability"] == pytest.approx(probability[truth > 0].mean())
    assert "dice" not in summary(case, rows, to_mask(probability, 0.5))
    case.groups = np.zeros(2, int)
    assert summary(case, rows, to_mask(probability, 0.5))["dice"] == 1.0


def test_the_shorter_side_is_enlarged():
    shapes = ((320, 1000), (1000, 300), (64, 64), (640, 640), (641, 900))
    assert [enlargement(shape) for shape in shapes] == [2, 3, 10, 1, 1]


@pytest.mark.parametrize(("slices", "limit"), [(2, 4), (1, 6)])
@pytest.mark.parametrize(
    ("feature", "sentence"),
    [
        ("appearance", "does not look like"),
        ("foreground_mean", "Brightness"),
        ("foreground_deviation", "Brightness"),
    ],
)
def test_the_limits_are_so_many_deviations(feature, sentence, slices, limit):
    volume = np.random.default_rng(0).integers(0, 255, (slices, 64, 64, 3), np.uint8)
    volume[:, :8] = volume[:, -8:] = volume[:, :, :8] = volume[:, :, -8:] = 0
    training = {
        name: {"mean": values, "deviation": [1.0] * len(values)}
        for name, values in describe_volume(torch.from_numpy(volume)).items()
    }
    mean = training[feature]["mean"]
    for far, wanted in ((limit - 0.1, []), (limit + 0.1, [True])):
        training[feature]["mean"] = [*mean[:-1], mean[-1] + far]
        assert [sentence in doubt for doubt in doubts(volume, training)] == wanted


@pytest.mark.parametrize(
    ("rows", "columns", "wanted"),
    [(64, 83, []), (64, 84, ["shape"]), (63, 64, ["small"]), (1024, 900, []), (1025, 900, ["large"])],
)
def test_the_bounds_of_size_and_shape(rows, columns, wanted):
    volume = np.random.default_rng(0).integers(0, 255, (1, rows, columns, 3), np.uint8)
    assert len([doubt for doubt in doubts(volume, None) if "×" in doubt]) == len(wanted)


def test_the_newest_model_comes_first_and_a_named_one_before_it(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDFL_CHECKPOINT", raising=False)
    assert find_checkpoints(tmp_path) == [models.PHANTOM_MODEL]
    monkeypatch.setattr(models, "PHANTOM_MODEL", tmp_path / "gone.pth")
    with pytest.raises(MedFLError, match="there is no model"):
        find_checkpoints(tmp_path)
    (tmp_path / "demo").mkdir()
    paths = [tmp_path / "a_best.pth", tmp_path / "demo" / "b_best.pth", tmp_path / "c_best.pth"]
    for age, path in enumerate(paths):
        path.write_bytes(b"")
        os.utime(path, (1_000 - age, 1_000 - age))
    (tmp_path / "d.pth").write_bytes(b"")
    assert find_checkpoints(tmp_path) == paths
    monkeypatch.setenv("MEDFL_CHECKPOINT", str(paths[2]))
    assert find_checkpoints(tmp_path) == [paths[2], *paths[:2]]


def test_a_fresh_clone_has_a_model_of_phantoms_that_says_so():
    """Small, outside of Git LFS, and carded as a phantom's."""
    assert models.PHANTOM_MODEL.stat().st_size < 3_000_000
    told = subprocess.run(
        ["git", "check-attr", "filter", "diff", "--", models.PHANTOM_MODEL],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "lfs" not in told.stdout
    checkpoint = load_checkpoint(models.PHANTOM_MODEL)
    rows = dict(card_rows(checkpoint, "0" * 64))
    assert checkpoint.metadata["data"]["name"] == "phantoms" and "painted, not measured" in rows["Data"]
    assert "random weights" in rows["Network"] and "found" in rows["Lesions"] and "Calibration" in rows
    assert checkpoint.metadata["scores"]["test"]["volume_dice"]["mean"] > 0.5


def test_the_card_tells_privacy_and_names_eight_hospitals(trained):
    checkpoint = load_checkpoint(trained / "transunet_centralized_best.pth")
    checkpoint.metadata["origin"] = {
        "kind": "federated",
        "hospitals": 10,
        "labels": [f"h{k}" for k in range(10)],
        "partition": "own data",
        "strategy": "fedavg",
        "rounds": 5,
        "privacy": {"secure_aggregation": True, "epsilon": 3.5, "delta": 1e-5},
    }
    told = dict(card_rows(checkpoint, "0" * 64))["Trained"]
    assert "h6, h7 and 2 more" in told and told.endswith("secure aggregation, ε = 3.5 at δ = 1e-05")
    checkpoint.metadata["origin"]["privacy"] = {
        "secure_aggregation": True,
        "epsilon": None,
        "delta": None,
        "patients": {"h3": {"epsilon": 7.9912, "delta": 1e-3}},
    }
    told = dict(card_rows(checkpoint, "0" * 64))["Trained"]
    assert told.endswith("secure aggregation, ε = 7.99 at δ = 0.001 for the patients of h3")


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (
            {
                "kind": "federated",
                "hospital": "mercy",
                "rounds": 3,
                "strategy": "fedavg",
                "partition": "own data",
            },
            "mercy's own model",
        ),
        (
            {"kind": "local", "hospital": "hospital-0", "partition": "site", "clients": 2, "alpha": 0.5},
            "at hospital-0 alone",
        ),
        ({"kind": "centralised", "started_from": "fedavg"}, "in one place, from a model of fedavg"),
    ],
)
def test_the_card_tells_a_hospitals_own_model(trained, origin, words):
    checkpoint = load_checkpoint(trained / "transunet_centralized_best.pth")
    checkpoint.metadata["origin"] = origin
    assert words in dict(card_rows(checkpoint, "0" * 64))["Trained"]


def test_weights_of_real_scans_carry_the_scans_licence(trained, tmp_path):
    checkpoint = load_checkpoint(trained / "transunet_centralized_best.pth")
    checkpoint.metadata["data"] = {**checkpoint.metadata["data"], "name": "lgg"}
    stage_space(checkpoint, tmp_path / "s")
    assert "\nlicense: cc-by-nc-sa-4.0\n" in (tmp_path / "s" / "README.md").read_text()


def test_the_page_is_served_on_this_computer_alone_with_the_spaces_headers(tmp_path):
    (tmp_path / "README.md").write_text((ROOT / "deployment" / "browser" / "README.md").read_text())
    assert {"cross-origin-opener-policy", "cross-origin-embedder-policy"} <= set(
        headers(tmp_path / "README.md")
    )
    with server(tmp_path, 0) as one:
        assert one.server_address[0] == "127.0.0.1"
        with pytest.raises(MedFLError, match="can't be used"):
            server(tmp_path, one.server_port)


def corrupted(content: bytes, first: int) -> bytes:
    return content[:first] + bytes(byte ^ 255 for byte in content[first : first + 40]) + content[first + 40 :]


def test_damage_inside_of_an_archive_is_told(slices, zipped):
    good = gzip.compress(np.random.default_rng(0).bytes(9000))
    packed = zipped(slices)
    first = packed.index(b"anna_1.png") + len(b"anna_1.png")
    for files in ([("p.nii.gz", corrupted(good, 12))], [("p.zip", corrupted(packed, first))]):
        with pytest.raises(MedFLError, match="can't be unpacked"):
            read_case(files)


def test_odd_names_are_no_crash(slices, picture, zipped):
    case = read_case([*slices, ("_mask.png", picture(mode="L"))])
    assert case.notes == ["1 mask belongs to no slice of the upload (ignored)."]
    assert len(read_case([("p.zip", zipped([(".", b""), *slices]))]).slices) == len(slices)
    long = f"a_{'1' * 200}.png"
    assert read_case([(long, picture(mode="L"))]).slices == [long]


def test_a_nifti_mask_of_one_volume_is_taken_and_one_of_colours_is_not():
    scan = nibabel.Nifti1Image(
        np.random.default_rng(0).integers(0, 9, (20, 24, 18)).astype(np.int16), np.eye(4)
    ).to_bytes()
    case = read_case([("a.nii", scan)])
    one = nibabel.Nifti1Image(np.ones((20, 24, 18, 1), np.uint8), np.eye(4)).to_bytes()
    assert add_truth(case, [("m.nii", one)]).all()
    colours = np.zeros((20, 24, 18), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(MedFLError, match="holds colours"):
        add_truth(case, [("m.nii", nibabel.Nifti1Image(colours, np.eye(4)).to_bytes())])
