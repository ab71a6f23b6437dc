"""How sure a model is about each prepared patient: measured once for each model, and stored beside the patients."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from borders.limits import MAX_TEXT
from evaluation.failures import confidence
from radiology.layout import MORE, TRAINING, UNMASKED, turn_in
from radiology.prepared import PreparedPatient
from storage.files import atomic_write

FOLDER = ".medfl-sureness"  # hidden, so that training does not read it
MODELS = 5  # number of files that are kept: those of the models that were used last

Share = Annotated[float, Field(ge=0, le=1)]


class Sureness(BaseModel):
    """The Dice that a model expects of its own masks. patients: by name, the size and time of the slices, and the
    Dice."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    model_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    patients: dict[str, tuple[str, Share]] = {}


def known_sureness(out: Path, sha256: str, patients: Iterable[PreparedPatient]) -> dict[str, float]:
    """The Dice that a model expects of its mask, 0 to 1, by name, for the patients that were measured and whose slices
    have not changed. Empty for a damaged file."""
    told = _read(out, sha256).patients
    return {
        patient.name: told[patient.name][1]
        for patient in patients
        if patient.name in told and told[patient.name][0] == _stamp(patient)
    }


def keep_sureness(patient: PreparedPatient, sha256: str, probability: np.ndarray, mask: np.ndarray) -> float:
    """Measure how sure a model is about a patient, and store the value. probability: (S, H, W) float32; mask: the
    model's. Raises MedFLError if the file can't be written."""
    value = min(1.0, max(0.0, confidence(probability, mask)))
    with turn_in(patient.out):
        told = _read(patient.out, sha256)
        told.patients = {name: entry for name, entry in told.patients.items() if _is_there(patient.out, name)}
        told.patients[patient.name] = (_stamp(patient), value)
        with atomic_write(_file(patient.out, sha256), "w") as file:
            file.write(told.model_dump_json())
        _remove_others(patient.out / FOLDER)
    return value


def least_sure_first(
    patients: Iterable[PreparedPatient], sureness: dict[str, float]
) -> list[PreparedPatient]:
    """Patients without masks first. In each group, the least sure come first, and unmeasured patients last."""
    return sorted(patients, key=lambda p: (bool(p.masks), sureness.get(p.name, 2.0), p.name))


def _is_there(out: Path, name: str) -> bool:
    return any((out / part / name).is_dir() for part in (TRAINING, MORE, UNMASKED))


def _stamp(patient: PreparedPatient) -> str:
    about = [path.stat() for path in patient.images]
    return f"{sum(one.st_size for one in about)} {max(one.st_mtime_ns for one in about)}"


def _file(out: Path, sha256: str) -> Path:
    return out / FOLDER / f"{sha256[:16]}.json"


def _read(out: Path, sha256: str) -> Sureness:
    """The stored values; empty if the file is missing, too large, or was not written by this program."""
    path = _file(out, sha256)
    try:
        if path.stat().st_size <= MAX_TEXT:
            told = Sureness.model_validate_json(path.read_bytes())
            if told.model_sha256 == sha256:
                return told
    except (OSError, ValueError):
        pass
    return Sureness(model_sha256=sha256)


def _remove_others(folder: Path) -> None:
    """Keep only the files that were written last."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in files[MODELS:]:
        path.unlink(missing_ok=True)
