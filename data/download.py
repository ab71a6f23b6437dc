"""Fetch the LGG MRI segmentation set from Kaggle, put it where every script looks, and check it.

    pip install -r requirements.txt -r requirements-download.txt
    python data/download.py

A broken-off run goes on where it stopped: kagglehub keeps the part of the archive that it has, and a
patient's folder takes its place whole or not at all. Where everything is there, nothing is asked of anybody.
"""

import argparse
import errno
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from common import MedFLError, run_script, typed
from dataset import find_dataset, read_patients

HANDLE = "mateuszbuda/lgg-mri-segmentation"
PAGE = f"https://www.kaggle.com/datasets/{HANDLE}"
PATIENTS, SLICES = 110, 3_929
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
TOKEN = "make a token in the account's settings there, save it as ~/.kaggle/access_token"
NEEDED = "4 GB"  # the archive, its two copies unpacked, and the one that stays


def download(
    out: Path, patients: int = PATIENTS, slices: int = SLICES, progress: bool = False
) -> tuple[Path, bool]:
    """The folder of the whole set at or below `out`, and whether it had to be fetched (into `out`/kaggle_3m).

    patients, slices: how many there must be. Raises MedFLError for everything that stands in the way, with
    the way by hand.
    """
    if there := _whole_set(out, patients, slices):
        return there, False
    target = out / "kaggle_3m"
    by_hand = f"or download {PAGE} by hand and unpack it into {out}"
    source = find_dataset(_fetch(by_hand))  # of the archive's two copies the one nearest to its top
    check(source, patients, slices)
    try:
        copy_set(source, target, progress)
    except OSError as error:
        raise MedFLError(_disk(error, by_hand)) from error
    check(target, patients, slices)
    return target, True


def _whole_set(out: Path, patients: int, slices: int) -> Path | None:
    """The folder at or below `out` that holds the whole set, in any layout that dataset.py finds; None where
    none does."""
    try:
        folder = find_dataset(out)
        check(folder, patients, slices)
    except MedFLError:
        return None
    return folder


def check(folder: Path, patients: int = PATIENTS, slices: int = SLICES) -> None:
    """Raises MedFLError unless `folder` holds so many patients and slices, each slice with its mask."""
    found = read_patients(folder, "own")
    counted = sum(len(patient.images) for patient in found)
    if (len(found), counted) != (patients, slices):
        raise MedFLError(
            f"{folder} holds {len(found)} patients and {counted} slices, and the set has {patients} and "
            f"{slices}; take away what is not of it, or give an empty --out"
        )


def _fetch(by_hand: str) -> Path:
    """The folder in kagglehub's cache with the unpacked archive. Raises MedFLError."""
    try:
        import kagglehub
        import requests
        from kagglehub.config import get_kaggle_credentials
        from kagglehub.exceptions import DataCorruptionError, KaggleApiHTTPError
    except ImportError as error:
        raise MedFLError(
            f"kagglehub is not installed; `pip install -r requirements-download.txt`, {by_hand}"
        ) from error
    try:
        get_kaggle_credentials()
    except (ValueError, OSError) as error:
        raise MedFLError(
            f"the Kaggle account's file (~/.kaggle/kaggle.json) can't be read; take it away and {TOKEN}, "
            f"{by_hand}"
        ) from error
    try:
        return Path(kagglehub.dataset_download(HANDLE))
    except KaggleApiHTTPError as error:
        raise MedFLError(_refusal(error.response.status_code, by_hand)) from error
    except requests.RequestException as error:
        raise MedFLError(
            f"Kaggle can't be reached, or the connection broke off ({type(error).__name__}); run this again "
            f"to go on where it stopped, {by_hand}"
        ) from error
    except (
        DataCorruptionError,
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        ValueError,
    ) as error:
        _forget_archive()
        raise MedFLError(
            f"what Kaggle sent is damaged or no archive, and was deleted; run this again, {by_hand}"
        ) from error
    except OSError as error:
        raise MedFLError(_disk(error, by_hand)) from error


def _refusal(code: int, by_hand: str) -> str:
    """What Kaggle's answer means and what to do."""
    if code == 401:
        why = "Kaggle wants an account, or did not know the one it was told (401)"
        return f"{why}; {TOKEN} and run this again, {by_hand}"
    if code == 403:
        return (
            "Kaggle gives the set only to an account that accepted its terms (403); sign in, accept them at "
            f"{PAGE}, {TOKEN} and run this again, {by_hand}"
        )
    return f"Kaggle refused with code {code}; try again later, {by_hand}"


def _disk(error: OSError, by_hand: str) -> str:
    """What kept a file from being written and what to do."""
    if error.errno in DISK_FULL:
        return (
            f"the disk is full; free {NEEDED} and run this again to go on where it stopped (KAGGLEHUB_CACHE "
            f"names another place for the archive, --out for the scans), {by_hand}"
        )
    return (
        f"{error.filename or 'a file'} can't be written ({error.strerror or error}); choose a folder of your "
        f"own with --out or KAGGLEHUB_CACHE, {by_hand}"
    )


def _forget_archive() -> None:
    """Delete the archive, which kagglehub would otherwise take for whole the next time."""
    for archive in cache_folder().glob("*.archive"):
        archive.unlink()


def cache_folder() -> Path:
    """Where kagglehub keeps this set."""
    from kagglehub.config import get_cache_folder

    return Path(get_cache_folder()) / "datasets" / HANDLE


def copy_set(source: Path, target: Path, progress: bool = False) -> None:
    """Copy what is in `source` to `target`, each patient beside its place first. What is there already stays.

    Raises MedFLError where something else has a patient's name, and OSError where a file can't be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in tqdm(
        sorted(source.iterdir()), desc="copying", unit="patient", disable=None if progress else True
    ):
        place, beside = target / entry.name, target / f".{entry.name}.partial"
        if place.exists():
            if _sizes(place) != _sizes(entry):
                raise MedFLError(
                    f"{place} is not what the download holds; move it away and run this again, or give "
                    f"another --out"
                )
            continue
        if entry.is_dir():
            shutil.rmtree(beside, ignore_errors=True)  # of a run that was broken off
            beside.mkdir()
            for file in entry.iterdir():
                shutil.copyfile(file, beside / file.name)
        else:
            shutil.copyfile(entry, beside)
        os.replace(beside, place)


def _sizes(path: Path) -> dict[Path, int]:
    """The bytes of each file in a folder, by its name there; of a file, its own."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {file.relative_to(path): file.stat().st_size for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for kaggle_3m (default data)")
    arguments = parser.parse_args()
    folder, fetched = download(arguments.out, progress=True)
    print(
        f"{PATIENTS} patients and {SLICES} slices in {folder}, each slice with its mask"
        + ("" if fetched else "; nothing to do")
    )
    if fetched:
        print(f"{cache_folder()} holds kagglehub's copy of the archive; delete it at will")
        if (chosen := find_dataset(arguments.out)) != folder:
            print(f"note: --data-dir {arguments.out} means {chosen}; name {folder} with --data-dir")
    print(f"next: python train_centralized.py --data-dir {typed(folder)}")


if __name__ == "__main__":
    run_script(main)
