"""The scans on disk: find them, check them, and hold them as one memory-mapped cache."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from appearance.features import describe_volume, image_statistics
from common import MedFLError, counted, file_sha256, write_json
from limits import MAX_VOXELS, fits
from scans.cohort import SITE, Cohort, Patient, cohort_name, find_cohort
from scans.naming import IMAGE_SUFFIXES, MASK_SUFFIX
from scans.pictures import read_mask_and_form, read_slice
from scans.spacing import NAME, read_spacing
from tasks import task_of

CACHE = "MEDFL_CACHE"  # environment variable that --cache sets, for child processes; it changes no result
CACHE_VERSION = 5
ROOT_NOTE = "root.txt"  # in a cache: where its files lay when it was built
DAY = 86_400.0  # seconds; no build takes as long
SETTLED = 2_000_000_000  # nanoseconds after which a file that changes again gets another time


class Dataset:
    """Patients with their pixels, read from the cache as they are needed.

    Attributes: name ("LGG MRI segmentation", "phantoms", "own data" or the task's title), task (of the folder's
    task.toml, or None), region (what the masks outline), root, patients, content (a name for what the files hold,
    another one where a pixel changed), table (pandas: patient, site, slices, pixels, tumour_slices, tumour_pixels,
    tumour_share, one row per patient), notes (sentences that a user should read: what is not read, and what is odd).
    """

    def __init__(self, root: Path, patients: list[Patient], cache: Path):
        self.root, self.patients, self.task = root, patients, task_of(root)
        self.name = self.task.title if self.task else cohort_name(patients)
        self.region = self.task.region if self.task else "tumour"
        self.content = cache.name
        self._folders = {patient.name: patient.images[0].parent for patient in patients}
        index = json.loads((cache / "index.json").read_text(encoding="utf-8"))["patients"]
        self._entries = {entry["patient"]: entry for entry in index}
        self._sites = {patient.name: patient.site for patient in patients}
        self._pixels = np.memmap(cache / "images.bin", np.uint8, "r")
        self._masks = np.memmap(cache / "masks.bin", np.uint8, "r")
        self.table = pd.DataFrame(
            [
                {
                    "patient": e["patient"],
                    "site": self._sites[e["patient"]],
                    "slices": e["shape"][0],
                    "pixels": int(np.prod(e["shape"])),
                    "tumour_slices": sum(n > 0 for n in e["tumour_pixels"]),
                    "tumour_pixels": sum(e["tumour_pixels"]),
                    "tumour_share": sum(e["tumour_pixels"]) / np.prod(e["shape"], dtype=float),
                }
                for e in index
            ]
        )

        self.notes = self._oddities()

    def _oddities(self) -> list[str]:
        """What is odd about the patients, in sentences with numbers."""
        odd = []
        if without := int((self.table["tumour_pixels"] == 0).sum()):
            odd.append(f"no tumour in any mask of {without} of {counted(len(self.table), 'patient')}")
        if full := int((self.table["tumour_share"] > 0.5).sum()):
            odd.append(
                f"more than half of all pixels are tumour in the masks of {full} of "
                f"{counted(len(self.table), 'patient')}: see that they are not inverted (255 is what is outlined)"
            )
        if other := sum(entry["other_forms"] for entry in self._entries.values()):
            odd.append(
                f"{counted(other, 'mask')} with 0 and 1, or a palette, in the place of 0 and 255: 1 is read as tumour"
            )
        return odd

    def site(self, patient: str) -> str:
        """The patient's site code."""
        return self._sites[patient]

    def tumour_pixels(self, patient: str) -> list[int]:
        """Tumour pixels in each of the patient's slices."""
        return self._entries[patient]["tumour_pixels"]

    def with_tumour(self, patients: Iterable[str]) -> tuple[str, ...]:
        """Those of the patients whose masks show tumour."""
        return tuple(patient for patient in patients if any(self.tumour_pixels(patient)))

    def check_trainable(self, patients: Iterable[str]) -> None:
        """Raises MedFLError where there is no patient, and where no mask of these patients shows tumour: nothing
        could be learned, and saying "no tumour" everywhere would look perfect."""
        patients = list(patients)
        if not patients:
            raise MedFLError("the split leaves nobody to train; name patients in its train part")
        if not self.with_tumour(patients):
            raise MedFLError(
                f"all masks of the {counted(len(patients), 'patient')} to train on are black (no tumour anywhere), as "
                f"after a failed export; look at the _mask files in {self.root} and write them again"
            )

    def volume(self, patient: str) -> tuple[np.ndarray, np.ndarray]:
        """A patient's slices (S, H, W, 3) uint8 and masks (S, H, W) uint8 0/255, both read-only views of the
        cache."""
        entry = self._entries[patient]
        shape, start = entry["shape"], entry["start"]
        count = int(np.prod(shape))
        return (
            self._pixels[3 * start : 3 * (start + count)].reshape(*shape, 3),
            self._masks[start : start + count].reshape(shape),
        )

    def spacing(self, patient: str) -> tuple[float, float, float] | None:
        """Millimetres between a patient's slices, rows and columns; None without a `volume.json`. Raises
        MedFLError for a broken one."""
        path = self._folders[patient] / NAME
        return read_spacing(path, self._entries[patient]["shape"][0]) if path.exists() else None

    def is_oriented(self, patient: str) -> bool:
        """Whether it is known that the patient's left is on the right of each slice: of the public set and
        phantoms, and of what was prepared, which takes no scan that does not say so."""
        return (self._folders[patient] / NAME).exists() or bool(SITE.match(patient.rpartition("/")[2]))

    def statistics(self, patient: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The volume's mean and deviation per channel, (3,) and (3,) float32, as
        `preprocessing.volume_statistics` gives."""
        measured = self._entries[patient]["measured"]
        return torch.tensor(measured["foreground_mean"]), torch.tensor(measured["foreground_deviation"])

    def image_statistics(self, patients: tuple[str, ...]) -> dict | None:
        """What these patients' images look like, as `appearance.features.image_statistics` tells it."""
        return image_statistics([self._entries[patient]["measured"] for patient in patients])


def load_dataset(
    data_dir: Path, site: str | None = None, progress: bool = True, mask_suffix: str = MASK_SUFFIX
) -> Dataset:
    """The dataset at or below `data_dir`, checked; its cache is built first where there is none or the files
    changed.

    site: label of patients whose names carry no site code (default "own"). mask_suffix: what ends a mask's
    name. Raises MedFLError for wrong data.
    """
    found = _cohort(Path(data_dir), site or "own", mask_suffix)
    dataset = Dataset(found.root, found.patients, _cache_of(found.root, found.patients, progress))
    dataset.notes = [*found.left_out, *dataset.notes]
    return dataset


def find_dataset(data_dir: Path) -> Path:
    """The nearest folder that holds all patients at or below `data_dir`, as `cohort.find_cohort` finds them.
    Raises MedFLError where there is nobody, and for what can't be right."""
    return _cohort(Path(data_dir), "own").root


def read_patients(root: Path, site: str) -> list[Patient]:
    """The patients in `root` and below it by name, each slice paired with its mask. Raises MedFLError as
    `find_dataset`."""
    return _cohort(Path(root), site).patients


def _cohort(top: Path, site: str, mask_suffix: str = MASK_SUFFIX) -> Cohort:
    """The patients below `top`; where the folder holds a task, its sites are those of the patients' names."""
    with Contents(top) as contents:
        found = find_cohort(top, site, contents.of, mask_suffix)
    if task := task_of(found.root):
        found.patients[:] = [replace(p, site=task.site_of(p.name) or site) for p in found.patients]
    return found


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """The option that puts the cache elsewhere."""
    parser.add_argument(
        "--cache", type=Path, help="folder for decoded scans, instead of ~/.cache/medfl (a copy of the scans)"
    )


def add_mask_option(parser: argparse.ArgumentParser) -> None:
    """The option for masks of other names."""
    parser.add_argument(
        "--mask-suffix",
        default=MASK_SUFFIX,
        type=_mask_suffix,
        help=f"what a mask's name has after its slice's (default {MASK_SUFFIX})",
    )


def _mask_suffix(text: str) -> str:
    if not text or text.lower().endswith(IMAGE_SUFFIXES) or set("/\\") & set(text):
        raise argparse.ArgumentTypeError("give the end of a mask's name without its .png, such as _seg")
    return text


def choose_cache(folder: Path | None) -> None:
    """Keep caches in this folder, in this process and those that it starts; None leaves the usual one."""
    if folder is not None:
        os.environ[CACHE] = str(folder.resolve())


def cache_folder() -> Path:
    """Where caches lie: outside of every dataset, in the folder that `choose_cache` named or the user's own
    cache folder, readable by the user alone. Raises MedFLError where it can't be used."""
    elsewhere = "name a folder of your own with --cache"
    try:
        folder = Path(os.environ[CACHE]) if os.environ.get(CACHE) else Path.home() / ".cache" / "medfl"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except RuntimeError as error:  # neither HOME is set nor has this user one
        raise MedFLError(f"there is no home folder to keep decoded scans in; {elsewhere}") from error
    except OSError as error:
        raise MedFLError(
            f"the cache folder {folder} can't be made ({error.strerror}); {elsewhere}, or free the disk"
        ) from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise MedFLError(f"the cache folder {folder} is not yours to write; {elsewhere}")
    return folder


class Contents:
    """SHA-256 of files at and below a folder, remembered in the cache folder.

    A file is read again when its size, times or inode are others than they were. Its ctime is set by the
    kernel, so that also a file that was replaced by one of the same size and time is read; Windows has no
    such time, and all files are read there. Used in a `with` block, at whose end what was read is noted.
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
                f"{path} can't be read ({error.strerror}); check its permissions, and that its disk is there"
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
            write_json(self._notes(), notes)


def _read_notes(path: Path) -> dict[str, list]:
    """What is known of the files of a dataset; nothing where that can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _content(root: Path, patients: list[Patient]) -> str:
    """A name for what these patients' files hold, in hexadecimal: whatever changes a pixel, or a patient's
    name, changes it."""
    digest = hashlib.sha256(f"{CACHE_VERSION}".encode())
    with Contents(root) as contents:
        for patient in patients:
            digest.update(f"{patient.name} {len(patient.images)}\n".encode())
            for path in patient.images + patient.masks:
                digest.update(f"{contents.of(path)}\n".encode())
    return digest.hexdigest()[:24]


def _cache_of(root: Path, patients: list[Patient], progress: bool) -> Path:
    """The cache of these files' content, whatever their folder or the site's label is called. Built beside
    and renamed: of two processes that build at once, the first one's stays."""
    folder = cache_folder() / _content(root, patients)
    if _is_whole(folder):
        with contextlib.suppress(OSError):
            os.utime(folder)  # in use
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # a cleaner or a full disk damaged it
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        _build_cache(beside, patients, progress)
        (beside / ROOT_NOTE).write_bytes(os.fsencode(root.resolve()))
        try:
            os.rename(beside, folder)
        except OSError:
            if not (
                folder / "index.json"
            ).exists():  # else another process was quicker, with the same content
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
    """Whether a cache's files are there, and as large as its index says."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))["patients"]
        pixels = sum(math.prod(entry["shape"]) for entry in index)
        sizes = [(folder / name).stat().st_size for name in ("images.bin", "masks.bin")]
        starts = [entry["start"] for entry in index if entry["measured"] and entry["tumour_pixels"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return len(starts) == len(index) > 0 and sizes == [3 * pixels, pixels]


def _remove_stale(folder: Path, root: Path) -> None:
    """Remove what a killed build left, and caches of what the dataset held before, unless they were in use
    within a day: another process may be about to open one."""
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


def _build_cache(folder: Path, patients: list[Patient], progress: bool) -> None:
    """Write `images.bin`, `masks.bin` (uint8, patient after patient) and `index.json`. Reads and so checks
    every file."""
    index, start = [], 0
    with open(folder / "images.bin", "wb") as images, open(folder / "masks.bin", "wb") as masks:
        for patient in tqdm(
            patients, desc="reading scans", unit="patient", disable=None if progress else True
        ):
            volume, truth, other_forms = _read_pair(patient)
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


def _read_pair(patient: Patient) -> tuple[np.ndarray, np.ndarray, int]:
    """A patient's slices (S, H, W, 3) and masks (S, H, W), uint8, and how many masks have another form than 0
    and 255. Raises MedFLError where a size differs."""
    volume: list[np.ndarray] = []
    truth: list[np.ndarray] = []
    other_forms = 0
    for image, mask in zip(patient.images, patient.masks):
        volume.append(read_slice(image))
        if not fits((len(patient.images), *volume[0].shape[:2])):
            raise MedFLError(
                f"{image.parent} holds {len(patient.images)} slices of {volume[0].shape[1]}×{volume[0].shape[0]} "
                f"pixels, more than are read at once ({MAX_VOXELS >> 20} million pixels); make them smaller"
            )
        pixels, other = read_mask_and_form(mask)
        truth.append(pixels)
        other_forms += other
        for path, pixels in ((image, volume[-1]), (mask, truth[-1])):
            if pixels.shape[:2] != volume[0].shape[:2]:
                raise MedFLError(
                    f"{path} is {pixels.shape[1]}×{pixels.shape[0]} pixels and {patient.images[0].name} is "
                    f"{volume[0].shape[1]}×{volume[0].shape[0]}; a patient's slices and masks have one size"
                )
    return np.stack(volume), np.stack(truth), other_forms
