"""The scans of a dataset: found, checked, and read from their cache."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from appearance.features import image_statistics
from common import MedFLError, counted
from scans.cache import Contents, cache_of
from scans.cohort import SITE, Cohort, Patient, cohort_name, find_cohort
from scans.naming import IMAGE_SUFFIXES, MASK_SUFFIX
from scans.spacing import NAME, read_spacing
from tasks import LGG, Task, task_of


class Dataset:
    """Patients with their pixels, read from the cache as they are needed.

    Attributes: name ("LGG MRI segmentation", "phantoms", "own data" or the task's title), task (of the folder's
    task.toml, or None), region (what the masks outline), classes (the names of its parts, if it has any), root,
    patients, content (a name for the files' content; it changes when a pixel changes), table (pandas: patient, site,
    slices, pixels, tumour_slices, tumour_pixels, tumour_share, one row per patient), notes (sentences for the user:
    what was not read, and what looks odd).
    """

    def __init__(self, root: Path, patients: list[Patient], cache: Path, task: Task | None):
        self.root, self.patients, self.task = root, patients, task
        self.name = self.task.title if self.task else cohort_name(patients)
        self.region = (self.task or LGG).region
        self.classes = tuple(one.name for one in (self.task or LGG).classes)
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
        """Sentences, with numbers, about what looks odd in the masks."""
        odd = []
        if without := int((self.table["tumour_pixels"] == 0).sum()):
            odd.append(f"no tumour in any mask of {without} of {counted(len(self.table), 'patient')}")
        if full := int((self.table["tumour_share"] > 0.5).sum()):
            odd.append(
                f"more than half of all pixels are tumour in the masks of {full} of "
                f"{counted(len(self.table), 'patient')}: check that they are not inverted (255 marks what is outlined)"
            )
        if other := sum(entry["other_forms"] for entry in self._entries.values()):
            odd.append(
                f"{counted(other, 'mask')} with 0 and 1, or a palette, instead of 0 and 255: 1 is read as 255"
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
        """Raises MedFLError if there is no patient, or if no mask of these patients shows tumour: nothing could be
        learned, and saying "no tumour" everywhere would look perfect."""
        patients = list(patients)
        if not patients:
            raise MedFLError("the split leaves no patient to train on; name patients in its train part")
        if not self.with_tumour(patients):
            raise MedFLError(
                f"all masks of the {counted(len(patients), 'patient')} to train on are black (no tumour anywhere), as "
                f"after a failed export; look at the _mask files in {self.root} and write them again"
            )

    def check_classes(self, classes: int) -> None:
        """Raises MedFLError if the masks can't teach a model of so many classes."""
        if classes in (1, len(self.classes)):
            return
        told = (
            f"are {' and '.join(self.classes)}" if self.classes else f"outline the {self.region} as a whole"
        )
        raise MedFLError(
            f"the model is to have {classes} classes, but the masks in {self.root} {told}; the run needs --classes "
            f"{len(self.classes) or 1}{', or 1 for the whole' * bool(self.classes)}"
        )

    def volume(self, patient: str) -> tuple[np.ndarray, np.ndarray]:
        """A patient's slices (S, H, W, 3) uint8 and masks (S, H, W) uint8, both read-only views of the cache. A mask
        is 0 outside of the region; inside it is the number of the class, from 1, or 255 if there are no classes."""
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
        """Whether the patient's left is known to be on the right of each slice. It is known for the public set,
        for phantoms and for prepared scans: preparing refuses a scan that does not state its orientation."""
        return (self._folders[patient] / NAME).exists() or bool(SITE.match(patient.rpartition("/")[2]))

    def statistics(self, patient: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The volume's mean and deviation per channel, (3,) and (3,) float32, as
        `preprocessing.volume_statistics` gives."""
        measured = self._entries[patient]["measured"]
        return torch.tensor(measured["foreground_mean"]), torch.tensor(measured["foreground_deviation"])

    def image_statistics(self, patients: tuple[str, ...]) -> dict | None:
        """Statistics of these patients' images, from `appearance.features.image_statistics`."""
        return image_statistics([self._entries[patient]["measured"] for patient in patients])


def load_dataset(
    data_dir: Path, site: str | None = None, progress: bool = True, mask_suffix: str = MASK_SUFFIX
) -> Dataset:
    """The dataset at or below `data_dir`, checked. Its cache is built first if there is none or the files have
    changed.

    site: label of patients whose names carry no site code (default "own"). mask_suffix: what ends a mask's
    name. Raises MedFLError for wrong data.
    """
    found = _cohort(Path(data_dir), site or "own", mask_suffix)
    task = task_of(found.root)
    cache = cache_of(found.root, found.patients, task.numbers if task else {}, progress)
    dataset = Dataset(found.root, found.patients, cache, task)
    dataset.notes = [*found.left_out, *dataset.notes]
    return dataset


def find_dataset(data_dir: Path) -> Path:
    """The nearest folder that holds all patients at or below `data_dir`, as `cohort.find_cohort` finds them.
    Raises MedFLError if there is no patient, and for data that can't be right."""
    return _cohort(Path(data_dir), "own").root


def read_patients(root: Path, site: str) -> list[Patient]:
    """The patients in `root` and below it by name, each slice paired with its mask. Raises MedFLError as
    `find_dataset` does."""
    return _cohort(Path(root), site).patients


def _cohort(top: Path, site: str, mask_suffix: str = MASK_SUFFIX) -> Cohort:
    """The patients below `top`. If the folder holds a task, the sites are read from the patients' names by it."""
    with Contents(top) as contents:
        found = find_cohort(top, site, contents.of, mask_suffix)
    if task := task_of(found.root):
        found.patients[:] = [replace(p, site=task.site_of(p.name) or site) for p in found.patients]
    return found


def add_mask_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for masks with other names."""
    parser.add_argument(
        "--mask-suffix",
        default=MASK_SUFFIX,
        type=_mask_suffix,
        help=f"what a mask's name adds to the name of its slice (default {MASK_SUFFIX})",
    )


def _mask_suffix(text: str) -> str:
    if not text or text.lower().endswith(IMAGE_SUFFIXES) or set("/\\") & set(text):
        raise argparse.ArgumentTypeError("give the end of a mask's name without its .png, such as _seg")
    return text
