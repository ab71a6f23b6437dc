"""The page as Streamlit runs it, without a browser: a case from opening to closing, bad uploads, models that
can't be used."""

import gc
import json
import shutil
import weakref
from pathlib import PurePath

import numpy as np
import pytest
import torch
from running import ROOT
from streamlit.testing.v1 import AppTest

from borders.escaping import markdown
from checkpoint import load_checkpoint, update_metadata
from dataset import load_dataset
from deployment.app import beside, models
from deployment.app.readout import predict_case
from inference import to_mask
from runs.models import PHANTOM_MODEL
from scans.naming import volume_name
from tasks import named_task

pytestmark = pytest.mark.slow
APP = ROOT / "deployment" / "app" / "app.py"
BEST = "transunet_centralized_best.pth"


@pytest.fixture
def page(trained, monkeypatch):
    monkeypatch.setenv("MEDFL_CHECKPOINT", str(trained / BEST))
    return AppTest.from_file(ROOT / "deployment" / "app" / "app.py", default_timeout=120).run()


def upload(page: AppTest, files: list[tuple[str, bytes]], label: str = "Slices") -> AppTest:
    """Upload files as (name, content) to the uploader whose label begins so."""
    uploader = next(u for u in page.file_uploader if u.label.startswith(label))
    return uploader.set_value([(name, content, "application/octet-stream") for name, content in files]).run()


def drawn(page: AppTest, **kept) -> AppTest:
    """What the viewer tells of a reader's hands, as the page keeps it: threshold, slice (from 1), edited."""
    for name, value in kept.items():
        page.session_state[name] = value
    return page.run()


def close(page: AppTest) -> AppTest:
    return next(b for b in page.button if b.label == "Close this case").click().run()


def patient_files(phantoms, masks: bool) -> list[tuple[str, bytes]]:
    patient = load_dataset(phantoms, progress=False).patients[0]
    chosen = patient.images + (patient.masks if masks else ())
    return [(path.name, path.read_bytes()) for path in chosen]


def figures(page: AppTest) -> dict[str, str]:
    return page.table[0].value["value"].to_dict()


@pytest.mark.parametrize("region", ["hippocampus", "**no tumour**"])
def test_the_page_names_what_another_task_outlines(tmp_path, monkeypatch, region):
    other = shutil.copy(PHANTOM_MODEL, tmp_path / "other_best.pth")
    update_metadata(other, task={**named_task("hippocampus").model_dump(mode="json"), "region": region})
    monkeypatch.setenv("MEDFL_CHECKPOINT", str(other))
    page = AppTest.from_file(APP, default_timeout=120).run()
    shown = markdown(region)
    assert page.title[0].value == f"MedFL: {shown} segmentation"
    assert any(
        "Open slices (T1)" in text.value and f"takes for {shown}" in text.value for text in page.markdown
    )
    page.button(key="phantom_1").click().run()
    assert not page.exception
    assert {markdown(region[:1].upper() + region[1:]), f"Slices with {shown}"} <= figures(page).keys()


def test_a_sample_from_opening_to_closing(page):
    assert not page.exception and "not a medical device" in page.warning[0].value
    page.button(key="phantom_1").click().run()
    assert not page.exception and "Dice with the truth" in figures(page)
    before = figures(page)["Tumour"]
    drawn(page, threshold=0.05)
    assert figures(page)["Tumour"] != before
    drawn(page, slice=2)
    assert any("Slice 2 (" in caption.value for caption in page.caption)
    page.button(key="mirror").click().run()
    assert any("when mirrored" in caption.value for caption in page.caption)
    page.number_input(key="pixel_size").set_value(0.5).run()
    assert "Volume" not in figures(page)
    page.number_input(key="slice_distance").set_value(3.0).run()
    assert figures(page)["Volume"].endswith("cm³")
    page.toggle(key="unfolded").set_value(False).run()
    assert "Volume" in figures(page)
    close(page)
    assert (
        not page.exception
        and not page.table
        and any("Try a sample" in caption.value for caption in page.caption)
    )
    page.button(key="phantom_2").click().run()  # nothing of how the former one was looked at is left
    assert page.session_state["threshold"] == 0.5 and page.toggle(key="unfolded").value
    assert "Volume" not in figures(page)


def test_readers_see_nothing_of_each_other_and_no_case_outlives_its_closing(page, phantoms):
    """Two sessions of one process, five cases each: what was closed is not kept anywhere."""
    other, patients, cases = AppTest.from_file(APP, default_timeout=120).run(), [], []
    for patient in load_dataset(phantoms, progress=False).patients[:6]:
        patients.append([(path.name, path.read_bytes()) for path in patient.images])
    for one, two in zip(patients[:5], patients[1:]):
        for reader, files in ((page, one), (other, two)):
            upload(reader, files)
            cases.append(weakref.ref(reader.session_state.case))
        assert not page.exception and not other.exception
        names = [reader.session_state.case.name for reader in (page, other)]
        assert names == [volume_name(PurePath(files[0][0])) for files in (one, two)]
        assert page.header[0].value != other.header[0].value
        close(page)
        assert "case" in other.session_state
        close(other)
    gc.collect()
    alive = [case().name for case in cases if case() is not None]
    assert len(alive) <= 2, alive  # what Streamlit keeps of each session's last run


def test_the_model_runs_once_for_an_upload(page, phantoms, monkeypatch):
    import inference

    passes = []
    original = inference.logits_of
    monkeypatch.setattr(inference, "logits_of", lambda *given: passes.append(1) or original(*given))
    upload(page, patient_files(phantoms, masks=False))
    once = len(passes)
    assert once > 0 and "case" in page.session_state
    drawn(page, threshold=0.3, slice=2)
    assert len(passes) == once


def test_another_model_and_another_date_stand_beside_the_case(page, monkeypatch, tmp_path, phantoms):
    other = shutil.copy(PHANTOM_MODEL, tmp_path / "other_best.pth")
    for place in (models, beside):
        monkeypatch.setattr(place, "MODELS", tmp_path)
    page.run()
    page.button(key="phantom_1").click().run()
    case = page.session_state.case
    page.selectbox(key="other_model").set_value(other).run()
    assert not page.exception
    shown = page.session_state.beside
    loaded = load_checkpoint(other, torch.device("cpu"))
    expected = to_mask(predict_case(loaded.model, case).probability, loaded.threshold)
    assert (
        shown.case is case and shown.label == "Model other_best.pth" and np.array_equal(shown.mask, expected)
    )
    sent = message(page)
    assert sent["beside_mask"] == expected.tobytes() and sent["beside_pixels"] == case.volume.tobytes()
    upload(page, patient_files(phantoms, masks=False), "Another date")
    later = page.session_state.beside
    assert later.label.startswith("Other date, ") and later.mask.shape == later.case.volume.shape[:3]
    assert page.session_state.case is case, "the case stays"
    page.session_state.predicted_by = None  # as after another model was chosen, or the sides exchanged
    page.run()
    assert "beside" not in page.session_state, "it would be another model's, or of the other side"
    upload(page, [("notes.txt", b"no scan")], "Another date")
    assert page.session_state.beside is None and any(";" in error.value for error in page.error)
    close(page)
    assert "beside" not in page.session_state and "other_model" not in page.session_state


def message(page: AppTest) -> dict[str, bytes]:
    """The parts that the viewer is given, as deployment/app/scan_viewer.py has them, and the head."""
    data = page.get("bidi_component")[0].proto.bytes
    length = int.from_bytes(data[:4], "little")
    head, at, parts = json.loads(data[4 : 4 + length]), 4 + length, {}
    for name, size in head["parts"]:
        parts[name], at = data[at : at + size], at + size
    assert at == len(data)
    return {"head": head, **parts}


def test_voxels_travel_once_and_again_where_they_are_lacked(page, phantoms):
    upload(page, patient_files(phantoms, masks=False))
    case, prediction = page.session_state["case"], page.session_state["prediction"]
    first = message(page)
    assert first["pixels"] == case.volume.tobytes() and len(first["codes"]) == prediction.probability.size
    assert first["mask"] == first["truth"] == b""  # the proposal, and no truth
    assert case.name not in json.dumps(first["head"])  # what a file is called stays here
    assert list(message(drawn(page, slice=2))) == ["head"]
    edited = to_mask(prediction.probability, 0.5) ^ 255
    corrected = message(drawn(page, edited=edited))
    assert corrected["mask"] == edited.tobytes() and "pixels" not in corrected
    assert corrected["head"]["masks"] > first["head"]["masks"]
    assert corrected["head"]["voxels"] == first["head"]["voxels"]
    again = message(drawn(page, wanted=True))
    assert again["pixels"] == first["pixels"] and again["mask"] == edited.tobytes()
    assert list(message(page.run())) == ["head"]


def test_a_truth_can_be_added_and_a_wrong_one_is_refused(page, phantoms, picture):
    files = patient_files(phantoms, masks=True)
    images, masks = files[: len(files) // 2], files[len(files) // 2 :]
    upload(page, images)
    assert "Dice with the truth" not in figures(page)
    upload(page, [(masks[0][0], picture(np.zeros((8, 8), np.uint8)))], "Masks")
    assert not page.exception and any(
        "8×8" in error.value or "no mask" in error.value for error in page.error
    )
    upload(page, masks, "Masks")
    assert not page.error and "Dice with the truth" in figures(page)


def test_a_photograph_is_doubted_before_its_result(page, picture):
    from sklearn.datasets import load_sample_image

    upload(page, [("china.jpg", picture(load_sample_image("china.jpg"), kind="JPEG"))])
    assert any("does not look like" in warning.value for warning in page.warning) and not page.exception


def test_the_page_outlives_every_bad_upload(page, picture, phantoms, zipped):
    bad = [
        [(f"a_{k}.png", b"") for k in range(2_000)],
        [("p.zip", zipped([("a_1.png", bytes(300 << 20))]))],
        [("p.zip", zipped([("../a_1.png", picture(mode="L"))]))],
        [(f"a_{side}.png", picture(mode="L", size=(side, side))) for side in (32, 48)],
        [("a_1.tif", b"")],
        [("a_1.tif", b"text")],
        [("p.zip", b"PK\3\4")],
        [("a.nii", b"x")],
        [("a_1.png", picture(mode="1", size=(20_000, 20_000)))],
        [("a_1.png", picture(mode="RGB", size=(1, 1)))],
        [("a_1_mask.png", picture(mode="L"))],
    ]
    for files in bad:
        upload(page, files)
        assert not page.exception and len(page.error) == 1 and page.error[0].value.count("\n") == 0, files[0][
            0
        ]
    upload(page, patient_files(phantoms, masks=False))
    assert not page.exception and not page.error and figures(page)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"PK\3\4 cut", "truncated"),
        (b"<html>", "no checkpoint"),
        (None, "no such file"),
    ],
)
def test_a_model_that_cant_be_used_is_told(tmp_path, monkeypatch, content, sentence):
    path = tmp_path / "model_best.pth"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("MEDFL_CHECKPOINT", str(path))
    page = AppTest.from_file(ROOT / "deployment" / "app" / "app.py", default_timeout=120).run()
    assert not page.exception and [sentence in error.value for error in page.error] == [True]
    assert "not a medical device" in page.warning[0].value


def test_the_card_tells_a_federation_and_a_central_model_apart(trained):
    from deployment.app.card import card_rows

    checkpoint = load_checkpoint(trained / BEST)
    central = dict(card_rows(checkpoint, "0" * 64, "cpu"))
    assert central["Trained"] == "in one place" and "knows nothing of real scans" in central["Data"]
    assert central["Data"].startswith("phantoms: 7 to train on")
    checkpoint.metadata["origin"] = {
        "kind": "federated",
        "hospitals": 2,
        "labels": ["mercy", "hope"],
        "partition": "own data",
        "strategy": "fedavg",
        "rounds": 5,
        "privacy": {"secure_aggregation": False, "epsilon": None},
    }
    checkpoint.metadata["scores"]["test"] = {
        "volume_dice": {"mean": 0.8, "median": 0.85, "ci95": [0.7, 0.9]},
        "patients": 8,
    }
    federated = dict(card_rows(checkpoint, "0" * 64, "cpu"))
    assert "2 hospitals (mercy, hope), 5 rounds, fedavg" in federated["Trained"]
    assert "no differential privacy" in federated["Trained"]
    assert (
        federated["Test"] == "mean volume Dice 0.800 (95 % interval 0.700 to 0.900), median 0.850, 8 patients"
    )
