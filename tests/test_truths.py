"""Corrected masks become the truth of prepared patients: where training finds them, whole, and nobody's is lost."""

import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from common import MedFLError
from dataset import load_dataset
from radiology import truths
from radiology.prepared import content_of, find_patient, find_prepared
from radiology.truths import ChangedMeanwhile, correction, read_log, save_truth, version_of

BY = correction("Dr. Ada", "m_best.pth", "ab" * 32, 0.5)
PERSON = "p0123456789ab"


def write_patient(folder, mask: np.ndarray | None, seed: int = 0, slices: int = 3, side: int = 32) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (slices, side, side, 3), np.uint8)
    for k in range(slices):
        Image.fromarray(pixels[k]).save(folder / f"{folder.name}_{k + 1}.tif")
        if mask is not None:
            Image.fromarray(mask[k]).save(folder / f"{folder.name}_{k + 1}_mask.tif")
    about = {"version": 1, "spacing_mm": [5.0, 1.0, 1.0], "slice_positions_mm": [0.0, 5.0, 10.0]}
    (folder / "volume.json").write_text(json.dumps(about))


def marked(at: int) -> np.ndarray:
    mask = np.zeros((3, 32, 32), np.uint8)
    mask[1, at : at + 4, 5:9] = 255
    return mask


@pytest.fixture
def out(home, tmp_path):
    """Three prepared studies without masks, two of them of one person, and one that trains."""
    for seed, name in enumerate([f"{PERSON}_s00000001", f"{PERSON}_s00000002", "p999999999999_s00000003"]):
        write_patient(tmp_path / "without_masks" / name, None, seed)
    write_patient(tmp_path / "p888888888888_s00000004", marked(3), 9)
    return tmp_path


def save(out, name: str, mask: np.ndarray, by=BY, version: str | None = None, proposal=None):
    patient = find_patient(out, name)
    return save_truth(
        patient,
        mask,
        marked(8) if proposal is None else proposal,
        by,
        content_of(patient.images),
        version_of(patient) if version is None else version,
    )


def test_a_patient_without_masks_comes_to_those_who_train_with_the_log(out):
    name = "p999999999999_s00000003"
    assert [p.name for p in load_dataset(out, progress=False).patients] == ["p888888888888_s00000004"]
    there, saved = save(out, name, marked(10))
    assert there.folder == out / name and not (out / "without_masks" / name).exists()
    dataset = load_dataset(out, progress=False)
    assert np.array_equal(dataset.volume(name)[1], marked(10)) and dataset.spacing(name) == (5.0, 1.0, 1.0)
    (line,) = (out / name / "truth.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["who"], told["model_sha256"], told["pixels"]) == ("Dr. Ada", "ab" * 32, 16)
    assert (told["proposed_pixels"], told["changed_pixels"]) == (16, 16) and told["when"].endswith("Z")
    assert read_log(out / name) == [saved] and saved.former is None


def test_a_second_study_of_somebody_who_trains_is_kept_apart(out):
    first, _ = save(out, f"{PERSON}_s00000001", marked(2))
    second, _ = save(out, f"{PERSON}_s00000002", marked(4))
    assert first.part == "" and second.part == "more_studies"
    assert len(load_dataset(out, progress=False).patients) == 2


def test_a_former_truth_is_kept_and_a_save_after_anothers_asks_first(out):
    name = "p888888888888_s00000004"
    before = version_of(find_patient(out, name))
    save(out, name, marked(10), version=before)
    with pytest.raises(ChangedMeanwhile, match="Dr. Ada saved another truth of p888") as caught:
        save(out, name, marked(20), correction("Bob", "m", "ab" * 32, 0.5), version=before)
    assert np.array_equal(load_dataset(out, progress=False).volume(name)[1], marked(10))
    save(out, name, marked(20), correction("Bob", "m", "ab" * 32, 0.5), version=caught.value.version)
    log = read_log(out / name)
    assert [(line.who, line.former) for line in log] == [("Dr. Ada", ".former/0001"), ("Bob", ".former/0002")]
    for line, mask in zip(log, (marked(3), marked(10))):
        kept = np.asarray(Image.open(out / name / line.former / f"{name}_2_mask.tif"))
        assert np.array_equal(kept, mask[1])
    (out / name / "truth.jsonl").unlink()  # also where the log was moved away no former truth is written over
    assert save(out, name, marked(1))[1].former == ".former/0003"
    dataset = load_dataset(out, progress=False)
    assert np.array_equal(dataset.volume(name)[1], marked(1)) and len(dataset.patients) == 1


def test_masks_of_another_size_or_of_other_slices_are_refused(out):
    name = "p999999999999_s00000003"
    patient = find_patient(out, name)
    slices = content_of(patient.images)
    for wrong in (
        np.zeros((3, 32, 33), np.uint8),
        np.zeros((2, 32, 32), np.uint8),
        np.zeros((32, 32), np.uint8),
    ):
        with pytest.raises(MedFLError, match="3 × 32 × 32"):
            save_truth(patient, wrong, marked(8), BY, slices, "")
    with pytest.raises(MedFLError, match="float64, not 0 and 255"):
        save_truth(patient, marked(8) / 2, marked(8), BY, slices, "")
    Image.new("RGB", (32, 32), (9, 9, 9)).save(patient.images[1])
    with pytest.raises(MedFLError, match="have changed since they were opened"):
        save_truth(patient, marked(8), marked(8), BY, slices, "")
    shutil.rmtree(patient.folder)
    with pytest.raises(MedFLError, match="is not in"):
        save_truth(patient, marked(8), marked(8), BY, slices, "")
    for who in ("", "  ", "x" * 101):
        with pytest.raises(MedFLError, match="enter yours"):
            correction(who, "m", "ab" * 32, 0.5)


def test_two_at_once_lose_nothing(out):
    """Eight readers save one patient at the same moment, each again as long as another was quicker."""
    name, start, conflicts = "p888888888888_s00000004", threading.Barrier(8), []

    def reader(number: int) -> None:
        who = BY.model_copy(update={"who": f"reader {number}"})
        version = version_of(find_patient(out, name))
        start.wait()
        while True:
            try:
                save(out, name, marked(number), who, version=version)
                return
            except ChangedMeanwhile as changed:
                conflicts.append(number)
                version = changed.version

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = read_log(out / name)
    assert sorted(line.who for line in log) == [f"reader {n}" for n in range(8)] and conflicts
    kept = [Image.open(out / name / line.former / f"{name}_2_mask.tif") for line in log[1:]]
    for image, line in zip(kept, log):
        assert np.array_equal(np.asarray(image), marked(int(line.who[-1]))[1])
    assert not list(out.glob(".saving-*"))


@pytest.mark.parametrize("name", ["p999999999999_s00000003", "p888888888888_s00000004"])
def test_a_save_that_breaks_off_leaves_everything_as_it_was(out, name, monkeypatch):
    before = find_patient(out, name)
    content = content_of(before.images + before.masks)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(truths, "_write_log", full)
    with pytest.raises(MedFLError, match="No space left"):
        save(out, name, marked(10))
    after = find_patient(out, name)
    assert after == before and content_of(after.images + after.masks) == content
    assert not list(out.glob(".saving-*"))


def test_a_save_that_was_killed_between_its_renames_is_taken_back(out):
    name = "p888888888888_s00000004"
    dead = out / ".saving-dead" / "old" / "train"
    dead.mkdir(parents=True)
    (out / name).rename(dead / name)
    save(out, "p999999999999_s00000003", marked(10))  # whoever saves next brings it back
    assert {p.name for p in find_prepared(out)} >= {name} and not list(out.glob(".saving-*"))
    assert len(load_dataset(out, progress=False).patients) == 2


def test_a_damaged_log_is_told(out):
    name = "p999999999999_s00000003"
    save(out, name, marked(10))
    with open(out / name / "truth.jsonl", "a", encoding="utf-8") as file:
        file.write('{"version": 1, "who": "x"}\n')
    with pytest.raises(MedFLError, match="move it away"):
        save(out, name, marked(11))
