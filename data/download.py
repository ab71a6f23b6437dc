"""Download the LGG MRI segmentation dataset from Kaggle into the folder where every script looks for it, and
check it.

    pip install -r requirements.txt -r requirements-download.txt
    python data/download.py

An interrupted run continues where it stopped: kagglehub keeps the downloaded part of the archive, and a
patient's folder appears only when it is complete. If the whole set is already there, Kaggle is not contacted.
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
NEEDED = "4 GB"  # the archive, the two copies in it once unpacked, and the copy that stays


def download(
    out: Path, patients: int = PATIENTS, slices: int = SLICES, progress: bool = False
) -> tuple[Path, bool]:
    """The folder of the whole set at or below `out`, and whether it had to be fetched (into `out`/kaggle_3m).

    patients, slices: the expected numbers. Raises MedFLError if the set can't be fetched; the message also
    says how to do it by hand.
    """
    if there := _whole_set(out, patients, slices):
        return there, False
    target = out / "kaggle_3m"
    by_hand = f"or download {PAGE} by hand and unpack it into {out}"
    source = find_dataset(_fetch(by_hand))  # the archive holds two copies; this is the one nearest to its top
    check(source, patients, slices)
    try:
        copy_set(source, target, progress)
    except OSError as error:
        raise MedFLError(_disk(error, by_hand)) from error
    check(target, patients, slices)
    return target, True


def _whole_set(out: Path, patients: int, slices: int) -> Path | None:
    """The folder at or below `out` that holds the whole set, in any layout that dataset.py finds; None if
    there is none."""
    try:
        folder = find_dataset(out)
        check(folder, patients, slices)
    except MedFLError:
        return None
    return folder


def check(folder: Path, patients: int = PATIENTS, slices: int = SLICES) -> None:
    """Raises MedFLError unless `folder` holds exactly this many patients and slices, each slice with its
    mask."""
    found = read_patients(folder, "own")
    counted = sum(len(patient.images) for patient in found)
    if (len(found), counted) != (patients, slices):
        raise MedFLError(
            f"{folder} holds {len(found)} patients and {counted} slices, but the dataset has {patients} and "
            f"{slices}; remove what does not belong to it, or name an empty folder with --out"
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
            f"the Kaggle account's file (~/.kaggle/kaggle.json) can't be read; remove it and {TOKEN}, "
            f"{by_hand}"
        ) from error
    try:
        return Path(kagglehub.dataset_download(HANDLE))
    except KaggleApiHTTPError as error:
        raise MedFLError(_refusal(error.response.status_code, by_hand)) from error
    except requests.RequestException as error:
        raise MedFLError(
            f"Kaggle can't be reached, or the connection was lost ({type(error).__name__}); run this again "
            f"to continue where it stopped, {by_hand}"
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
            "the download from Kaggle is damaged or not an archive, and was deleted; run this again, "
            f"{by_hand}"
        ) from error
    except OSError as error:
        raise MedFLError(_disk(error, by_hand)) from error


def _refusal(code: int, by_hand: str) -> str:
    """What an error code from Kaggle means and what to do."""
    if code == 401:
        why = "Kaggle requires an account, or did not accept the token (401)"
        return f"{why}; {TOKEN} and run this again, {by_hand}"
    if code == 403:
        return (
            "Kaggle gives the set only to an account that accepted its terms (403); sign in, accept them at "
            f"{PAGE}, {TOKEN} and run this again, {by_hand}"
        )
    return f"Kaggle refused with code {code}; try again later, {by_hand}"


def _disk(error: OSError, by_hand: str) -> str:
    """Why a file could not be written, and what to do."""
    if error.errno in DISK_FULL:
        return (
            f"the disk is full; free {NEEDED} and run this again to continue where it stopped "
            f"(KAGGLEHUB_CACHE names another folder for the archive, --out one for the scans), {by_hand}"
        )
    return (
        f"{error.filename or 'a file'} can't be written ({error.strerror or error}); choose a folder of your "
        f"own with --out or KAGGLEHUB_CACHE, {by_hand}"
    )


def _forget_archive() -> None:
    """Delete the archive; otherwise kagglehub would treat it as complete the next time."""
    for archive in cache_folder().glob("*.archive"):
        archive.unlink()


def cache_folder() -> Path:
    """The folder where kagglehub keeps this dataset."""
    from kagglehub.config import get_cache_folder

    return Path(get_cache_folder()) / "datasets" / HANDLE


def copy_set(source: Path, target: Path, progress: bool = False) -> None:
    """Copy the content of `source` to `target`. Each patient is first copied under a temporary name. Entries
    that exist already stay.

    Raises MedFLError if something else has a patient's name, and OSError if a file can't be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in tqdm(
        sorted(source.iterdir()), desc="copying", unit="patient", disable=None if progress else True
    ):
        place, beside = target / entry.name, target / f".{entry.name}.partial"
        if place.exists():
            if _sizes(place) != _sizes(entry):
                raise MedFLError(
                    f"{place} differs from the download; move it away and run this again, or give another "
                    "--out"
                )
            continue
        if entry.is_dir():
            shutil.rmtree(beside, ignore_errors=True)  # left by an interrupted run
            beside.mkdir()
            for file in entry.iterdir():
                shutil.copyfile(file, beside / file.name)
        else:
            shutil.copyfile(entry, beside)
        os.replace(beside, place)


def _sizes(path: Path) -> dict[Path, int]:
    """The size in bytes of each file in a folder, by its path there; for a file, its own size."""
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
        print(f"{cache_folder()} holds kagglehub's copy of the archive; you can delete it")
        if (chosen := find_dataset(arguments.out)) != folder:
            print(f"note: --data-dir {arguments.out} means {chosen}; name {folder} with --data-dir")
    print(f"next: python train_centralized.py --data-dir {typed(folder)}")


if __name__ == "__main__":
    run_script(main)
