"""The pixels of a dataset as one memory-mapped cache, which is built again if a file's content changes."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch
from tqdm import tqdm

from appearance.features import describe_volume
from borders.limits import MAX_VOXELS, fits
from common import MedFLError
from scans.cohort import Patient
from scans.pictures import read_classes, read_mask_and_form, read_slice
from storage.files import atomic_write, file_sha256

CACHE = "MEDFL_CACHE"  # environment variable that --cache sets, for child processes; it changes no result
CACHE_VERSION = 5
ROOT_NOTE = "root.txt"  # in a cache: the folder of its files when it was built
DAY = 86_400.0  # seconds; no build takes this long
SETTLED = 2_000_000_000  # nanoseconds after which a further change certainly gives a file a new time


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names another folder for the cache."""
    parser.add_argument(
        "--cache", type=Path, help="folder for decoded scans, instead of ~/.cache/medfl (a copy of the scans)"
    )


def choose_cache(folder: Path | None) -> None:
    """Keep caches in this folder, in this process and its child processes; None leaves the usual folder."""
    if folder is not None:
        os.environ[CACHE] = str(folder.resolve())


def cache_folder() -> Path:
    """The folder for caches, outside every dataset: the one from `choose_cache`, or the user's own cache folder,
    readable only by the user. Raises MedFLError if it can't be used."""
    elsewhere = "name a folder of your own with --cache"
    try:
        named = os.environ.get(CACHE)
        folder = Path(named).expanduser() if named else Path.home() / ".cache" / "medfl"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except RuntimeError as error:  # HOME is not set, and the system has no home folder for this user
        raise MedFLError(f"there is no home folder to keep decoded scans in; {elsewhere}") from error
    except OSError as error:
        raise MedFLError(
            f"the cache folder {folder} can't be made ({error.strerror}); {elsewhere}, or free the disk"
        ) from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise MedFLError(f"the cache folder {folder} is not yours to write; {elsewhere}")
    return folder


class Contents:
    """SHA-256 of files below a folder, stored in the cache folder.

    A file is read again if its size, times or inode have changed. The kernel sets its ctime, so a file that was
    replaced by one of the same size and time is read too. Windows has no such time, so all files are read there. Use
    in a `with` block; the hashes are stored at its end.
    """

    def __init__(self, top: Path):
        self.top = top
        self._known: dict[str, list] | None = None
        self._now: dict[str, list | None] = {}

    def of(self, path: Path) -> str:
        """A file's SHA-256, in hexadecimal. Raises MedFLError where it can't be read."""
        if self._known is None:
            self._known = _read_notes(self._notes())
        name = str(path.relative_to(self.top))
        try:
            about = path.stat()
            stamp = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
            *before, content = self._known.get(name, [None])
            if before != stamp or os.name == "nt":
                content = file_sha256(path)
        except OSError as error:
            raise MedFLError(
                f"{path} can't be read ({error.strerror}); check its permissions, and that its disk is "
                "connected"
            ) from error
        settled = time.time_ns() - about.st_ctime_ns > SETTLED  # else it may change again without a new time
        self._now[name] = [*stamp, content] if settled else None
        return content

    def _notes(self) -> Path:
        place = hashlib.sha256(os.fsencode(self.top.resolve())).hexdigest()[:12]
        return cache_folder() / f"{place}.files.json"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._known is None or kind is not None:
            return
        others = {n: e for n, e in self._known.items() if n not in self._now and (self.top / n).exists()}
        notes = others | {name: entry for name, entry in self._now.items() if entry}
        if notes != self._known:
            with atomic_write(self._notes(), "w", private=True) as file:  # files can be named after patients
                json.dump(notes, file)


def _read_notes(path: Path) -> dict[str, list]:
    """The stored notes about the files of a dataset; empty if they can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _content(root: Path, patients: list[Patient], numbers: Mapping[int, int]) -> str:
    """A digest of the content of these patients' files, in hexadecimal. It changes with every pixel, with a
    patient's name and with the classes."""
    digest = hashlib.sha256(f"{CACHE_VERSION}".encode())
    if numbers:
        digest.update(f"{sorted(numbers.items())}\n".encode())
    with Contents(root) as contents:
        for patient in patients:
            digest.update(f"{patient.name} {len(patient.images)}\n".encode())
            for path in patient.images + patient.masks:
                digest.update(f"{contents.of(path)}\n".encode())
    return digest.hexdigest()[:24]


def cache_of(root: Path, patients: list[Patient], numbers: Mapping[int, int], progress: bool) -> Path:
    """The cache of these files' content, independent of the names of their folder and site. It is built in a
    temporary folder and renamed: if two processes build at once, the first one's cache stays.

    numbers: the class of each label, if the masks hold several (`Task.numbers`)."""
    folder = cache_folder() / _content(root, patients, numbers)
    if _is_whole(folder):
        with contextlib.suppress(OSError):
            os.utime(folder)  # marks it as in use
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # it may have been damaged by a cleaner or a full disk
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        _build_cache(beside, patients, numbers, progress)
        (beside / ROOT_NOTE).write_bytes(os.fsencode(root.resolve()))
        try:
            os.rename(beside, folder)
        except OSError:
            if not (
                folder / "index.json"
            ).exists():  # otherwise another process was faster, with the same content
                raise
    except OSError as error:
        raise MedFLError(
            f"the cache in {folder.parent} can't be written ({error.strerror}); free the disk, or name another "
            "folder with --cache"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _remove_stale(folder, root)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a cache's files exist and have the sizes from its index."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))["patients"]
        pixels = sum(math.prod(entry["shape"]) for entry in index)
        sizes = [(folder / name).stat().st_size for name in ("images.bin", "masks.bin")]
        starts = [entry["start"] for entry in index if entry["measured"] and entry["tumour_pixels"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return len(starts) == len(index) > 0 and sizes == [3 * pixels, pixels]


def _remove_stale(folder: Path, root: Path) -> None:
    """Remove the remains of killed builds, and caches of this dataset's earlier content, unless they were used within
    a day: another process may be about to open one."""
    for other in folder.parent.iterdir():
        try:
            old = time.time() - other.stat().st_mtime > DAY
            of_this = other.name.startswith(".building-") or (other / ROOT_NOTE).read_bytes() == os.fsencode(
                root.resolve()
            )
        except OSError:
            continue
        if old and of_this and other != folder:
            shutil.rmtree(other, ignore_errors=True)


def _build_cache(folder: Path, patients: list[Patient], numbers: Mapping[int, int], progress: bool) -> None:
    """Write `images.bin`, `masks.bin` (uint8, patient after patient) and `index.json`. Every file is read and
    thereby checked."""
    index, start = [], 0
    with open(folder / "images.bin", "wb") as images, open(folder / "masks.bin", "wb") as masks:
        for patient in tqdm(
            patients, desc="reading scans", unit="patient", disable=None if progress else True
        ):
            volume, truth, other_forms = _read_pair(patient, numbers)
            images.write(volume.tobytes())
            masks.write(truth.tobytes())
            index.append(
                {
                    "patient": patient.name,
                    "shape": list(truth.shape),
                    "start": start,
                    "measured": describe_volume(torch.from_numpy(volume)),
                    "other_forms": other_forms,
                    "tumour_pixels": np.count_nonzero(truth, axis=(1, 2)).tolist(),
                }
            )
            start += truth.size
    (folder / "index.json").write_text(json.dumps({"patients": index}), encoding="utf-8")


def _read_pair(patient: Patient, numbers: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
    """A patient's slices (S, H, W, 3) and masks (S, H, W), uint8 with 0 and 255 or the numbers of classes, and the
    number of masks that were not stored as 0 and 255. Raises MedFLError if a size differs."""
    volume: list[np.ndarray] = []
    truth: list[np.ndarray] = []
    other_forms = 0
    for image, mask in zip(patient.images, patient.masks):
        volume.append(read_slice(image))
        if not fits((len(patient.images), *volume[0].shape[:2])):
            raise MedFLError(
                f"{image.parent} holds {len(patient.images)} slices of "
                f"{volume[0].shape[1]}×{volume[0].shape[0]} pixels, more than can be read at once "
                f"({MAX_VOXELS >> 20} million pixels); make them smaller"
            )
        pixels, other = (read_classes(mask, numbers), False) if numbers else read_mask_and_form(mask)
        truth.append(pixels)
        other_forms += other
        for path, pixels in ((image, volume[-1]), (mask, truth[-1])):
            if pixels.shape[:2] != volume[0].shape[:2]:
                raise MedFLError(
                    f"{path} is {pixels.shape[1]}×{pixels.shape[0]} pixels and {patient.images[0].name} is "
                    f"{volume[0].shape[1]}×{volume[0].shape[0]}; all slices and masks of a patient must "
                    "have the same size"
                )
    return np.stack(volume), np.stack(truth), other_forms
