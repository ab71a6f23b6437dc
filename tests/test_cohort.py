"""The cohort, pairing and folders of scans/: nobody vanishes without a word, and no mask is taken by chance."""

import os
import shutil
import sys
import time
import unicodedata
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image
from running import run_here

from checkpoint import describe, load_checkpoint, save_checkpoint
from common import MedFLError
from dataset import load_dataset
from deployment.app.cases import add_truth, read_case
from encoders.autoencoder import of_training, unlabelled_volumes
from scans.folders import walk
from scans.naming import group_volumes
from scans.pairing import pair
from scans.pictures import read_mask, read_slice
from split import Split, load_split, make_split, save_split
from transunet import TransUNet


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def patient(folder, seed, name="p_{}", mask="{}_mask", masks=None, slices=3):
    """A patient of its own noise; the tumour is in every slice but the first."""
    drawn = np.random.default_rng(seed).integers(0, 256, (slices, 16, 16, 3), dtype=np.uint8)
    for k, pixels in enumerate(drawn):
        truth = np.zeros((16, 16), np.uint8)
        truth[2:5, 1 : 1 + k] = 255
        stem = name.format(k + 1)
        save(folder / f"{stem}.png", pixels)
        save((masks or folder) / f"{mask.format(stem)}.png", truth)
    return folder


def load(folder):
    found = load_dataset(folder, progress=False)
    return [p.name for p in found.patients], found.notes


def test_a_patient_is_a_path_below_the_root(tmp_path):
    for k in range(4):
        patient(tmp_path / "scans" / f"sub-0{k}" / "anat", k)
    names, notes = load(tmp_path / "scans")
    assert names == [f"sub-0{k}/anat" for k in range(4)] and notes == []
    found = load_dataset(tmp_path / "scans", progress=False)
    assert found.root == tmp_path / "scans" and found.volume("sub-03/anat")[0].shape == (3, 16, 16, 3)


def test_an_archive_of_which_nothing_has_a_mask_says_what_is_missing(tmp_path):
    save(tmp_path / "without_masks" / "anna_1" / "anna_1_1.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(MedFLError, match="are in without_masks, and training needs masks"):
        load(tmp_path)


def test_patients_at_two_depths_all_count(tmp_path):
    for k in range(3):
        patient(tmp_path / "scans" / "kaggle_3m" / f"pat{k}", k)
    patient(tmp_path / "scans" / "extra", 9)
    patient(tmp_path / "scans" / "a" / "b" / "c" / "d" / "e" / "f", 10)
    names, notes = load(tmp_path / "scans")
    assert names == ["a/b/c/d/e/f", "extra", *(f"kaggle_3m/pat{k}" for k in range(3))] and notes == []


def test_names_alike_with_other_scans_are_other_patients(tmp_path):
    for k, site in enumerate(("north", "south")):
        for number in (1, 2):
            patient(tmp_path / site / f"pat{number}", 10 * k + number)
    assert load(tmp_path)[0] == ["north/pat1", "north/pat2", "south/pat1", "south/pat2"]


def test_copies_are_known_by_content_and_told_with_their_number(tmp_path):
    for k in range(3):
        patient(tmp_path / "kaggle_3m" / f"pat{k}", k)
    shutil.copytree(tmp_path / "kaggle_3m", tmp_path / "second" / "kaggle_3m")
    shutil.copytree(tmp_path / "kaggle_3m" / "pat1", tmp_path / "kaggle_3m" / "pat1 - Copy")
    shutil.copytree(tmp_path / "kaggle_3m" / "pat1", tmp_path / "second" / "kaggle_3m" / "pat1 - Copy")
    names, notes = load(tmp_path)
    assert names == ["pat0", "pat1", "pat2"]
    assert (
        len(notes) == 2 and "1 patient in" in notes[0] + notes[1] and "4 patients in" in notes[0] + notes[1]
    )


def test_one_patients_slices_with_two_truths_are_refused(tmp_path):
    patient(tmp_path / "a", 1)
    patient(tmp_path / "b", 1)
    save(tmp_path / "b" / "p_2_mask.png", np.zeros((16, 16), np.uint8))
    with pytest.raises(MedFLError, match="the same slices with different masks"):
        load(tmp_path)


def test_what_is_not_read_is_told(tmp_path):
    patient(tmp_path / "scans" / "anna", 1)
    patient(tmp_path / "scans" / "more_studies" / "anna2", 2)
    patient(tmp_path / "phantoms" / "TCGA_CS_PH001_20000101", 3)
    save(tmp_path / "scans" / "anna" / "views" / "front.png", np.zeros((8, 8), np.uint8))
    save(tmp_path / "overview.png", np.zeros((8, 8), np.uint8))
    names, notes = load(tmp_path)
    assert names == ["anna"]
    for told in ("1 patient kept apart", "2 pictures without a mask", "1 phantom beside real scans"):
        assert any(told in note for note in notes), notes


@pytest.mark.parametrize("slot", ["slice", "mask", "folder"])
def test_a_link_to_nothing_is_named(tmp_path, slot):
    patient(tmp_path / "scans" / "anna", 1)
    patient(tmp_path / "scans" / "bert", 2)
    path = tmp_path / "scans" / {"slice": "anna/p_2.png", "mask": "anna/p_2_mask.png", "folder": "carl"}[slot]
    path.unlink(missing_ok=True)
    path.symlink_to("../.git/annex/objects/x")
    with pytest.raises(MedFLError, match=f"{path.name} is a link to .*git annex get"):
        load(tmp_path / "scans")


def test_a_linked_folder_is_read_and_a_loop_is_not_followed(tmp_path):
    patient(tmp_path / "elsewhere", 1)
    patient(tmp_path / "scans" / "bert", 2)
    (tmp_path / "scans" / "anna").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "scans" / "bert" / "up").symlink_to(tmp_path / "scans")
    assert load(tmp_path / "scans") == (["anna", "bert"], [])


def test_links_that_lead_to_one_another_are_followed_once(tmp_path):
    patient(tmp_path / "a" / "anna", 1)
    patient(tmp_path / "b" / "bert", 2)
    (tmp_path / "a" / "x").symlink_to("../b")
    (tmp_path / "b" / "y").symlink_to("../a")
    assert [str(folder.relative_to(tmp_path)) for folder, _ in walk(tmp_path)] == [
        *(".", "a", "b", "a/anna", "a/x", "b/bert", "b/y", "a/x/bert", "b/y/anna")
    ]
    (tmp_path / "a" / "self").symlink_to("self")
    with pytest.raises(MedFLError, match="self is a link that leads to itself; remove it"):
        load(tmp_path)


@pytest.mark.parametrize(
    "note", [b"version https://git-lfs.github.com/spec/v1\n", b"/annex/objects/MD5E-s9\n"]
)
def test_a_note_in_the_place_of_a_picture_is_named(tmp_path, note):
    path = patient(tmp_path / "scans" / "anna", 1) / "p_2.png"
    path.write_bytes(note)
    with pytest.raises(MedFLError, match="p_2.png only points to the picture"):
        load(tmp_path / "scans")


def test_folders_of_the_system_are_no_patients(tmp_path):
    patient(tmp_path / "anna", 1)
    patient(tmp_path / "@eaDir" / "anna", 2)
    (tmp_path / "lost+found").mkdir(mode=0o000)
    assert load(tmp_path) == (["anna"], [])


@pytest.mark.parametrize("second", ["p_2_mask.tif", "p_2_MASK.png"])
def test_two_masks_of_one_slice_are_refused(tmp_path, second):
    patient(tmp_path / "anna", 1)
    save(tmp_path / "anna" / second, np.full((16, 16), 255, np.uint8))
    with pytest.raises(MedFLError, match="two masks of one slice"):
        load(tmp_path)


@pytest.mark.parametrize(
    "images, masks", [("images", "masks"), ("images", "labels"), ("imagesTr", "labelsTr")]
)
@pytest.mark.parametrize("mask", ["{}", "{}_mask"])
def test_trees_of_images_and_masks_are_read(tmp_path, images, masks, mask):
    for k, name in enumerate(("anna", "bert")):
        patient(tmp_path / images / name, k, mask=mask, masks=tmp_path / masks / name)
    assert load(tmp_path) == (["anna", "bert"], [])
    assert load_dataset(tmp_path, progress=False).table["tumour_pixels"].tolist() == [9, 9]


def test_a_flat_tree_holds_a_patient_for_each_name(tmp_path):
    for k, name in enumerate(("anna_{}", "bert_{}")):
        patient(tmp_path / "images", k, name=name, mask="{}", masks=tmp_path / "masks")
    assert load(tmp_path)[0] == ["anna", "bert"]
    save(tmp_path / "images" / "scan.png", np.zeros((16, 16, 3), np.uint8))
    save(tmp_path / "masks" / "scan.png", np.zeros((16, 16), np.uint8))
    with pytest.raises(MedFLError, match="scan.png has no slice number"):
        load(tmp_path)


def test_a_folder_with_the_slices_of_two_patients_is_refused(tmp_path):
    for k, name in enumerate(("a_{}", "b_{}")):
        patient(tmp_path / "scans" / "all", k, name=name)
    with pytest.raises(MedFLError, match=r"slices with 2 names and the same numbers \(a, b\)"):
        load(tmp_path / "scans")


@pytest.mark.parametrize(
    "names", [("slice{:03d}",), ("IM{}",), ("scan ({})",), ("scan_{}",), ("1.2.840.{}",), ("{}",)]
)
def test_names_of_one_volume(tmp_path, names):
    files = [tmp_path / "b" / (names[0].format(k) + ".png") for k in range(1, 13)]
    for folders in ((), (tmp_path / "b",)):
        ((_, slices),) = group_volumes(files[::-1], folders)
        assert slices == files


def test_a_folder_given_as_a_folder_is_one_patient_and_files_go_by_their_names(tmp_path):
    files = [tmp_path / name for name in ("a_1.png", "a_2.png", "scan.png", "t1.png")]
    assert group_volumes(files, {tmp_path}) == [(tmp_path.name, files)]
    assert [name for name, _ in group_volumes(files)] == ["a", "scan", "t1"]
    several = [tmp_path / name for name in ("a_1.png", "a_2.png", "b_1.png")]
    assert [name for name, _ in group_volumes(several, {tmp_path})] == ["a", "b"]
    with pytest.raises(MedFLError, match="the same slice twice"):
        group_volumes([tmp_path / "a_1.png", tmp_path / "a_1.tif"])


def test_a_mask_without_its_slice_is_known_by_where_it_would_be(tmp_path):
    found = pair([tmp_path / "images" / "a" / "1.png", tmp_path / "masks" / "a" / "2.png"])
    assert list(found.alone) == [tmp_path / "images" / "a" / "2"] and not found.masks


def planar_tiff(path, planes, bits, sample_format=1):
    """An uncompressed TIFF whose channels lie apart, or a grey one: Pillow can't write these."""
    import struct

    data = [p.astype(f"<u{bits // 8}").tobytes() for p in planes]
    count, side = len(data), planes.shape[1]
    start, at = 8, []
    for piece in data:
        at.append(start)
        start += len(piece)
    extra = b"".join(
        struct.pack("<" + f * count, *v)
        for f, v in (
            ("H", [bits] * count),
            ("I", at),
            ("I", [len(d) for d in data]),
            ("H", [sample_format] * count),
        )
    )
    where = [start, start + 2 * count, start + 6 * count, start + 10 * count]
    if count == 1:
        where = [bits, at[0], len(data[0]), sample_format]
    tags = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, count, where[0]),
        (259, 3, 1, 1),
        (262, 3, 1, 2 if count == 3 else 1),
        (273, 4, count, where[1]),
        (277, 3, 1, count),
        (278, 4, 1, side),
        (279, 4, count, where[2]),
        (284, 3, 1, 2 if count == 3 else 1),
        (339, 3, count, where[3]),
    ]
    head = b"II*\0" + struct.pack("<I", start + len(extra)) + b"".join(data) + extra
    path.write_bytes(
        head + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags) + bytes(4)
    )
    return path


def deep_png(path, channels, colour):
    import struct
    import zlib

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = b"".join(b"\0" + bytes(range(200, 200 + 2 * channels)) * 16 for _ in range(16))
    header = struct.pack(">IIBBBBB", 16, 16, 16, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


DEEP = np.arange(3 * 256, dtype=np.uint16).reshape(3, 16, 16) * 80


@pytest.mark.parametrize(
    "make",
    [
        lambda p: planar_tiff(p, DEEP, 16),
        lambda p: planar_tiff(p, DEEP[:1] // 256, 8, sample_format=2),
        lambda p: deep_png(p, 2, 4),
        lambda p: deep_png(p, 3, 2),
        lambda p: deep_png(p, 4, 6),
    ],
    ids=["planar TIFF", "signed TIFF", "grey and alpha", "RGB", "RGBA"],
)
@pytest.mark.parametrize("read", [read_slice, read_mask])
def test_no_more_than_8_unsigned_bits_are_cut_in_silence(tmp_path, make, read):
    with pytest.raises(MedFLError, match=r"a channel, but a slice has 8|pixels of type"):
        read(make(tmp_path / "deep_1.tif"))


def test_8_bits_in_planes_are_read(tmp_path):
    planes = (DEEP // 241).astype(np.uint8)
    assert np.array_equal(
        read_slice(planar_tiff(tmp_path / "a_1.tif", planes, 8)), np.moveaxis(planes, 0, -1)
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_slice_that_may_not_be_read_is_called_so(tmp_path):
    path = patient(tmp_path / "anna", 1) / "p_1.png"
    path.chmod(0)
    with pytest.raises(MedFLError, match="permission"):
        read_slice(path)


def cohort(folder, patients, tumour=lambda k: True):
    for k in range(patients):
        patient(folder / f"pat{k:02d}", k)
        if not tumour(k):
            for mask in (folder / f"pat{k:02d}").glob("*_mask.png"):
                save(mask, np.zeros((16, 16), np.uint8))
    return folder


def test_black_masks_train_nothing_choose_nothing_and_are_counted(tmp_path):
    """All black: refused. Black in the validation part: said, and the last model stays."""
    training = (
        "--image-size",
        32,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--test-fraction",
        0,
        "--val-fraction",
        0.34,
    )
    black = cohort(tmp_path / "black", 6, lambda k: False)
    done = run_here("train_centralized.py", "--data-dir", black, "--out", tmp_path / "o", *training)
    assert done.returncode == 2 and "all masks of the 4 patients to train on are black" in done.stderr
    assert "no tumour in any mask of 6 of 6 patients" in done.stdout
    done = run_here("run_client.py", "--own-data", black, "--name", "mercy", "--check")
    assert done.returncode == 2 and "all masks of the 6 patients" in done.stderr
    split = make_split({f"pat{k:02d}": "own" for k in range(6)}, 0, 0.34, 0)
    some = cohort(tmp_path / "some", 6, lambda k: f"pat{k:02d}" not in split.val)
    done = run_here("train_centralized.py", "--data-dir", some, "--out", tmp_path / "o", *training)
    assert done.returncode == 0, done.stderr
    assert "no tumour in any mask of 2 of 6 patients" in done.stdout and "choose no model" in done.stdout
    best = load_checkpoint(tmp_path / "o" / "transunet_centralized_best.pth")
    assert best.metadata["scores"] == {} and best.metadata["training"]["selected_by"].startswith("nothing")
    done = run_here("evaluate.py", "--checkpoint", best.path, "--data-dir", some, "--split", "val")
    assert done.returncode == 0 and "note: 2 of 2 patients have no tumour in their masks" in done.stdout


def test_a_folder_is_predicted_as_one_volume_whatever_its_slices_are_called(tmp_path):
    """The same slices as slice_1 and as slice1; a slice that is a link to nothing is not left out."""
    model = TransUNet("tiny", 32)
    save_checkpoint(tmp_path / "m.pth", model.state_dict(), describe(model))
    options = ("--checkpoint", tmp_path / "m.pth", "--probabilities", "--out")
    for folder, name in (("a", "slice_{}"), ("b", "slice{}"), ("c", "{}_of_anna")):
        patient(tmp_path / "in" / folder, 1, name=name)
        done = run_here("predict.py", tmp_path / "in" / folder, *options, tmp_path / folder)
        assert done.returncode == 0 and "3 slices segmented in 1 volume" in done.stdout, done.stderr
    shown = [
        [np.asarray(Image.open(path)) for path in sorted((tmp_path / folder).glob("*_probability.png"))]
        for folder in "abc"
    ]
    assert np.array_equal(shown[0], shown[1]) and np.array_equal(shown[0], shown[2])
    loose = sorted((tmp_path / "in" / "b").glob("slice?.png"))
    done = run_here("predict.py", *loose, *options, tmp_path / "d")
    assert "3 slices segmented in 1 volume" in done.stdout
    path = tmp_path / "in" / "b" / "slice2.png"
    path.unlink()
    path.symlink_to("gone")
    for given in (path.parent, path):
        done = run_here("predict.py", given, *options, tmp_path / "e")
        assert done.returncode == 2 and "is a link to gone" in done.stderr


def test_masks_of_0_and_1_and_with_a_palette_are_read_and_told(tmp_path):
    patient(tmp_path / "anna", 1)
    before = load_dataset(tmp_path, progress=False).volume("anna")[1].copy()
    for k, truth in enumerate(before, start=1):
        picture = Image.fromarray((truth // 255).astype(np.uint8))
        if k == 2:
            picture = Image.fromarray(truth // 255, mode="P")
            picture.putpalette([0, 0, 0, 200, 30, 30])
        picture.save(tmp_path / "anna" / f"p_{k}_mask.png")
    found = load_dataset(tmp_path, progress=False)
    assert np.array_equal(found.volume("anna")[1], before)
    assert found.notes == ["2 masks with 0 and 1, or a palette, instead of 0 and 255: 1 is read as 255"]
    save(tmp_path / "anna" / "p_3_mask.png", np.full((16, 16), 2, np.uint8))
    with pytest.raises(MedFLError, match="p_3_mask.png has the value 2, .* with 255 for what is outlined"):
        load(tmp_path)


@pytest.mark.parametrize(
    "visits",
    [
        ("sub-01/ses-1/anat", "sub-01/ses-2/anat"),
        ("sub-01/ses-1", "sub-01/ses-2"),
        ("sub-01_ses-1", "sub-01_ses-2"),
        ("anna/visit_1", "anna/visit_2"),
        ("Patient-001/week-000-1", "Patient-001/week-044"),
        ("P_0003_Timepoint_1", "P_0003_Timepoint_2"),
        ("ses-1/sub-01", "ses-2/sub-01"),
        ("sub-01/anat", "sub-01/flair"),
    ],
)
def test_visits_of_a_person_count_once_and_that_is_told(tmp_path, visits):
    for k, visit in enumerate(visits):
        patient(tmp_path / visit, k)
    patient(tmp_path / "sub-02" / "ses-1", 5)
    names, notes = load(tmp_path)
    assert names == sorted((visits[0], "sub-02/ses-1")), names
    assert "1 further visit of 1 patient" in notes[0] and visits[1] in notes[0], notes


def test_who_has_no_visits_keeps_the_name(tmp_path):
    names = ["north/pat1", "session_anna", "sesame", "south/pat1", "visitor", "week1", "week2"]
    for k, name in enumerate(names):
        patient(tmp_path / name, k)
    assert load(tmp_path) == (sorted(names), [])


@pytest.mark.parametrize("suffix", ["_seg", "-label", "_Tumor"])
def test_masks_of_another_name_are_read_where_it_is_said_and_asked_about_where_not(tmp_path, suffix):
    patient(tmp_path / "anna", 1, mask="{}" + suffix)
    with pytest.raises(
        MedFLError,
        match=f"anna holds slices without masks .*if those are the masks, give --mask-suffix={suffix}",
    ):
        load(tmp_path)
    found = load_dataset(tmp_path, progress=False, mask_suffix=suffix)
    assert found.table["tumour_pixels"].tolist() == [9]
    done = run_here(
        "run_client.py", "--own-data", tmp_path, "--name", "mercy", "--check", f"--mask-suffix={suffix}",
        "--server", "127.0.0.1:9",
    )  # fmt: skip
    assert "1 patient, 3 slices" in done.stdout and "the data are fine" in done.stderr
    done = run_here("run_client.py", "--own-data", tmp_path, "--name", "m", "--mask-suffix", "_seg.png")
    assert done.returncode == 2 and "without its .png" in done.stderr


def test_unlabelled_slices_are_those_of_no_mask(tmp_path):
    patient(
        tmp_path / "trees" / "images" / "sub-1", 1, masks=tmp_path / "trees" / "labels" / "sub-1", mask="{}"
    )
    patient(
        tmp_path / "trees" / "images" / "sub-2", 2, masks=tmp_path / "trees" / "labels" / "sub-2", mask="{}"
    )
    assert sum(map(len, unlabelled_volumes(tmp_path / "trees"))) == 6
    one = of_training(Split(0, ("sub-2",), (), ()))
    assert sum(map(len, unlabelled_volumes(tmp_path / "trees", reads=one))) == 3
    patient(tmp_path / "seg" / "sub-01" / "anat", 1, mask="{}_seg")
    one = of_training(Split(0, ("sub-01/anat",), (), ()))
    assert sum(map(len, unlabelled_volumes(tmp_path / "seg", "_seg", one))) == 3


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("x.dcm", "no patients .*it holds DICOM files: prepare them with .*--dicom FOLDER --out PREPARED"),
        (
            "flair.nii.gz",
            "no patients .*it holds NIfTI or similar volumes: prepare them with .*--nifti FOLDER",
        ),
        ("archive.zip", "no patients .*it holds an archive: unpack it"),
        ("p_1.bmp", "no patients .*formats that MedFL does not read: save them as TIFF or PNG"),
    ],
)
def test_what_lies_there_instead_of_slices_is_named(tmp_path, name, sentence):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / name).write_bytes(b"x")
    with pytest.raises(MedFLError, match=sentence):
        load(tmp_path)
    patient(tmp_path / "bert", 1)
    names, notes = load(tmp_path)
    assert names == ["bert"] and "1 file in formats that are not slices" in notes[0]
    with pytest.raises(MedFLError, match="is a file, but patients lie in a folder"):
        load(tmp_path / "anna" / name)
    with pytest.raises(MedFLError, match="did not replace the ~"):
        load(Path("~/scans"))


def test_inverted_masks_and_folders_of_another_split_are_told(tmp_path):
    for k, part in enumerate(("train", "test")):
        patient(tmp_path / part / f"pat{k}", k)
    for path in (tmp_path / "train" / "pat0").glob("*_mask.png"):
        save(path, 255 - np.asarray(Image.open(path)))
    notes = " ".join(load(tmp_path)[1])
    assert "the folders test and train are not used as a split" in notes
    assert "more than half of all pixels are tumour in the masks of 1 of 2 patients" in notes


def test_accents_written_in_two_ways_are_one_name(tmp_path):
    folder = patient(tmp_path / "anna", 1, name="é_{}")
    for path in list(folder.iterdir()):
        form = "NFD" if "mask" in path.name else "NFC"
        path.rename(path.with_name(unicodedata.normalize(form, path.name)))
    assert load_dataset(tmp_path, progress=False).table["tumour_pixels"].tolist() == [9]


@pytest.mark.parametrize("in_trees", [True, False])
def test_one_patient_in_two_parts_of_another_split_is_refused(tmp_path, in_trees):
    for k, (part, tens) in enumerate((("train", ""), ("val", "1"))):
        for name in ("anna", "bert"):
            slices = f"{name}_{tens}{{}}"
            if in_trees:
                patient(tmp_path / part / "images", k, slices, "{}", tmp_path / part / "masks")
            else:
                patient(tmp_path / part / name, k, slices)
    with pytest.raises(
        MedFLError, match="train/anna and val/anna seem to be one patient in two parts .*; move all slices"
    ):
        load(tmp_path)


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are Unicode there")
def test_names_that_are_no_utf_8_are_read(tmp_path):
    for k, name in enumerate((b"M\xfcller", b"B\xf6hm")):
        patient(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe4rzte/" + name)), k)
    names, _ = load(tmp_path)
    assert names == ["B\\xf6hm", "M\\xfcller"]
    save_split(split := make_split(dict.fromkeys(names, "own"), 0, 0.0, 0.0), tmp_path / "split.json")
    assert load_split(tmp_path / "split.json", set(names)) == split


@pytest.mark.parametrize(
    "end", [" (1)", " - Copy", " - Kopie (2)", " copy", " (Ann's conflicted copy)", "(1)"]
)
def test_a_copy_of_a_mask_is_a_mask(tmp_path, end):
    copy = patient(tmp_path / "anna", 1) / f"p_2_mask{end}.png"
    shutil.copy(tmp_path / "anna" / "p_2_mask.png", copy)
    with pytest.raises(MedFLError, match="are two masks of one slice"):
        load(tmp_path)
    (tmp_path / "anna" / "p_2_mask.png").unlink()
    assert load_dataset(tmp_path, progress=False).table["tumour_pixels"].tolist() == [9]
    files = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "anna").iterdir())]
    assert (read_case(files).truth > 0).sum() == 9
    case = read_case([file for file in files if "mask" not in file[0]])
    assert (add_truth(case, [file for file in files if "mask" in file[0]]) > 0).sum() == 9


@pytest.mark.parametrize(
    "name", ["p_2 - Copy", "p_2 copy 3", "p_2 Kopie", "p_2 (conflicted copy 2026-01-02)"]
)
def test_a_copy_of_a_slice_is_the_slice_twice(tmp_path, name):
    folder = patient(tmp_path / "anna", 1)
    for path in folder.glob("*_mask.png"):
        path.unlink()
    shutil.copy(folder / "p_2.png", folder / f"{name}.png")
    with pytest.raises(MedFLError, match="are the same slice twice"):
        group_volumes(sorted(folder.iterdir()), {folder})


def test_what_medfl_wrote_among_the_scans_is_not_read_and_told(tmp_path):
    patient(tmp_path / "anna", 1)
    save(tmp_path / "models" / "centralized_curves.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "models" / "split.json").write_text("{}")
    save(tmp_path / "predictions" / "p_1_mask.png", np.zeros((16, 16), np.uint8))
    (tmp_path / "predictions" / "predictions.csv").write_text("file")
    (tmp_path / "split.json").write_text(
        "{}"
    )  # beside the patients, and in a patient's own folder: they are read
    (tmp_path / "anna" / "predictions.csv").write_text("file")
    names, notes = load(tmp_path)
    assert names == ["anna"] and notes == ["2 folders written by MedFL (a run, predictions): not read"]


def test_a_second_patients_masks_do_not_mix_with_the_firsts(tmp_path):
    """Slices of two patients have one name; the same patient again takes the place of its own masks."""
    model = TransUNet("mini", 32)
    save_checkpoint(tmp_path / "m.pth", model.state_dict(), describe(model))
    for number, name in enumerate(("anna", "bert")):
        patient(tmp_path / name, number, name="slice_{}")
    codes = []
    for name in ("anna", "anna", "bert"):
        done = run_here(
            "predict.py", tmp_path / name, "--checkpoint", tmp_path / "m.pth", "--out", tmp_path / "o"
        )
        codes.append(done.returncode)
    assert codes == [0, 0, 2] and "holds a mask of another slice called slice_" in done.stderr


def test_trees_in_each_patients_folder_are_paired_in_time():
    files = [
        PurePosixPath(f"/d/p{patient}/{tree}/{number}.png")
        for patient in range(2_000)
        for tree in ("images", "masks")
        for number in range(5)
    ]
    began = time.process_time()
    assert len(pair(files).masks) == 10_000
    assert time.process_time() - began < 10


def test_a_picture_of_one_column_is_refused(tmp_path):
    Image.new("RGB", (1, 64)).save(tmp_path / "p_1.png")
    with pytest.raises(MedFLError, match="1×64 pixels, too small"):
        read_slice(tmp_path / "p_1.png")
