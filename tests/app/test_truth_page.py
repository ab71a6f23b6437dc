"""The page closes the loop: a prepared patient without masks is opened, its proposal corrected and saved, and what is
trained then is better on that patient. Without a browser."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from running import ROOT, run_here
from scipy.ndimage import binary_dilation
from streamlit.testing.v1 import AppTest
from test_page import APP, close, drawn, figures, upload

from checkpoint import load_checkpoint
from dataset import load_dataset
from evaluation.scoring import score_patients
from federation.hospital.data import HospitalData
from federation.hospital.identity import Identity
from federation.protocol.settings import FederationSettings

pytestmark = pytest.mark.slow
MODEL = ROOT / "deployment" / "app" / "samples" / "phantom_model.pth"


@pytest.fixture
def hospital(phantoms, tmp_path, monkeypatch):
    """The folder of a hospital with three patients who train and one without masks; and the masks that its reader
    draws for that one: wider by two pixels than what the phantoms' model would outline."""
    out, truth, patients = (
        tmp_path / "prepared",
        tmp_path / "truth",
        load_dataset(phantoms, progress=False).patients,
    )
    for patient in patients[:4]:
        shutil.copytree(patient.images[0].parent, out / patient.name)
    name = patients[1].name
    apart = out / "without_masks" / name
    apart.parent.mkdir()
    (out / name).rename(apart)
    truth.mkdir()
    for mask in apart.glob("*_mask.tif"):
        wider = binary_dilation(np.asarray(Image.open(mask)) > 0, iterations=2)
        Image.fromarray(wider * np.uint8(255)).save(truth / mask.name)
        mask.unlink()
    slices = len(list(apart.glob("*.tif")))
    about = {
        "version": 1,
        "spacing_mm": [5.0, 1.0, 1.0],
        "slice_positions_mm": [5.0 * k for k in range(slices)],
    }
    (apart / "volume.json").write_text(json.dumps(about))
    monkeypatch.setenv("MEDFL_DATA", str(out))
    monkeypatch.setenv("MEDFL_CHECKPOINT", str(MODEL))
    return out, name, truth


def page() -> AppTest:
    return AppTest.from_file(APP, default_timeout=120).run()


def opened(shown: AppTest, name: str | None = None) -> AppTest:
    """The page with a patient of the list open, the first where none is named."""
    if name is not None:
        shown.selectbox(key="patient").set_value(name)
    return shown.button(key="open-patient").click().run()


def corrections(truth, name: str) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(truth.glob(f"{name}*_mask.tif"))]


def test_from_a_patient_without_masks_to_a_model_that_is_better_on_it(hospital, tmp_path):
    out, name, truth = hospital
    shown = page()
    listed = shown.selectbox(key="patient").options
    assert not shown.exception and listed[0].startswith(name) and "no mask yet" in listed[0]
    opened(shown)
    assert "Volume" in figures(shown) and "Dice with the truth" not in figures(shown)
    upload(shown, corrections(truth, name), "A corrected mask")
    shown.text_input(key="who").set_value("Dr. Ada").run()
    shown.button(key="save").click().run()
    assert not shown.session_state["unsaved"]
    assert not shown.exception and not shown.error and shown.success[0].value.startswith("Saved in"), (
        shown.error
    )
    (line,) = (out / name / "truth.jsonl").read_text().splitlines()
    assert json.loads(line)["who"] == "Dr. Ada" and json.loads(line)["model"] == MODEL.name
    assert not list((out / "without_masks").iterdir())

    dataset = load_dataset(out, progress=False)
    wanted = np.stack([np.asarray(Image.open(truth / f"{path.stem}_mask.tif")) for path in
                       next(p for p in dataset.patients if p.name == name).images])  # fmt: skip
    assert np.array_equal(dataset.volume(name)[1], wanted)
    proposal = json.loads(line)["proposed_pixels"]
    assert json.loads(line)["pixels"] == np.count_nonzero(wanted) != proposal
    own = Identity(
        label="mercy", cid=None, data=out, device="cpu", medfl="", models=tmp_path / "models", code="0" * 64
    )
    at_hospital = HospitalData(own, FederationSettings(), 0)
    assert np.array_equal(at_hospital.dataset.volume(name)[1], wanted)
    assert name in at_hospital.split.part("all")

    everybody = [patient.name for patient in dataset.patients]
    split = {"version": 1, "seed": 0, "train": [name], "val": [], "test": sorted({*everybody} - {name})}
    (tmp_path / "split.json").write_text(json.dumps(split))
    before = load_checkpoint(MODEL)
    done = run_here(
        "train_centralized.py", "--data-dir", out, "--init", MODEL, "--split-file", tmp_path / "split.json",
        "--out", tmp_path / "more", "--model", before.model.name, "--image-size", before.model.image_side,
        "--batch-size", 4, "--epochs", 8, "--ema-decay", 0.5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dice = [
        score_patients(checkpoint.model, dataset, [name], 0.5)[0]["dice"]
        for checkpoint in (before, load_checkpoint(tmp_path / "more" / "transunet_centralized_best.pth"))
    ]
    assert dice[1] > dice[0] + 0.05, dice


def test_the_least_sure_are_at_the_top_and_it_is_measured_once(hospital, monkeypatch):
    out, name, _ = hospital
    others = [path for path in sorted(out.iterdir()) if path.is_dir() and path.name.startswith("TCGA")][:2]
    for folder in others:
        folder.rename(out / "without_masks" / folder.name)
        for mask in (out / "without_masks" / folder.name).glob("*_mask.tif"):
            mask.unlink()
    shown = page()
    assert all("not yet shown" in option for option in shown.selectbox(key="patient").options)
    shown.button(key="measure").click().run()
    assert not shown.exception and not shown.error
    (file,) = (out / ".medfl-sureness").iterdir()
    values = {name: value for name, (_, value) in json.loads(file.read_text())["patients"].items()}
    without = [path.name for path in (out / "without_masks").iterdir()]
    listed = [option.split(":")[0] for option in shown.selectbox(key="patient").options]
    assert len(values) == len(listed) == 4 and listed[:3] == sorted(without, key=lambda n: values[n])
    monkeypatch.setattr("inference.probability", lambda *_: pytest.fail("it was measured already"))
    assert "measure" not in [button.key for button in page().button]


def test_two_readers_of_one_patient_lose_nothing_and_see_nothing_of_each_other(hospital):
    out, name, truth = hospital
    one, two = opened(page()), opened(page())
    upload(one, corrections(truth, name), "A corrected mask")
    assert "edited" not in two.session_state
    drawn(two, threshold=0.05)
    for reader, shown in (("Ada", one), ("Bob", two)):
        shown.text_input(key="who").set_value(reader).run()
    assert one.text_input(key="who").value == "Ada"
    one.button(key="save").click().run()
    assert one.success
    two.button(key="save").click().run()
    assert not two.success and "Ada saved another truth" in two.error[0].value
    two.button(key="save").click().run()
    assert two.success and not two.error
    log = [json.loads(line) for line in (out / name / "truth.jsonl").read_text().splitlines()]
    assert [line["who"] for line in log] == ["Ada", "Bob"]
    kept = out / name / log[1]["former"]
    for path in truth.glob("*_mask.tif"):
        assert np.array_equal(np.asarray(Image.open(kept / path.name)), np.asarray(Image.open(path)))


def test_components_are_switched_and_what_is_wrong_is_told(hospital, picture):
    out, name, _ = hospital
    shown = opened(page())
    drawn(shown, threshold=0.3)
    switches = [box for box in shown.checkbox if "cm³" in box.label]
    before = figures(shown)
    assert switches and before["Volume"].endswith("cm³") and "to" in before["Volume, 80 %"]
    assert before["Perpendicular diameters"].endswith("mm")
    for box in switches:
        box.uncheck()
    shown.run()
    assert figures(shown)["Tumour"] == "0 pixels" and figures(shown)["Volume"] == "0.0 cm³"
    assert shown.button(key="save").disabled  # nothing is saved as "no tumour" by mistake
    shown.checkbox(key="no_tumour").check().run()
    shown.button(key="save").click().run()
    assert "enter yours" in shown.error[0].value and not (out / name).exists()
    masks = [(f"{name}_1_mask.png", picture(np.zeros((8, 8), np.uint8)))]
    upload(shown, masks, "A corrected mask")
    assert any("has no mask" in error.value or "8×8" in error.value for error in shown.error)
    assert "edited" not in shown.session_state and not shown.exception
    close(shown)
    assert "case" in shown.session_state and any("was not saved" in told.value for told in shown.warning)
    shown.button(key="stay").click().run()
    assert "case" in shown.session_state and not any("was not saved" in told.value for told in shown.warning)
    close(shown)
    shown.button(key="lose").click().run()
    assert "case" not in shown.session_state and not shown.exception
    left = ("saved", "save_refusal", "edit_refusal", "components_of", "edited", "prediction")
    assert not [kept for kept in left if kept in shown.session_state]


@pytest.mark.parametrize(
    ("folder", "told"), [("nothing", "there is no folder"), (".", "There is no patient")]
)
def test_a_folder_without_patients_is_told(tmp_path, monkeypatch, folder, told):
    monkeypatch.setenv("MEDFL_DATA", str(tmp_path / folder))
    monkeypatch.setenv("MEDFL_CHECKPOINT", str(MODEL))
    shown = page()
    assert not shown.exception
    assert any(told in text.value for text in [*shown.error, *shown.caption])
    assert any(button.key == "phantom_1" for button in shown.button)
