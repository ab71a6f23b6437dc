"""data/make_phantoms.py: the download's layout, the same bytes for the same seed, and a task that a threshold
can't do."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import ROOT, MedFLError
from phantoms import patients
from phantoms.patients import make_phantoms
from preprocessing import apply_statistics, volume_statistics
from scans.naming import is_mask, numeric_order
from scans.pictures import read_mask, read_volume

PATIENTS, SLICES, SIZE = 14, 10, 64


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("cohort"), PATIENTS, SLICES, SIZE, seed=0)


def folders(root: Path) -> list[Path]:
    """The patients' folders in the order in which they were made."""
    return sorted((f for f in root.iterdir() if f.is_dir()), key=lambda f: f.name.split("_")[2])


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A patient's volume (S, H, W, 3) uint8 and masks (S, H, W) bool."""
    slices = numeric_order([f for f in folder.iterdir() if not is_mask(f)])
    masks = [read_mask(f.with_name(f"{f.stem}_mask.tif")) for f in slices]
    return read_volume(slices), np.stack(masks) > 0


def contents(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def test_layout_is_the_downloads(cohort: Path) -> None:
    assert cohort.name == "kaggle_3m"
    assert sorted(f.name for f in cohort.parent.iterdir()) == ["kaggle_3m"]  # nothing temporary stays
    assert len(folders(cohort)) == PATIENTS
    for number, folder in enumerate(folders(cohort), start=1):
        found = re.fullmatch(r"TCGA_(CS|DU|FG|HT)_PH(\d{3})_(\d{4})(\d{2})(\d{2})", folder.name)
        assert found and int(found[2]) == number and 1 <= int(found[4]) <= 12 and 1 <= int(found[5]) <= 31
        count = len(list(folder.iterdir())) // 2
        assert 0.7 * SLICES <= count <= 1.3 * SLICES
        assert {f.name for f in folder.iterdir()} == {
            f"{folder.name}_{n}{end}" for n in range(1, count + 1) for end in (".tif", "_mask.tif")
        }


def test_pixels_are_the_downloads(cohort: Path) -> None:
    folder = folders(cohort)[0]
    for suffix, mode in ((".tif", "RGB"), ("_mask.tif", "L")):
        with patients.Image.open(folder / f"{folder.name}_5{suffix}") as picture:
            assert (picture.format, picture.mode, picture.size) == ("TIFF", mode, (SIZE, SIZE))
            assert picture.info["compression"] == "raw"
    assert all(set(np.unique(read_mask(f))) <= {0, 255} for f in folder.glob("*_mask.tif"))


def test_table_has_a_row_per_patient(cohort: Path) -> None:
    lines = (cohort / "data.csv").read_text().splitlines()
    assert lines[0].startswith("Patient,RNASeqCluster,") and lines[0].endswith(",ethnicity,death01")
    assert [line.rstrip(",") for line in lines[1:]] == [f.name.rpartition("_")[0] for f in folders(cohort)]
    assert {line.count(",") for line in lines} == {17}


def test_every_patient_has_slices_with_and_without_tumour(cohort: Path) -> None:
    shares, with_tumour = [], []
    for folder in folders(cohort):
        truth = read(folder)[1]
        assert truth.any() and not truth[0].any() and not truth[-1].any()
        shares.append(truth.mean())
        with_tumour.append(truth.any(axis=(1, 2)).mean())
    assert 0.004 < np.mean(shares) < 0.025 and max(shares) > 3 * min(shares)
    assert 0.2 < np.mean(with_tumour) < 0.55


@pytest.mark.parametrize("seed", range(5))
def test_smallest_numbers_still_hold_a_tumour(tmp_path: Path, seed: int) -> None:
    truth = read(folders(make_phantoms(tmp_path, 1, 4, 32, seed))[0])[1]
    assert truth.any() and not truth.any(axis=(1, 2)).all()


def test_lesion_stands_out_in_flair_more_than_before_contrast(cohort: Path) -> None:
    for folder in folders(cohort):
        volume, truth = read(folder)
        normalised = apply_statistics(
            torch.from_numpy(volume), *volume_statistics(torch.from_numpy(volume))
        ).numpy()
        before, flair = (normalised[:, channel][truth].mean() for channel in (0, 1))
        assert flair > before or np.array_equal(volume[..., 0], volume[..., 1])


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        contents(make_phantoms(tmp_path / name, 2, 4, 32, seed))
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert not {v for k, v in first.items() if not k.endswith("_mask.tif")} & {
        v for k, v in other.items() if k.endswith(".tif")
    }


def test_patient_does_not_depend_on_their_number(cohort: Path, tmp_path: Path) -> None:
    few = contents(make_phantoms(tmp_path, 4, SLICES, SIZE, seed=0))
    many = contents(cohort)
    assert len(few) > 4 and all(many[name] == data for name, data in few.items() if name != "data.csv")


def test_sites_are_in_proportion_and_large_enough_to_split() -> None:
    for count in (12, 24, 109):
        sites = patients._sites(count)
        assert min(sites.count(site) for site in set(sites)) >= 3
    assert {site: sites.count(site) for site in sites} == {"DU": 45, "HT": 34, "CS": 16, "FG": 14}
    assert set(patients._sites(2)) == {"DU"}


def test_flair_stands_in_for_a_missing_sequence(cohort: Path) -> None:
    missing = 0
    for folder in folders(cohort):
        volume = read(folder)[0]
        same = [np.array_equal(volume[..., channel], volume[..., 1]) for channel in (0, 2)]
        assert not all(same)
        missing += any(same)
    assert missing == PATIENTS // patients.MISSING_EVERY


def test_sites_differ_in_intensity(cohort: Path) -> None:
    ratios: dict[str, list[float]] = {}
    for folder in folders(cohort):
        mean = volume_statistics(torch.from_numpy(read(folder)[0]))[0]
        assert 15 < mean[1] < 105
        if mean[2] != mean[1]:
            ratios.setdefault(folder.name.split("_")[1], []).append(float(mean[2] / mean[1]))
    assert max(ratios["CS"]) < min(ratios["FG"])
    assert np.mean(ratios["CS"]) < np.mean(ratios["DU"]) < np.mean(ratios["HT"]) < np.mean(ratios["FG"])


def test_no_threshold_on_flair_finds_the_lesions(cohort: Path) -> None:
    thresholds, scores = np.arange(-0.5, 4, 0.1), []
    for folder in folders(cohort):
        volume, truth = read(folder)
        flair = apply_statistics(torch.from_numpy(volume), *volume_statistics(torch.from_numpy(volume)))[
            :, 1
        ].numpy()
        scores.append(
            [2 * (truth & (flair > t)).sum() / (truth.sum() + (flair > t).sum()) for t in thresholds]
        )
    assert 0.05 < np.mean(scores, axis=0).max() < 0.45


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"patients": 0}, "--patients is 0"),
        ({"patients": 1000}, "--patients is 1000"),
        ({"slices": 3}, "--slices is 3"),
        ({"size": 16}, "--size is 16"),
        ({"size": 72}, "multiple of 16; choose 80"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict, words: str
) -> None:
    with pytest.raises(MedFLError, match=words):
        make_phantoms(tmp_path / "new", **{"patients": 1, "slices": 4, "size": 32, "seed": 0, **wrong})
    assert not (tmp_path / "new").exists()


def test_other_patients_are_never_touched(tmp_path: Path) -> None:
    other = tmp_path / "kaggle_3m" / "TCGA_CS_0000_19990101"
    other.mkdir(parents=True)
    with pytest.raises(MedFLError, match="TCGA_CS_0000_19990101, which is no phantom"):
        make_phantoms(tmp_path, 1, 4, 32, 0)
    assert list(other.parent.iterdir()) == [other]


def test_phantoms_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    make_phantoms(tmp_path, 3, 4, 32, seed=1)
    root = make_phantoms(tmp_path, 2, 4, 32, seed=2)
    assert len(folders(root)) == 2 and len((root / "data.csv").read_text().splitlines()) == 3


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MedFLError, match="can't be written"):
        make_phantoms(tmp_path / "file", 1, 4, 32, 0)


def test_script_runs_from_any_folder_and_ends_with_2_on_bad_input(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "data" / "make_phantoms.py"),
        "--out",
        "here",
        "--slices",
        "4",
        "--size",
        "32",
        "--patients",
    ]
    good, bad = (
        subprocess.run([*command, n], cwd=tmp_path, capture_output=True, text=True) for n in ("1", "0")
    )
    assert good.returncode == 0 and len(folders(tmp_path / "here" / "kaggle_3m")) == 1
    assert bad.returncode == 2 and bad.stderr.startswith("make_phantoms.py: --patients is 0")
