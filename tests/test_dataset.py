"""dataset.py: every layout, every kind of wrong data, and a cache that is right or built again."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
from common import MedFLError
from dataset import find_dataset, load_dataset, read_patients
from preprocessing import volume_statistics
from scans import cache
from scans.cache import cache_folder

NAMES = ("TCGA_CS_4941_19960909", "TCGA_HT_7473_19970826")
ROOT = Path(dataset.__file__).parent
SCANS = ROOT.parent / "shared" / "lgg-mri-segmentation"


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """A home folder of the test's own, also for the processes that it starts."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    assert Path.home() == tmp_path / "home"


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def patient_pixels(name, slices, side=16):
    """Noise and a rectangle that grows with the slice's number, none in the first: (S, H, W, 3) and (S, H, W)
    uint8."""
    images = np.random.default_rng(sum(name.encode())).integers(
        0, 256, (slices, side, side, 3), dtype=np.uint8
    )
    masks = np.zeros((slices, side, side), np.uint8)
    for i in range(slices):
        masks[i, 2:5, 1 : 1 + i] = 255
    return images, masks


def write_patients(root, names=NAMES, slices=3):
    """Patients as the dataset has them: slices from 1, unpadded, and a table beside the folders."""
    for name in names:
        for i, (image, mask) in enumerate(zip(*patient_pixels(name, slices)), start=1):
            save(root / name / f"{name}_{i}.tif", image)
            save(root / name / f"{name}_{i}_mask.tif", mask)
    (root / "data.csv").write_text("Patient,age\nTCGA_CS_4941,50\n")
    return root


def load(data_dir, **options):
    return load_dataset(data_dir, progress=False, **options)


def caches():
    return sorted(folder for folder in cache_folder().iterdir() if folder.is_dir())


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "kaggle_3m",
        "data/kaggle_3m",
        "lgg-mri-segmentation/kaggle_3m",
        "archive/lgg-mri-segmentation/kaggle_3m",
        "data/lgg-mri-segmentation",
        "data/archive/lgg-mri-segmentation/kaggle_3m",
    ],
)
def test_every_layout_is_found(tmp_path, layout):
    root = write_patients(tmp_path / "scans" / layout)
    (tmp_path / "scans" / ".hidden").mkdir()
    found = load(tmp_path / "scans")
    assert found.root == root and [p.name for p in found.patients] == sorted(NAMES)
    assert load(root).root == root and found.name == "LGG MRI segmentation"


@pytest.mark.parametrize(
    "layout, nearest",
    [
        (("data/kaggle_3m", "data/lgg-mri-segmentation/kaggle_3m"), "data/kaggle_3m"),
        (("b/kaggle_3m", "a/kaggle_3m"), "a/kaggle_3m"),
    ],
)
def test_the_doubled_download_counts_once(tmp_path, layout, nearest):
    for folder in layout:
        write_patients(tmp_path / "scans" / folder)
    found = load(tmp_path / "scans")
    assert found.root == tmp_path / "scans" / nearest and len(found.patients) == len(NAMES) == len(
        found.table
    )


def test_phantoms_give_way_to_real_scans_and_are_called_phantoms_alone(tmp_path):
    phantoms = write_patients(
        tmp_path / "scans" / "phantoms", ["TCGA_CS_PH001_20000101", "TCGA_DU_PH002_20000101"]
    )
    assert load(tmp_path / "scans").name == "phantoms"
    real = write_patients(tmp_path / "scans" / "deeper" / "kaggle_3m")
    assert find_dataset(tmp_path / "scans") == real and find_dataset(phantoms) == phantoms


@pytest.mark.parametrize("other", ["b", "b/lgg-mri-segmentation/kaggle_3m"])
def test_two_different_datasets_are_refused(tmp_path, other):
    write_patients(tmp_path / "scans" / "a")
    second = write_patients(tmp_path / "scans" / other, NAMES[:1])
    with pytest.raises(MedFLError, match="hold different patients"):
        find_dataset(tmp_path / "scans")
    assert find_dataset(second) == second


def test_pictures_below_a_patient_are_no_dataset_of_their_own(tmp_path):
    root = write_patients(tmp_path / "scans")
    save(root / NAMES[0] / "views" / "front.png", np.zeros((8, 8, 3), np.uint8))
    assert find_dataset(root) == root


def test_what_prepared_data_hold_besides_is_passed_over(tmp_path):
    """volume.json, contact sheets in any folder, the page, and the studies that are kept apart."""
    root = write_patients(tmp_path / "scans", ["anna"])
    write_patients(root / "more_studies", ["bert"])
    (root / "anna" / "volume.json").write_text("{}")
    for place in ("anna", "contact_sheets", "."):
        save(root / place / "anna_contact_sheet.png", np.zeros((8, 80, 3), np.uint8))
    (root / "index.html").write_text("")
    found = load(tmp_path)
    assert (
        found.root == root
        and [p.name for p in found.patients] == ["anna"]
        and len(found.patients[0].images) == 3
    )


def test_own_data_takes_the_label_given(tmp_path):
    root = write_patients(tmp_path / "scans", ["anna", "bert", NAMES[0]])
    found = load(root, site="north")
    assert [found.site(name) for name in ("anna", "bert", NAMES[0])] == ["north", "north", "CS"]
    assert found.name == "own data" and load(root).site("anna") == "own"


def of_another_size(mask):
    return lambda root, name: save(root / name / f"{name}_2{mask}.tif", np.zeros((16, 20), np.uint8))


def cut(root, name):
    path = root / name / f"{name}_3.tif"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda root, name: shutil.rmtree(root), "there is no folder"),
        (lambda root, name: [shutil.rmtree(root / n) for n in NAMES], "no patients in"),
        (lambda root, name: (root / name / f"{name}_2_mask.tif").unlink(), "_2.tif has no mask"),
        (lambda root, name: (root / name / f"{name}_2.tif").unlink(), "_2_mask.tif has no slice"),
        (of_another_size(""), "_2.tif is 20×16 pixels"),
        (of_another_size("_mask"), "_2_mask.tif is 20×16 pixels"),
        (cut, "_3.tif can't be read"),
        (
            lambda root, name: save(root / name / f"{name}_1_mask.tif", np.full((16, 16), 7, np.uint8)),
            "has the value 7",
        ),
    ],
)
def test_wrong_data_is_one_sentence_and_leaves_no_cache(tmp_path, spoil, sentence):
    root = write_patients(tmp_path / "scans")
    spoil(root, NAMES[1])
    with pytest.raises(MedFLError, match=sentence) as error:
        load(root)
    assert "\n" not in str(error.value) and ";" in str(error.value) and caches() == []


def test_the_table_counts_what_is_in_the_files(tmp_path):
    found = load(write_patients(tmp_path / "scans", slices=4))
    assert list(found.table) == [
        "patient",
        "site",
        "slices",
        "pixels",
        "tumour_slices",
        "tumour_pixels",
        "tumour_share",
    ]
    for name, row in zip(sorted(NAMES), found.table.itertuples(index=False)):
        assert row[:6] == (name, name[5:7], 4, 4 * 16 * 16, 3, 3 * (1 + 2 + 3))
        assert row.tumour_share == pytest.approx(18 / (4 * 16 * 16))
        assert found.tumour_pixels(name) == [0, 3, 6, 9] and found.site(name) == name[5:7]


def test_volumes_and_statistics_are_those_of_the_files_in_numeric_order(tmp_path):
    found = load(write_patients(tmp_path / "scans", slices=12))
    for patient in found.patients:
        assert [p.stem.split("_")[-1] for p in patient.images] == [str(i) for i in range(1, 13)]
        assert [m.name for m in patient.masks] == [f"{p.stem}_mask.tif" for p in patient.images]
        images, masks = patient_pixels(patient.name, 12)
        volume, truth = found.volume(patient.name)
        assert (
            volume.dtype == truth.dtype == np.uint8
            and not volume.flags.writeable
            and not truth.flags.writeable
        )
        assert np.array_equal(volume, images) and np.array_equal(truth, masks)
        for ours, expected in zip(
            found.statistics(patient.name), volume_statistics(torch.from_numpy(images))
        ):
            assert ours.dtype == torch.float32 and torch.equal(ours, expected)


def test_patients_may_differ_in_size_and_number_of_slices(tmp_path):
    root = write_patients(tmp_path / "scans")
    images, masks = patient_pixels("anna", 5, side=24)
    for i in range(5):
        save(root / "anna" / f"{i}.png", images[i])
        save(root / "anna" / f"{i}_mask.png", masks[i])
    found = load(root)
    assert np.array_equal(found.volume("anna")[0], images) and np.array_equal(found.volume("anna")[1], masks)
    assert np.array_equal(found.volume(NAMES[1])[0], patient_pixels(NAMES[1], 3)[0])


def test_the_cache_is_built_once_and_outside_the_dataset(tmp_path):
    root = write_patients(tmp_path / "scans")
    files = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    load(root)
    built = {p: p.stat().st_mtime_ns for p in caches()[0].iterdir()}
    assert len(caches()) == 1 and len(built) == 4
    load(root)
    assert {p: p.stat().st_mtime_ns for p in caches()[0].iterdir()} == built and len(caches()) == 1
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == files
    assert cache_folder().is_relative_to(tmp_path / "home")


@pytest.mark.skipif(os.name == "nt", reason="modes do not protect there")
def test_a_cache_in_a_folder_that_others_can_open_names_nobody_to_them(tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir(mode=0o755)
    monkeypatch.setenv(cache.CACHE, str(tmp_path / "shared"))
    monkeypatch.setattr(cache, "SETTLED", 0)  # so that files are noted at once
    load(write_patients(tmp_path / "scans", ("anna_smith", "eva_jones")))
    (notes,) = (tmp_path / "shared").glob("*.files.json")
    assert "anna_smith" in notes.read_text()
    assert not [path for path in (tmp_path / "shared").iterdir() if path.stat().st_mode & 0o077]


def test_the_cache_is_built_again_when_a_file_changes_or_is_added(tmp_path):
    root = write_patients(tmp_path / "scans")
    load(root)
    before, image = caches(), root / NAMES[0] / f"{NAMES[0]}_1.tif"
    save(image, np.full((16, 16, 3), 9, np.uint8))
    assert (load(root).volume(NAMES[0])[0][0] == 9).all() and len(caches()) == 2
    write_patients(root, ["TCGA_FG_0001_20000101"])
    assert len(load(root).table) == 3 and len(caches()) == 3 and set(before) < set(caches())


@pytest.mark.parametrize("settled", [-1, cache.SETTLED])
def test_a_mask_replaced_by_one_of_the_same_size_and_time_is_seen(tmp_path, monkeypatch, settled):
    monkeypatch.setattr(cache, "SETTLED", settled)  # -1: what is known of a file is used at once
    root = write_patients(tmp_path / "scans")
    assert load(root).tumour_pixels(NAMES[0])[1] == 3
    mask = root / NAMES[0] / f"{NAMES[0]}_2_mask.tif"
    about = mask.stat()
    save(mask, np.full((16, 16), 255, np.uint8))
    os.utime(mask, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (mask.stat().st_size, mask.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    assert load(root).tumour_pixels(NAMES[0])[1] == 256


def test_files_that_did_not_change_are_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", -1)
    root = write_patients(tmp_path / "scans")
    load(root)
    read = []
    monkeypatch.setattr(cache, "file_sha256", read.append)
    if os.name != "nt":
        load(root)
    assert read == []


def test_one_cache_for_one_content_whatever_label_and_folder(tmp_path):
    names = ("anna", "bert")
    root, copy = (write_patients(tmp_path / folder, names) for folder in ("scans", "copy"))
    sites = [set(load(root, site=label).table["site"]) for label in ("mercy", None, "mercy")]
    assert sites == [{"mercy"}, {"own"}, {"mercy"}] and len(caches()) == 1
    load(copy, site="hope")
    assert len(caches()) == 1


def test_caches_of_what_was_there_before_go_when_nobody_uses_them(tmp_path):
    root, other = write_patients(tmp_path / "scans"), write_patients(tmp_path / "other", slices=2)
    load(other)
    load(root)
    first = caches()
    for folder in first:
        os.utime(folder, (0, 0))
    save(root / NAMES[0] / f"{NAMES[0]}_1.tif", np.full((16, 16, 3), 9, np.uint8))
    load(root)
    kept = set(first) & set(caches())
    assert (
        len(caches()) == 2
        and len(kept) == 1
        and (next(iter(kept)) / "root.txt").read_text() == str(other.resolve())
    )


def test_notes_about_files_that_are_damaged_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", -1)
    root = write_patients(tmp_path / "scans")
    load(root)
    notes = next(cache_folder().glob("*.files.json"))
    notes.write_text("{")
    assert len(load(root).table) == 2


BUILD = """
import dataset, hashlib, sys
from pathlib import Path
from scans import cache
build = cache._build_cache
def build_and_wait(*arguments):
    build(*arguments)
    print("built", flush=True)
    sys.stdin.readline()
cache._build_cache = build_and_wait
found = dataset.load_dataset(Path(sys.argv[1]), progress=False)
print(hashlib.sha256(b"".join(part.tobytes() for p in found.patients for part in found.volume(p.name))).hexdigest())
"""


def test_two_processes_that_build_at_once_both_succeed(tmp_path):
    root = write_patients(tmp_path / "scans")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BUILD, str(root)]
    processes = [
        subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    assert [process.stdout.readline() for process in processes] == [
        "built\n"
    ] * 2  # both, before either renames
    ends = [process.communicate("go\n", timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    found = load(root)
    content = b"".join(part.tobytes() for p in found.patients for part in found.volume(p.name))
    assert ends[0][0] == ends[1][0] == hashlib.sha256(content).hexdigest() + "\n"
    assert len(caches()) == 1  # and nothing half-built beside it


def test_the_real_scans_are_40_patients_and_1361_slices():
    if not SCANS.is_dir():
        pytest.skip("the scans are not on this machine")
    patients = read_patients(find_dataset(SCANS), "own")
    assert len(patients) == 40 and sum(len(p.images) for p in patients) == 1361
    sites = [p.site for p in patients]
    assert {site: sites.count(site) for site in sites} == {"CS": 6, "DU": 16, "EZ": 1, "FG": 5, "HT": 12}
    for patient in patients:
        numbers = [int(p.stem.split("_")[-1]) for p in patient.images]
        assert numbers == list(range(1, len(numbers) + 1))


def test_one_slice_in_two_formats(tmp_path):
    root = write_patients(tmp_path / "kaggle_3m")
    slice_ = next(f for f in sorted(root.rglob("*_1.tif")))
    Image.open(slice_).save(slice_.with_suffix(".png"))
    with pytest.raises(MedFLError, match="the same slice twice"):
        load_dataset(tmp_path, progress=False)
