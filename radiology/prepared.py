"""The patients that data/prepare_hospital.py prepared, with and without masks, for a page that shows them."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from common import MedFLError
from radiology.layout import MORE, TRAINING, UNMASKED
from scans.folders import contents
from scans.naming import group_volumes
from scans.pairing import pair
from storage.files import file_sha256

STUDY = re.compile(r"(p[0-9a-f]{12})_s[0-9a-f]{8}")  # a pseudonym: the patient's part first


@dataclass(frozen=True)
class PreparedPatient:
    """A patient's folder. part: of the output. images: slices in numeric order. masks: one per slice, or empty if a
    slice has none. spare: mask files that are not used."""

    out: Path
    name: str
    part: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    spare: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        return self.out / self.part / self.name

    @property
    def person(self) -> str:
        """The part of the name that all studies of a person share."""
        found = STUDY.fullmatch(self.name)
        return found[1] if found else self.name


def find_prepared(out: Path) -> list[PreparedPatient]:
    """The prepared patients in a folder, by name. Raises MedFLError if the folder is missing or can't be read, or if
    a patient's folder holds slices of several names."""
    if not out.is_dir():
        raise MedFLError(f"there is no folder {out}; MEDFL_DATA names the --out of data/prepare_hospital.py")
    found: dict[str, PreparedPatient] = {}
    for part in (TRAINING, MORE, UNMASKED):
        if (out / part).is_dir():
            for folder in contents(out / part)[0]:
                patient = _patient(out, part, folder.name)
                if patient is not None:  # a save that was killed can leave a patient in its old part too
                    found.setdefault(patient.name, patient)
    return sorted(found.values(), key=lambda patient: patient.name)


def find_patient(out: Path, name: str) -> PreparedPatient | None:
    """The prepared patient of this name, or None. Raises MedFLError like `find_prepared`."""
    for part in (TRAINING, MORE, UNMASKED):
        if (out / part / name).is_dir() and (patient := _patient(out, part, name)):
            return patient
    return None


def _patient(out: Path, part: str, name: str) -> PreparedPatient | None:
    """The patient in a folder, or None if it holds no slices."""
    folder = out / part / name
    pairing = pair(contents(folder)[1])
    if not pairing.images:
        return None
    volumes = group_volumes(pairing.images, {folder})
    if len(volumes) > 1:
        raise MedFLError(f"{folder} holds slices with {len(volumes)} names; give each patient a folder")
    images = tuple(volumes[0][1])
    masks = tuple(pairing.masks[image] for image in images if image in pairing.masks)
    if len(masks) == len(images):
        return PreparedPatient(out, name, part, images, masks, tuple(pairing.alone.values()))
    return PreparedPatient(out, name, part, images, (), (*masks, *pairing.alone.values()))


def content_of(files: tuple[Path, ...]) -> str:
    """A digest of the content of these files, in hexadecimal. Raises MedFLError if one can't be read."""
    try:
        told = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
    except OSError as error:
        raise MedFLError(
            f"{error.filename} can't be read ({error.strerror}); open the patient again"
        ) from error
    return hashlib.sha256(told.encode()).hexdigest()
