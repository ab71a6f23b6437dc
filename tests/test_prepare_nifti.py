"""data/prepare_hospital.py on NIfTI: volumes by a study's folders, labels, and what is told of files that
can't be used."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_phantoms import phantom
from prepared import SCRIPT, pixels, report
from running import ROOT, run_script

import radiology.unpacking
from common import MedFLError
from radiology.collection import collection_in
from radiology.nifti import find_volumes, load_volume
from radiology.preparation import prepare
from radiology.rules import DEFAULT, load_rules
from radiology.studies import plan_studies
from radiology.unpacking import unpack


def write_nifti(path: Path, image: sitk.Image, dtype: type = np.float32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(sitk.GetArrayFromImage(image).astype(dtype)), str(path))
    stored = nibabel.load(path)
    affine = np.eye(4)
    affine[:3, :3] = (
        np.diag([-1, -1, 1]) @ np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    )
    affine[:3, 3] = np.array([-1, -1, 1]) * image.GetOrigin()
    nibabel.save(nibabel.Nifti1Image(np.asarray(stored.dataobj), affine), path)


@pytest.fixture
def volumes(home, tmp_path):
    """Two patients as NIfTI, with a mask of 1; the second has FLAIR alone."""
    for number, name in enumerate(("anna", "bert")):
        (pre, flair, post), truth = phantom(number, slices=8, size=64)
        for kind, image in (
            ("flair", flair),
            ("seg", truth),
            *((("t1", pre), ("t1ce", post)) if name == "anna" else ()),
        ):
            write_nifti(tmp_path / "nifti" / name / f"{name}_{kind}.nii.gz", image)
    return tmp_path / "nifti"


def prepare_nifti(source: Path, *options):
    return run_script(SCRIPT, "--nifti", source, "--out", source.parent / "out", *options)


BARRED = """
import runpy, sys
barred = sys.argv[1].split(",")
class Barred:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in barred:
            raise ModuleNotFoundError(f"No module named {name}", name=name)
sys.meta_path.insert(0, Barred)
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_scans_are_prepared_with_their_own_requirements_alone(volumes):
    """As after `pip install -r requirements-dicom.txt`: every package that the others bring is barred."""

    def named(lock: str) -> set[str]:
        return set(re.findall(r"^([\w-]+)==", (ROOT / "requirements" / lock).read_text(), re.MULTILINE))

    others = (named("dev.lock") | named("torch.lock")) - named("dicom.lock")
    modules = [
        module
        for module, packages in packages_distributions().items()
        if all(re.sub(r"[-_.]+", "-", package).lower() in others for package in packages)
    ]
    assert {"torch", "filelock", "sklearn"} <= set(modules) and "nibabel" not in modules
    command = [sys.executable, "-c", BARRED, ",".join(modules), str(ROOT / SCRIPT)]
    options = ["--nifti", str(volumes), "--out", str(volumes.parent / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "2 of 2 studies" in done.stdout, done.stderr


def test_nifti_volumes_are_prepared_alike(volumes):
    done = prepare_nifti(volumes)
    assert done.returncode == 0 and "2 of 2 studies" in done.stdout and "2 with a mask" in done.stdout, (
        done.stderr
    )
    (_, flair, _), truth = phantom(0, slices=8, size=64)
    name = next(row["pseudonym"] for row in report(volumes) if row["patient_id"] == "anna")
    volume, mask = pixels(volumes.parent / "out" / name)
    wanted = sitk.GetArrayFromImage(truth) > 0
    small = mask[:, 2::4, 2::4] > 0
    assert 2 * (small & wanted).sum() / (small.sum() + wanted.sum()) > 0.97
    assert np.corrcoef(volume[:, 2::4, 2::4, 1].ravel(), sitk.GetArrayFromImage(flair).ravel())[0, 1] > 0.97
    assert not any("anna" in str(p.relative_to(volumes.parent)) for p in (volumes.parent / "out").rglob("*"))


def test_what_names_a_patient_beside_or_in_the_name_of_a_volume_is_not_handed_on(volumes):
    """A series that was not taken had its name quoted on the page, if that held the words of a note."""
    folder = volumes / "bert"
    shutil.copy(folder / "bert_flair.nii.gz", folder / "bert_flair, though Zzyzx moved.nii.gz")
    about = {"PatientName": "Quux^Ada", "PatientID": "4711-0815", "PatientBirthDate": "1954-03-12"}
    about |= {"Manufacturer": "4711 0815", "ManufacturersModelName": "Prisma Ada"}
    (folder / "bert_flair, though Zzyzx moved.json").write_text(json.dumps(about))
    done = prepare_nifti(volumes)
    assert done.returncode == 0 and "2 of 2 studies" in done.stdout, done.stderr
    name = next(row["pseudonym"] for row in report(volumes) if row["patient_id"] == "bert")
    out = volumes.parent / "out"
    about = json.loads((out / name / "volume.json").read_text())
    assert (about["manufacturer"], about["model"]) == (None, None)
    assert "Zzyzx" not in (out / "index.html").read_text()


def change(path: Path, what) -> None:
    """Give a NIfTI file what a function makes of its values and affine."""
    stored = nibabel.load(path)
    data, affine = what(np.asarray(stored.dataobj).copy(), stored.affine.copy())
    nibabel.save(nibabel.Nifti1Image(data, affine), path)


FAULTS = {
    "empty": (lambda data, affine: (data * 0, affine), "seg.nii.gz is empty: no voxel is marked"),
    "labels": (
        lambda data, affine: (data * 4, affine),
        "holds the values 4, but tumour is 1; list those that mean tumour",
    ),
    "moved": (lambda data, affine: (data, affine + np.eye(4, k=3) * 9), "has a different geometry"),
    "smaller": (
        lambda data, affine: (data[:-8], affine),
        "has a different geometry from the volumes beside it",
    ),
}


def test_masks_that_can_not_be_used_are_told_and_the_rest_goes_on(volumes):
    shutil.rmtree(volumes / "anna")
    for name, (spoil, _) in FAULTS.items():
        shutil.copytree(volumes / "bert", volumes / name)
        change(volumes / name / "bert_seg.nii.gz", spoil)
    shutil.copytree(volumes / "bert", volumes / "twice")
    shutil.copy(volumes / "twice" / "bert_seg.nii.gz", volumes / "twice" / "mask.nii.gz")
    shutil.copytree(volumes / "bert", volumes / "cut")
    (volumes / "cut" / "bert_seg.nii.gz").write_bytes(b"cut")
    done = prepare_nifti(volumes)
    assert done.returncode == 0 and "7 of 7 studies" in done.stdout and "1 with a mask" in done.stdout, (
        done.stderr
    )
    rows = report(volumes)
    for name, (_, sentence) in FAULTS.items():
        (why,) = (
            row["why"] for row in rows if row["patient_id"] == name and row["description"] == "bert_seg"
        )
        assert sentence in why and why in done.stderr
    assert sum("2 segmentations claim to be the mask" in row["why"] for row in rows) == 2
    (why,) = (
        row["why"] for row in rows if row["description"].endswith("bert_seg.nii.gz")
    )  # a path: it is no volume
    assert "damaged, or not a NIfTI file" in why
    assert len(list((volumes.parent / "out" / "without_masks").iterdir())) == 6
    rules = volumes.parent / "rules.toml"
    rules.write_text(DEFAULT.read_text().replace("labels = [1]", "labels = [1, 4]"))
    assert "2 with a mask" in prepare_nifti(volumes, "--rules", rules).stdout


def test_files_that_are_no_volumes_are_reported(volumes):
    (volumes / "loose.nii.gz").write_bytes(b"x")
    (volumes / "anna" / "notes.txt").write_text("x")
    flair = nibabel.load(volumes / "bert" / "bert_flair.nii.gz")
    nibabel.save(
        nibabel.Nifti1Image(np.stack([flair.dataobj] * 2, axis=-1), flair.affine),
        volumes / "bert" / "bert_flair.nii.gz",
    )
    (volumes / "anna" / "anna_t1.nii.gz").unlink()
    (volumes / "anna" / "anna_t1ce.nii.gz").unlink()
    (volumes / "anna" / "anna_seg.nii.gz").unlink()
    done = prepare_nifti(volumes)
    why = {Path(row["description"]).name: row["why"] for row in report(volumes)}
    assert "is not in a patient's folder" in why["loose.nii.gz"] and "not a NIfTI file" in why["notes.txt"]
    assert (
        "4 dimensions" in why["bert_flair"]
        and why["bert_seg"] == "the study has no FLAIR"
        and "1 of 2 studies" in done.stdout
    )
    assert "0 with a mask" in done.stdout and "no patient has a mask" in done.stdout


def packed(folder: Path, to: Path, names=lambda path: path.name) -> Path:
    """A folder's files as a ZIP in its place."""
    with zipfile.ZipFile(to, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, names(path))
    shutil.rmtree(folder)
    return to


def test_a_patients_zip_is_read_as_its_folder(volumes):
    shutil.rmtree(volumes / "anna")
    (study,), _ = plan(volumes)
    wanted = prepare(study, load_rules())
    packed(volumes / "bert", volumes / "bert.zip")
    (volumes / "carl.zip").write_bytes(b"PK\3\4cut off")
    done = prepare_nifti(volumes)
    assert done.returncode == 0 and "1 of 1 studies" in done.stdout, done.stderr
    name = next(row["pseudonym"] for row in report(volumes) if row["patient_id"] == "bert")
    assert any("carl.zip can't be unpacked" in row["why"] for row in report(volumes))
    volume, mask = pixels(volumes.parent / "out" / name)
    assert np.array_equal(volume, wanted.volume) and np.array_equal(mask, wanted.mask)
    assert not (volumes.parent / "nifti_private" / "unpacked").exists()
    made = [path.stat().st_mtime_ns for path in (volumes.parent / "out").rglob("*.tif")]
    assert prepare_nifti(volumes).returncode == 0
    assert [path.stat().st_mtime_ns for path in (volumes.parent / "out").rglob("*.tif")] == made


@pytest.mark.parametrize("name", ["../evil.nii", "/evil.nii", "a:evil.nii"])
def test_a_zip_whose_names_lead_out_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(MedFLError, match="points out of the archive; pack it again"):
        unpack(tmp_path / "a.zip", tmp_path / "private" / "a")
    assert not list(tmp_path.rglob("evil*"))


def test_a_zip_that_needs_more_than_the_disk_has_is_told(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.nii", b"x" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(MedFLError, match="the disk has 0.0 GiB free; free the space, or name another"):
        unpack(tmp_path / "a.zip", tmp_path / "private" / "a")


def test_a_zip_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.nii", bytes(2**22))
    monkeypatch.setattr(radiology.unpacking, "BUDGET", 2**20)
    with pytest.raises(MedFLError, match="would unpack to 4 MiB"):
        unpack(tmp_path / "a.zip", tmp_path / "private" / "a")


def plan(root: Path):
    found, refused = find_volumes(root, sorted(p for p in root.rglob("*") if p.is_file()))
    return plan_studies(found, load_rules()), refused


CHANNELS = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}


@pytest.mark.parametrize("kind", ["decathlon", "nnunet", "trees"])
def test_collections_are_read_by_case_and_channel(tmp_path, kind):
    (pre, flair, post), truth = phantom(0, slices=8, size=64)
    each = [sitk.GetArrayFromImage(image).astype(np.float32) for image in (flair, pre, post, post)]
    write_nifti(tmp_path / "one.nii.gz", flair)
    affine = nibabel.load(tmp_path / "one.nii.gz").affine
    (tmp_path / "one.nii.gz").unlink()
    root = tmp_path / "set"
    for case in ("BRATS_001", "BRATS_002"):
        if kind == "decathlon":
            whole = np.stack([volume.transpose(2, 1, 0) for volume in each], axis=-1)
            (root / "imagesTr").mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(whole, affine), root / "imagesTr" / f"{case}.nii.gz")
        elif kind == "nnunet":
            for k, image in enumerate((flair, pre, post, post)):
                write_nifti(root / "imagesTr" / f"{case}_{k:04}.nii.gz", image)
        else:
            for name, image in (("flair", flair), ("t1", pre), ("t1ce", post)):
                write_nifti(root / "images" / case / f"{name}.nii.gz", image)
        labels = (
            root / "labels" / case / "flair.nii.gz"
            if kind == "trees"
            else root / "labelsTr" / f"{case}.nii.gz"
        )
        write_nifti(labels, truth, np.uint8)
    if kind != "trees":
        about = {"modality" if kind == "decathlon" else "channel_names": CHANNELS, "labels": {"tumour": 1}}
        (root / "dataset.json").write_text(json.dumps(about))
    studies, refused = plan(root)
    assert not refused and [study.patient_id for study in studies] == ["BRATS_001", "BRATS_002"]
    for study in studies:
        assert set(study.channels) == {"pre-contrast", "FLAIR", "post-contrast"} and study.mask is not None
        for channel, wanted in (("FLAIR", each[0]), ("pre-contrast", each[1]), ("post-contrast", each[2])):
            assert np.array_equal(sitk.GetArrayFromImage(load_volume(study.channels[channel])), wanted)


def test_what_a_collection_does_not_say_is_asked_for(tmp_path):
    (_, flair, _), _ = phantom(0, slices=8, size=64)
    write_nifti(tmp_path / "imagesTr" / "BRATS_001.nii.gz", flair)
    assert "lies in imagesTr without a dataset.json that says what it shows" in plan(tmp_path)[1][0].why
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": CHANNELS}))
    assert "holds 1 volumes, but dataset.json names 4 channels" in plan(tmp_path)[1][0].why
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(
        MedFLError, match="does not say what the channels show; write it in the form of nnU-Net"
    ):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ({"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}, (1, 2, 3)),
        ({"background": 0, "lesion": 1}, (1,)),
        ({"background": 0, "whole tumor": [1, 2, 3]}, None),
        ({"background": 0, "brain": 1, "tumour": 2}, None),
        ({}, None),
    ],
)
def test_labels_are_taken_where_their_names_are_plain(tmp_path, labels, wanted):
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "FLAIR"}, "labels": labels}))
    collection = collection_in(tmp_path)
    assert collection is not None and collection.tumour_labels() == wanted


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are Unicode there")
def test_folders_of_one_file_and_names_that_are_no_utf_8(volumes):
    (volumes / "bert").rename(os.fsdecode(os.fsencode(volumes) + b"/M\xfcller"))
    for file in list((volumes / "anna").iterdir()):
        unpacked = volumes / "anna" / file.name.removesuffix(".gz") / f"0001_{file.name}"
        unpacked.parent.mkdir()
        file.rename(unpacked)
    done = prepare_nifti(volumes)
    assert done.returncode == 0 and "2 of 2 studies" in done.stdout and "2 with a mask" in done.stdout, (
        done.stdout + done.stderr
    )
    assert {row["patient_id"] for row in report(volumes)} == {"anna", "M\\xfcller"}
    again = prepare_nifti(volumes)
    assert again.returncode == 0 and "2 of 2 studies" in again.stdout, again.stderr
