"""The scans on disk: find them, check them, and hold them as one memory-mapped cache."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from appearance.features import describe_volume, image_statistics
from common import MedFLError, file_sha256, write_json
from preprocessing import is_image, is_mask, numeric_order, read_mask, read_slice
from spacing import NAME, read_spacing
from tasks import Task, task_of

SITE = re.compile(r"^TCGA_([A-Z]{2})_")
PHANTOM = re.compile(r"^TCGA_[A-Z]{2}_PH\d+_")
SEARCH_DEPTH = (
    4  # folders below --data-dir; the deepest that people make is archive/lgg-mri-segmentation/kaggle_3m
)
CACHE_VERSION = 3
ROOT_NOTE = "root.txt"  # in a cache: where its files lay when it was built
DAY = 86_400.0  # seconds; no build takes as long
SETTLED = 2_000_000_000  # nanoseconds after which a file that changes again gets another time
HOW_TO_GET = (
    "fetch the scans with `python data/download.py`, or by hand from "
    "https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation, or make a synthetic cohort with "
    "`python data/make_phantoms.py`"
)


@dataclass(frozen=True)
class Patient:
    """One patient's files: name (the folder's), site code, slices in numeric order and the mask of each."""

    name: str
    site: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


class Dataset:
    """Patients with their pixels, read from the cache as they are needed.

    Attributes: name ("LGG MRI segmentation", "phantoms", "own data" or the task's title), task (of the folder's
    task.toml, or None), root, patients, table (pandas:
    patient, site, slices, pixels, tumour_slices, tumour_pixels, tumour_share, one row per patient).
    """

    def __init__(self, root: Path, patients: list[Patient], cache: Path):
        self.root, self.patients, self.task = root, patients, task_of(root)
        self.name = self.task.title if self.task else _dataset_name(patients)
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

    def site(self, patient: str) -> str:
        """The patient's site code."""
        return self._sites[patient]

    def tumour_pixels(self, patient: str) -> list[int]:
        """Tumour pixels in each of the patient's slices."""
        return self._entries[patient]["tumour_pixels"]

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
        path = self.root / patient / NAME
        return read_spacing(path, self._entries[patient]["shape"][0]) if path.exists() else None

    def statistics(self, patient: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The volume's mean and deviation per channel, (3,) and (3,) float32, as
        `preprocessing.volume_statistics` gives."""
        measured = self._entries[patient]["measured"]
        return torch.tensor(measured["foreground_mean"]), torch.tensor(measured["foreground_deviation"])

    def image_statistics(self, patients: tuple[str, ...]) -> dict | None:
        """What these patients' images look like, as `appearance.features.image_statistics` tells it."""
        return image_statistics([self._entries[patient]["measured"] for patient in patients])


def load_dataset(data_dir: Path, site: str | None = None, progress: bool = True) -> Dataset:
    """The dataset at or below `data_dir`, checked; its cache is built first where there is none or the files
    changed.

    site: label of patients whose names carry no site code (default "own"). Raises MedFLError for wrong data.
    """
    root = find_dataset(Path(data_dir))
    patients = read_patients(root, site or "own", task_of(root))
    return Dataset(root, patients, _cache_of(root, patients, progress))


def find_dataset(data_dir: Path) -> Path:
    """The folder that holds the patients' folders: `data_dir` itself or one below it, in every layout people
    end up with.

    The download holds everything twice; of folders with the same patients the one nearest to `data_dir` is
    taken. Real scans go before phantoms. Raises MedFLError where there is none, or two that differ.
    """
    if not data_dir.is_dir():
        raise MedFLError(f"there is no folder {data_dir}; {HOW_TO_GET}")
    found = {
        folder: names for folder in _folders(data_dir, SEARCH_DEPTH) if (names := _patient_folders(folder))
    }
    if not found:
        raise MedFLError(
            f"no patients in {data_dir} (a folder per patient, each slice with its _mask file); {HOW_TO_GET}"
        )
    real = {f: n for f, n in found.items() if not all(PHANTOM.match(name) for name in n)} or found
    depth = min(len(folder.parts) for folder in real)
    nearest = next(folder for folder in real if len(folder.parts) == depth)
    for folder in real:
        if real[folder] != real[nearest] and not folder.is_relative_to(nearest):
            raise MedFLError(
                f"{nearest} and {folder} hold different patients; name one of them with --data-dir"
            )
    return nearest


def _folders(top: Path, depth: int) -> list[Path]:
    """`top` and the folders below it, nearest first, hidden ones left out."""
    level, every = [top], [top]
    for _ in range(depth):
        level = sorted(
            c for folder in level for c in _children(folder) if c.is_dir() and not c.name.startswith(".")
        )
        every += level
    return every


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise MedFLError(f"{folder} can't be read ({error.strerror}); check its permissions") from error


def _patient_folders(folder: Path) -> frozenset[str]:
    """Names of the sub-folders that hold slices or masks themselves."""
    return frozenset(
        c.name
        for c in _children(folder)
        if c.is_dir() and not c.name.startswith(".") and any(is_image(f) or is_mask(f) for f in _children(c))
    )


def read_patients(root: Path, site: str, task: Task | None = None) -> list[Patient]:
    """The patients in `root` by name, each slice paired with its mask. task: whose names tell the site. Raises
    MedFLError for a slice or mask alone."""
    patients = []
    for name in sorted(_patient_folders(root)):
        files = _children(root / name)
        images = numeric_order([f for f in files if is_image(f)])
        masks = {f.stem[: -len("_mask")]: f for f in files if is_mask(f)}
        for before, image in zip([None, *images], images):
            if before and before.stem == image.stem:
                raise MedFLError(f"{before} and {image.name} are the same slice twice; take one of them away")
            if image.stem not in masks:
                raise MedFLError(
                    f"{image} has no mask ({image.stem}_mask{image.suffix}); add it or take the slice away"
                )
        alone = sorted(masks.keys() - {image.stem for image in images})
        if alone:
            raise MedFLError(f"{masks[alone[0]]} has no slice ({alone[0]}.*); add it or take the mask away")
        found = SITE.match(name)
        known = task.site_of(name) if task else found and found[1]
        patients.append(Patient(name, known or site, tuple(images), tuple(masks[i.stem] for i in images)))
    return patients


def _dataset_name(patients: list[Patient]) -> str:
    if all(PHANTOM.match(p.name) for p in patients):
        return "phantoms"
    return "LGG MRI segmentation" if all(SITE.match(p.name) for p in patients) else "own data"


def cache_folder() -> Path:
    """Where caches lie: outside of every dataset, in the user's own cache
    folder, readable by the user alone."""
    folder = Path.home() / ".cache" / "medfl"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise MedFLError(
            f"the cache folder {folder} can't be made ({error.strerror}); make it or free the disk"
        ) from error
    return folder


def _content(root: Path, patients: list[Patient]) -> str:
    """A name for what these patients' files hold, in hexadecimal: whatever changes a pixel, or a patient's
    name, changes it.

    A file is read again when its size, times or inode are others than they were. Its ctime is set by the
    kernel, so that also a file that was replaced by one of the same size and time is read; Windows has no
    such time, and all files are read there.
    """
    notes = cache_folder() / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}.files.json"
    known, now = _read_notes(notes), {}
    digest = hashlib.sha256(f"{CACHE_VERSION}".encode())
    for patient in patients:
        digest.update(f"{patient.name} {len(patient.images)}\n".encode())
        for path in patient.images + patient.masks:
            name, about = str(path.relative_to(root)), path.stat()
            stamp = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
            *before, content = known.get(name, [None])
            if before != stamp or os.name == "nt":
                content = file_sha256(path)
            digest.update(f"{content}\n".encode())
            if time.time_ns() - about.st_ctime_ns > SETTLED:  # else it may change again without a new time
                now[name] = [*stamp, content]
    if now != known:
        write_json(notes, now)
    return digest.hexdigest()[:24]


def _read_notes(path: Path) -> dict[str, list]:
    """What is known of the files of a dataset; nothing where that can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _cache_of(root: Path, patients: list[Patient], progress: bool) -> Path:
    """The cache of these files' content, whatever their folder or the site's label is called. Built beside
    and renamed: of two processes that build at once, the first one's stays."""
    folder = cache_folder() / _content(root, patients)
    if (folder / "index.json").exists():
        os.utime(folder)  # in use
        return folder
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        _build_cache(beside, patients, progress)
        (beside / ROOT_NOTE).write_text(str(root.resolve()), encoding="utf-8")
        try:
            os.rename(beside, folder)
        except OSError:
            if not (
                folder / "index.json"
            ).exists():  # else another process was quicker, with the same content
                raise
    except OSError as error:
        raise MedFLError(
            f"the cache in {folder.parent} can't be written ({error.strerror}); free the disk"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _remove_stale(folder, root)
    return folder


def _remove_stale(folder: Path, root: Path) -> None:
    """Remove what a killed build left, and caches of what the dataset held before, unless they were in use
    within a day: another process may be about to open one."""
    for other in folder.parent.iterdir():
        try:
            old = time.time() - other.stat().st_mtime > DAY
            of_this = other.name.startswith(".building-") or (other / ROOT_NOTE).read_text(
                encoding="utf-8"
            ) == str(root.resolve())
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
            volume, truth = _read_pair(patient)
            images.write(volume.tobytes())
            masks.write(truth.tobytes())
            index.append(
                {
                    "patient": patient.name,
                    "shape": list(truth.shape),
                    "start": start,
                    "measured": describe_volume(torch.from_numpy(volume)),
                    "tumour_pixels": np.count_nonzero(truth, axis=(1, 2)).tolist(),
                }
            )
            start += truth.size
    (folder / "index.json").write_text(json.dumps({"patients": index}), encoding="utf-8")


def _read_pair(patient: Patient) -> tuple[np.ndarray, np.ndarray]:
    """A patient's slices (S, H, W, 3) and masks (S, H, W), uint8. Raises MedFLError where a size differs."""
    volume, truth = [], []
    for image, mask in zip(patient.images, patient.masks):
        volume.append(read_slice(image))
        truth.append(read_mask(mask))
        for path, pixels in ((image, volume[-1]), (mask, truth[-1])):
            if pixels.shape[:2] != volume[0].shape[:2]:
                raise MedFLError(
                    f"{path} is {pixels.shape[1]}×{pixels.shape[0]} pixels and {patient.images[0].name} is "
                    f"{volume[0].shape[1]}×{volume[0].shape[0]}; a patient's slices and masks have one size"
                )
    return np.stack(volume), np.stack(truth)
