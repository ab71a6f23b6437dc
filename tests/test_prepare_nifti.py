"""data/prepare_hospital.py on NIfTI: volumes by a study's folders, labels, and what is told of files that
can't be used."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_phantoms import phantom
from prepared import SCRIPT, pixels, report
from running import run_script

from radiology.rules import DEFAULT


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


def change(path: Path, what) -> None:
    """Give a NIfTI file what a function makes of its values and affine."""
    stored = nibabel.load(path)
    data, affine = what(np.asarray(stored.dataobj).copy(), stored.affine.copy())
    nibabel.save(nibabel.Nifti1Image(data, affine), path)


FAULTS = {
    "empty": (lambda data, affine: (data * 0, affine), "seg.nii.gz is empty: no voxel is marked"),
    "labels": (
        lambda data, affine: (data * 4, affine),
        "holds the values 4, and tumour is 1; name those that mean tumour",
    ),
    "moved": (lambda data, affine: (data, affine + np.eye(4, k=3) * 9), "has another geometry"),
    "smaller": (lambda data, affine: (data[:-8], affine), "has another geometry than the volumes beside it"),
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
    assert "damaged, or no NIfTI file" in why
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
    done = prepare_nifti(volumes)
    why = {Path(row["description"]).name: row["why"] for row in report(volumes)}
    assert "lies in no patient's folder" in why["loose.nii.gz"] and "no NIfTI file" in why["notes.txt"]
    assert (
        "4 dimensions" in why["bert_flair"]
        and why["bert_seg"] == "the study has no FLAIR"
        and "1 of 2 studies" in done.stdout
    )
