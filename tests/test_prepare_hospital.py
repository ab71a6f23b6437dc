"""data/prepare_hospital.py: an export of phantoms through the whole chain, as an engineer runs it."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_phantoms import image_of, phantom, scan, small_study, turn, write_series
from PIL import Image
from prepared import SCRIPT, pixels, report
from running import ROOT, run_here, run_script

from common import MedFLError
from dataset import load_dataset
from radiology.geometry import to_uint8
from radiology.preparation import _about
from radiology.prepared import content_of, find_prepared
from radiology.segmentation import write_segmentation
from radiology.series import Series, find_series
from radiology.truths import correction, save_truth

# What an archive writes into its files, and nothing of it may be found again. Maker and model are known to
# travel.
SECRETS = {
    "PatientName": "Zzyzxova^Ludmila",
    "PatientID": "QX-48151623",
    "PatientBirthDate": "19431117",
    "PatientSex": "F",
    "PatientAge": "076Y",
    "PatientAddress": "Wunderbaumweg 77",
    "OtherPatientIDs": "ALT-90210",
    "AccessionNumber": "ACC5550123",
    "InstitutionName": "St. Quibble Infirmary",
    "ReferringPhysicianName": "Nightjar^Otto",
    "StationName": "MRQUUX7",
    "StudyDate": "20190317",
    "StudyTime": "074912.5",
    "SeriesDate": "20190318",
    "AcquisitionDate": "20190319",
    "ContentDate": "20190320",
    "StudyID": "STU7788",
    "DeviceSerialNumber": "SN0042424",
    "OperatorsName": "Gruenspan^Ada",
    "StudyDescription": "NEURO QUUX PROTOCOL",
    "PatientComments": "called twice on the telephone",
}

PREPARED = ("Manufacturer", "ManufacturerModelName")  # the texts that volume.json may hold
TEXTS = ("AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
STANDARD = {
    "MONOCHROME2",
    "ORIGINAL",
    "PRIMARY",
    "DERIVED",
    "LOCALIZER",
    "tumour",
    "MedFL",
    "BINARY",
}  # words that name nobody


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its path, with its content's hash and time."""
    return {
        str(p.relative_to(folder)): f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.stat().st_mtime_ns}"
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def scene(home, tmp_path_factory):
    """An export of four patients, what a run made of it, and what the run printed.

    QX-48151623: three series with different matrices, offsets and tilts, the head moved between them, a mask
    as DICOM SEG on FLAIR, and all that must be left out. TWO: two studies with masks. NOMASK: no mask, no T1
    with contrast. NOFLAIR: T1 only.
    """
    root = tmp_path_factory.mktemp("hospital")
    archive = root / "export"
    (pre, flair, post), truth = phantom(seed=0)
    study, who = "1.2.826.4711", SECRETS
    tilt = np.array(turn(flair, (6, 0, 4), (0, 0, 0)).GetMatrix()).reshape(3, 3)
    flair_seen = scan(flair, 320, 16, tilt)
    paths = write_series(
        archive / "1" / "a",
        flair_seen,
        who,
        study,
        SeriesDescription="AX FLAIR quux",
        SeriesNumber=4,
        slope=0.1,
    )
    mask = sitk.GetArrayFromImage(scan(truth, 320, 16, tilt, nearest=True)) > 0
    (series,), _ = find_series(paths)
    write_segmentation(mask, series, archive / "1" / "seg")
    write_series(
        archive / "1" / "b",
        scan(pre, 256, 24, moved=turn(pre, (3, -2, 5), (4, -3, 5))),
        who,
        study,
        signed=True,
        SeriesDescription="AX T1 SE quux",
        SeriesNumber=3,
    )
    sagittal = [[0, 0, 1], [1, 0, 0], [0, -1, 0]]
    write_series(
        archive / "1" / "c",
        scan(post, 192, 128, sagittal, moved=turn(post, (-2, 2, -4), (-3, 4, 2)), spread=1.1),
        who,
        study,
        SeriesDescription="SAG T1 quux +C",
        SeriesNumber=7,
    )
    write_series(
        archive / "1" / "d",
        scan(flair, 32, 3),
        who,
        study,
        SeriesDescription="LOC quux",
        SeriesNumber=1,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
    )
    write_series(
        archive / "1" / "e",
        scan(flair, 32, 8),
        who,
        study,
        SeriesDescription="CT quux",
        SeriesNumber=8,
        Modality="CT",
    )
    (archive / "1" / "letter.txt").write_text("Dear Dr. Nightjar")
    small_study(archive / "2" / "late", 1, "TWO", "1.2.22", "20210101", channels=(1,))
    small_study(archive / "2" / "early", 2, "TWO", "1.2.21", "20200101", channels=(1,))
    small_study(archive / "3", 3, "NOMASK", "1.2.3", "20200101", mask=False, channels=(0, 1))
    small_study(archive / "4", 4, "NOFLAIR", "1.2.4", "20200101", channels=(0, 2))
    before = tree(archive)
    out = root / "prepared"
    dry = run_script(SCRIPT, "--dicom", archive, "--out", out, "--dry-run")
    after_dry = {p.name for p in root.iterdir()}
    done = run_script(SCRIPT, "--dicom", archive, "--out", out)
    assert done.returncode == 0, done.stderr
    assert tree(archive) == before, "the source was written to"
    wanted = [sitk.Resample(image, flair_seen) for image in (pre, flair, post)]
    return dict(
        root=root,
        archive=archive,
        out=out,
        dry=dry,
        after_dry=after_dry,
        done=done,
        wanted=wanted,
        mask=mask,
        names={row["patient_id"] + row["study"]: row["pseudonym"] for row in report(archive)},
    )


def test_a_dry_run_shows_the_choice_and_writes_nothing(scene):
    assert scene["dry"].returncode == 0 and scene["after_dry"] == {"export"}
    said = scene["dry"].stdout
    assert (
        "4 of 5 studies would be prepared, 3 with a mask; 1 file without a patient; nothing was written"
        in said
    )
    for part in (
        "patient QX-48151623, study 20190317: is prepared",
        "patient NOFLAIR, study 20200101: is left out",
        "the study has no FLAIR",
        "it is a localizer",
        "it is of modality CT, not MR",
        "letter.txt: not a DICOM file",
    ):
        assert part in said, said
    line = next(line for line in said.splitlines() if "SAG T1 quux +C" in line)
    assert "post-contrast" in line and "128 × 192×192" in line


def test_prepared_slices_are_the_phantoms_own(scene):
    """Within the head the median difference is at most 8 of 255 grey
    values for moved channels, 3 for FLAIR."""
    volume, mask = pixels(scene["out"] / scene["names"]["QX-481516231.2.826.4711"])
    assert volume.shape == (16, 256, 256, 3) and volume.dtype == np.uint8
    for channel, bound in ((0, 8), (1, 3), (2, 8)):
        wanted = sitk.GetArrayFromImage(scene["wanted"][channel])
        grid = image_of(wanted, (1, 1, 1))
        grid.SetSpacing((1, 1, 1))
        coarse = sitk.GetArrayFromImage(
            sitk.Resample(grid, scan(grid, 256, 16), sitk.Transform(), sitk.sitkLinear)
        )
        wanted = to_uint8(coarse).astype(int)
        head = wanted[2:-2] > 30
        difference = np.abs(volume[2:-2, ..., channel].astype(int) - wanted[2:-2])[head]
        assert np.median(difference) <= bound, (channel, np.median(difference))
        assert np.corrcoef(volume[2:-2, ..., channel][head], wanted[2:-2][head])[0, 1] > (
            0.99 if channel == 1 else 0.8
        )


def test_the_mask_survives_the_chain(scene):
    """Drawn at 320 pixels, written as DICOM SEG, prepared at 256: compared where it was drawn."""
    _, mask = pixels(scene["out"] / scene["names"]["QX-481516231.2.826.4711"])
    assert set(np.unique(mask)) == {0, 255}
    back = sitk.GetArrayFromImage(scan(image_of(mask > 0, (1, 1, 1)), 320, 16, nearest=True)) > 0
    drawn = scene["mask"]
    assert 2 * (back & drawn).sum() / (back.sum() + drawn.sum()) >= 0.97


def test_no_identifying_value_is_found_in_the_output(scene):
    """Every text of 5 letters or more of every tag of every file, in
    contents and names, but maker and model."""
    values = set()
    for path in (p for p in scene["archive"].rglob("*") if p.is_file() and p.suffix != ".txt"):
        for element in pydicom.dcmread(path, stop_before_pixels=True).iterall():
            if element.VR in TEXTS and element.keyword not in PREPARED:
                for value in element.value if element.VM > 1 else [element.value]:
                    values |= {str(value), *str(value).split("^")}
    values = {v for v in values if len(v) >= 5} - STANDARD
    assert {
        "Zzyzxova",
        "QX-48151623",
        "20190317",
        "074912.5",
        "AX FLAIR quux",
        "1.2.826.4711",
        "SN0042424",
    } <= values
    files = [p for p in scene["out"].rglob("*") if p.is_file()]
    texts = {p: p.read_bytes() + str(p.relative_to(scene["out"])).encode() for p in files}
    assert len(files) > 50
    for value in values:
        for path, content in texts.items():
            assert value.encode() not in content, f"{value} in {path}"


def test_neither_order_nor_times_of_what_is_handed_on_follow_the_patients_numbers(home, tmp_path):
    """Who has a list of those who were prepared could put names to pseudonyms; and a worker that prepares each study
    as it comes would leave its day."""
    archive, out, before = tmp_path / "export", tmp_path / "prepared", time.time()
    for number in range(5):
        small_study(archive / str(number), number, f"P{number}", f"1.2.{number}", "20200101", channels=(1,))
    assert run_script(SCRIPT, "--dicom", archive, "--out", out).returncode == 0
    names = [row["pseudonym"] for row in report(archive) if row["used_as"] == "FLAIR"]
    page = (out / "index.html").read_text(encoding="utf-8")
    assert sorted(names, key=page.index) == sorted(names)
    times = {name: {path.stat().st_mtime for path in (out / name, *(out / name).iterdir())} for name in names}
    assert all(len(one) == 1 and max(one) < before - 86_400 for one in times.values())
    assert len({*map(max, times.values())}) == 5  # another content, another time
    sheets = {path.stat().st_mtime for path in (out / "contact_sheets").iterdir()}
    assert sheets == {*map(max, times.values())}


@pytest.mark.parametrize(
    "typed",
    [
        *("Siemens Zzyzxóva", "QX-48151623", "Avanto 19540312", "1.5T 20190317"),
        *("Li, Avanto", "ZZYZXOVALI", "Avanto lizzyzxova", "Zzyzxo\u0301va", "qx48151623"),
        *("Avanto 12.03.1954", "1954-03-12", "03/12/1954", "Avanto(17.03.2019)"),
        *("Avanto 12.03.54", "540312", "DArcy", "Avanto 山田太郎", "山田"),
    ],
)
def test_a_scanners_tag_in_which_somebody_typed_the_patient_is_left_out(typed):
    series = Series(
        uid="1",
        study_uid="2",
        patient_id="QX-48151623",
        modality="MR",
        description="flair",
        files=(),
        manufacturer=typed,
        model="Prisma",
        person=("Zzyzxóva^Li^D'Arcy=山田^太郎", "19540312", "F"),
        when="20190317074912",
    )
    about = _about(series, sitk.Image(4, 4, 2, sitk.sitkUInt8))
    assert (about["manufacturer"], about["model"]) == (None, "Prisma")


def test_volume_json_holds_geometry_and_scanner_alone(scene):
    about = json.loads((scene["out"] / scene["names"]["QX-481516231.2.826.4711"] / "volume.json").read_text())
    assert about.keys() == {
        "version",
        "spacing_mm",
        "slice_positions_mm",
        "field_strength_t",
        "manufacturer",
        "model",
    }
    assert about["version"] == 1 and about["field_strength_t"] == 1.5
    assert (about["manufacturer"], about["model"]) == ("Phantom Works", "Painter 3")
    between, row, column = about["spacing_mm"]
    assert row == column and len(about["slice_positions_mm"]) == 16
    assert np.diff(about["slice_positions_mm"]) == pytest.approx([between] * 15, abs=2e-3)


def test_every_series_and_every_other_file_is_in_the_report(scene):
    rows = report(scene["archive"])
    series = {
        pydicom.dcmread(p, stop_before_pixels=True).SeriesInstanceUID
        for p in scene["archive"].rglob("*")
        if p.is_file() and p.suffix != ".txt"
    }
    assert len(rows) == len(series) + 1 and all(row["why"] for row in rows)
    used = {row["description"]: row["used_as"] for row in rows if row["patient_id"] == "QX-48151623"}
    assert used["AX FLAIR quux"] == "FLAIR" and used["SAG T1 quux +C"] == "post-contrast"
    assert used["LOC quux"] == used["CT quux"] == ""
    assert [
        "not a DICOM file" in row["why"] for row in rows if row["description"].endswith("letter.txt")
    ] == [True]


def test_notes_are_said_and_stand_on_the_page(scene):
    page = (scene["out"] / "index.html").read_text(encoding="utf-8")
    for sentence in (
        "post-contrast is missing or can&#x27;t be used, so FLAIR stands in",
        "was acquired 7 degrees off",
    ):
        assert sentence in page
    assert "http" not in page and page.count("<article>") == 4
    assert "drawn by a network of MedFL" in scene["done"].stderr
    for name in page.split('src="')[1:]:
        sheet = Image.open(scene["out"] / name.split('"')[0])
        assert sheet.size[1] == 4 * 128 and len(sheet.convert("RGB").getcolors(100_000) or []) > 100


def test_training_reads_one_study_per_patient_with_masks(scene):
    dataset = load_dataset(scene["out"], "mercy", progress=False)
    names = scene["names"]
    assert [p.name for p in dataset.patients] == sorted(
        [names["QX-481516231.2.826.4711"], names["TWO1.2.21"]]
    )
    assert dataset.root == scene["out"] and dataset.name == "own data"
    assert all(sum(dataset.tumour_pixels(patient.name)) for patient in dataset.patients)
    assert (scene["out"] / "more_studies" / names["TWO1.2.22"] / "volume.json").exists()
    assert names["TWO1.2.21"].split("_")[0] == names["TWO1.2.22"].split("_")[0]
    with pytest.raises(MedFLError, match="has no mask"):
        load_dataset(scene["out"] / "without_masks", progress=False)


def test_a_second_run_makes_nothing_anew(scene):
    before = tree(scene["out"])
    assert run_script(SCRIPT, "--dicom", scene["archive"], "--out", scene["out"]).returncode == 0
    unchanged = {k: v for k, v in tree(scene["out"]).items() if k != "index.html"}
    assert unchanged == {k: v for k, v in before.items() if k != "index.html"}


def test_a_broken_off_run_goes_on(scene):
    """What a kill leaves: a folder beside that is half written, and a study that is not there yet."""
    lost = scene["out"] / "more_studies" / scene["names"]["TWO1.2.22"]
    shutil.rmtree(lost)
    (scene["out"] / ".preparing-killed").mkdir()
    (scene["out"] / ".preparing-killed" / "half.tif").write_bytes(b"half")
    before = tree(scene["out"])
    done = run_script(SCRIPT, "--dicom", scene["archive"], "--out", scene["out"])
    assert (
        done.returncode == 0
        and (lost / "volume.json").exists()
        and not (scene["out"] / ".preparing-killed").exists()
    )
    for path, mark in tree(scene["out"]).items():
        if scene["names"]["TWO1.2.22"] not in path and path != "index.html":
            assert before[path] == mark, path


def test_a_patient_who_is_in_the_export_no_more_and_still_in_the_output_is_told(home, tmp_path):
    """Whoever withdrew would train on, on a page that does not show it."""
    for number in range(2):
        small_study(
            tmp_path / "x" / str(number), number, f"P{number}", f"1.2.{number}", "20200101", channels=(1,)
        )
    command = (SCRIPT, "--dicom", tmp_path / "x", "--out", tmp_path / "prepared")
    assert "also holds" not in run_script(*command).stderr
    gone = next(row["pseudonym"] for row in report(tmp_path / "x") if row["patient_id"] == "P0")
    shutil.rmtree(tmp_path / "x" / "0")
    said = run_script(*command).stderr
    assert f"also holds 1 folder of studies that are not among these ({gone})" in said


def test_a_later_export_of_a_patient_who_trains_is_kept_apart(home, tmp_path):
    out, private = tmp_path / "out", tmp_path / "private"
    for number, date in ((1, "20200101"), (2, "20210101")):
        small_study(tmp_path / str(number), number, "A", f"1.2.{number}", date, channels=(1,))
        done = run_script(SCRIPT, "--dicom", tmp_path / str(number), "--out", out, "--private", private)
        assert done.returncode == 0, done.stderr
    assert (
        len(load_dataset(out, progress=False).patients) == 1
        and len(list((out / "more_studies").iterdir())) == 1
    )


def test_a_truth_that_a_person_saved_outlives_every_later_run(home, tmp_path):
    """Also where the study's files changed, which is told; and another study of the person trains no more."""
    out, private, export = tmp_path / "out", tmp_path / "private", tmp_path / "export"
    small_study(export / "1", 1, "A", "1.2.1", "20200101", mask=False, channels=(1,))
    options = (SCRIPT, "--dicom", export, "--out", out, "--private", private)
    assert run_here(*options).returncode == 0
    (patient,) = find_prepared(out)
    assert patient.part == "without_masks"
    mask = np.zeros((8, 256, 256), np.uint8)
    mask[3, 100:110, 100:110] = 255
    by = correction("Ada", "m", "ab" * 32, 0.5)
    save_truth(patient, mask, mask == 0, by, content_of(patient.images), "")
    before = tree(out / patient.name)
    again = run_here(*options)
    assert again.returncode == 0 and "1 with a mask" in again.stdout and "left as it is" not in again.stderr
    os.utime(next(p for p in export.rglob("*") if p.is_file()))
    small_study(export / "2", 2, "A", "1.2.2", "20210101", channels=(1,))
    changed = run_here(*options)
    assert changed.returncode == 0 and "has a truth that a person saved" in changed.stderr, changed.stderr
    assert [p.part for p in find_prepared(out) if p.name != patient.name] == ["more_studies"]
    assert tree(out / patient.name) == before and len(load_dataset(out, progress=False).patients) == 1


def test_a_full_disk_is_told_and_a_second_run_goes_on(home, tmp_path, monkeypatch):
    for number in range(2):
        small_study(
            tmp_path / "export" / str(number),
            number,
            f"P{number}",
            f"1.2.{number}",
            "20200101",
            channels=(1,),
        )
    save, pictures = Image.Image.save, []

    def full(image, path, *options, **named):
        pictures.append(path)
        if len(pictures) > 25:  # in the middle of the second study
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(image, path, *options, **named)

    command = (SCRIPT, "--dicom", tmp_path / "export", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        done = run_here(*command)
    assert (
        done.returncode == 2 and "No space left on device); free the space or change --out" in done.stderr
    ), done.stderr
    (whole,) = (tmp_path / "out").rglob("volume.json")  # the first study, and nothing of the second
    assert (
        len(list(whole.parent.glob("*_mask.tif"))) == 8 == len(list((tmp_path / "out").rglob("*_mask.tif")))
    )
    assert (
        run_here(*command).returncode == 0
        and len(load_dataset(tmp_path / "out", progress=False).patients) == 2
    )


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--dicom", "gone", "--out", "out"), "there is no folder gone"),
        (("--dicom", "empty", "--out", "out"), "empty holds no file"),
        (("--dicom", "full", "--out", "full/out"), "inside the archive"),
        (("--dicom", "full", "--out", "out"), "none of 0 studies"),
        (("--dicom", "full", "--out", "out", "--private", "out/key"), "name another folder with --private"),
        (("--dicom", "full", "--out", "out", "--rules", "gone"), "the rules gone can't be read"),
    ],
)
def test_wrong_options_end_with_a_sentence_and_2(tmp_path, options, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("x")
    done = run_script(SCRIPT, *options, cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "without, sentence",
    [
        (("torch", "flwr", "timm"), "none of 0 studies could be prepared"),
        (
            ("SimpleITK",),
            "this needs SimpleITK, which is not installed; `pip install -r requirements-dicom.txt`",
        ),
    ],
)
def test_it_needs_its_own_requirements_and_nothing_of_the_training(tmp_path, without, sentence):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "a.txt").write_text("x")
    start = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({without!r})); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", start, str(ROOT / SCRIPT), "--dicom", "export", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and sentence in done.stderr, done.stderr


def test_what_a_study_may_carry_is_warned_of(home, tmp_path):
    """Burnt-in text in the corner, a sequence of something else, a damaged file in one study's T1 and in
    another's FLAIR."""
    small_study(tmp_path / "export", 1, "A", "1.2.1", "20200101")
    for path in (tmp_path / "export" / "series1").iterdir():
        file = pydicom.dcmread(path)
        picture = file.pixel_array.copy()
        picture[1:3, 1:13] = 200
        file.PixelData = picture.tobytes()
        file.save_as(path)
    (images, _) = phantom(9, slices=8, size=64)
    shutil.rmtree(tmp_path / "export" / "series2")
    write_series(
        tmp_path / "export" / "series2",
        image_of(
            np.random.default_rng(0).integers(0, 200, (8, 64, 64)), (6, 3.6, 3.6), images[0].GetOrigin()
        ),
        {"PatientID": "A"},
        study="1.2.1",
        SeriesDescription="AX T1 GD",
    )
    small_study(tmp_path / "export" / "b", 2, "B", "1.2.2", "20200101", channels=(1,))
    for folder in ("series0", "b/series1"):
        path = sorted((tmp_path / "export" / folder).iterdir())[3]
        file = pydicom.dcmread(path)
        file.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        file.save_as(path)
        path.write_bytes(path.read_bytes()[:-300])
    done = run_script(SCRIPT, "--dicom", tmp_path / "export", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert (
        "FLAIR may carry burnt-in text" in said and "post-contrast may be poorly aligned with FLAIR" in said
    )
    assert (
        "IM0003 can't be decoded" in said
        and "pre-contrast is missing or can't be used, so FLAIR stands in" in said
    )
    assert "pre-contrast may carry" not in said
    assert "is left out: " in said and "1 of 2 studies" in done.stdout
    assert {row["used_as"]: row["why"] for row in report(tmp_path / "export") if row["patient_id"] == "B"}[
        ""
    ].endswith("export/b/series1/IM0003 can't be decoded (truncated or damaged); export it again")
