"""A mask that a person corrected becomes the truth of a prepared patient, where training finds it.

A new folder with the new masks replaces the patient's old folder, completely or not at all. Former masks stay in its
hidden folder `.former`, and `truth.jsonl` records each save, one line each.
"""

import contextlib
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from common import MedFLError, counted
from radiology.layout import LOG, MORE, TRAINING, UNMASKED, turn_in
from radiology.prepared import PreparedPatient, content_of, find_patient, find_prepared
from scans.pictures import picture_size
from tasks import task_of

FORMER = ".former"
SAVING, OLD = ".saving-", "old"

Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Correction(BaseModel):
    """Who corrected a proposal, and the model that made it. threshold: of the proposal."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    who: Annotated[str, Field(min_length=1, max_length=100)]
    model: Name
    model_sha256: Sha256
    threshold: Annotated[float, Field(ge=0, le=1)]


class Saved(Correction):
    """A line of a patient's log. pixels: of tumour in the truth; proposed_pixels: of tumour in the proposal;
    changed_pixels: pixels in which the two differ; former: folder of the masks that were the truth before."""

    version: Literal[1] = 1
    when: AwareDatetime
    patient: Name
    slices: Annotated[int, Field(ge=1)]
    pixels: Count
    proposed_pixels: Count
    changed_pixels: Count
    former: str | None = None
    masks_sha256: Sha256


class ChangedMeanwhile(MedFLError):
    """Somebody else saved a truth while this one was being made. version: of the truth that is there now."""

    def __init__(self, told: str, version: str):
        super().__init__(told)
        self.version = version


def version_of(patient: PreparedPatient) -> str:
    """A digest of the truth that a patient has now, "" if there is none."""
    return content_of(patient.masks) if patient.masks else ""


def correction(who: str, model: str, sha256: str, threshold: float) -> Correction:
    """The data that a save needs. Raises MedFLError for a name that is missing or too long."""
    try:
        return Correction(who=who, model=model, model_sha256=sha256, threshold=threshold)
    except ValidationError as error:
        raise MedFLError(
            "the log needs the name of the person who corrects, 1 to 100 letters; enter yours"
        ) from error


def read_log(folder: Path) -> list[Saved]:
    """The lines of a patient's log, the oldest first. Raises MedFLError for a damaged one."""
    path = folder / LOG
    try:
        return [Saved.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:  # pydantic's is a ValueError
        raise MedFLError(f"{path} can't be read as a log of truths; move it away to start another") from error


def save_truth(
    patient: PreparedPatient,
    mask: np.ndarray,
    proposal: np.ndarray,
    by: Correction,
    slices: str,
    version: str,
) -> tuple[PreparedPatient, Saved]:
    """Make a mask the truth of a prepared patient. Returns the patient as it lies now, and the line in the log.

    A patient without masks moves to the training patients, or to `more_studies` if another study of the same person
    is used for training.

    Args:
        mask: (S, H, W), the patient's slices in order, non-zero is tumour.
        proposal: the model's mask, of the same shape.
        slices: `content_of` the slices that the mask was drawn on.
        version: `version_of` the patient at that time.

    Raises:
        ChangedMeanwhile: another truth was saved since.
        MedFLError: the mask does not belong to these slices, the masks there hold several classes, or a file can't be
            written. Nothing has changed then.
    """
    if (task := task_of(patient.out)) and task.classes:
        raise MedFLError(
            f"the masks in {patient.out} tell {' and '.join(one.name for one in task.classes)} apart, and a saved mask "
            "only tells the region; download the masks, correct them in another program, and put them there"
        )
    with turn_in(patient.out):
        _recover(patient.out)
        here = find_patient(patient.out, patient.name)
        if here is None:
            raise MedFLError(f"{patient.name} is not in {patient.out} any more; close it and choose another")
        if content_of(here.images) != slices:
            raise MedFLError(
                f"the slices of {patient.name} have changed since they were opened; open the patient again"
            )
        _check(here, mask, proposal)
        log = read_log(here.folder)
        if (now := version_of(here)) != version:
            by_whom = f"{log[-1].who} saved" if log else "there is"
            raise ChangedMeanwhile(
                f"{by_whom} another truth of {patient.name} in the meantime; save again to replace it with "
                "yours (the other is kept as a former one), or open the patient again to look at it",
                now,
            )
        part = here.part if here.masks else _part_for(here)
        try:
            return _put(here, part, (mask > 0) * np.uint8(255), proposal > 0, by)
        except OSError as error:
            raise MedFLError(
                f"{patient.out} can't be written ({error.strerror or error}); free the space, and save again"
            ) from error


def _check(patient: PreparedPatient, mask: np.ndarray, proposal: np.ndarray) -> None:
    """Raises MedFLError for a mask that does not fit these slices."""
    columns, rows = picture_size(patient.images[0])
    wanted = (len(patient.images), rows, columns)
    for what, values in (("mask", mask), ("proposal", proposal)):
        if values.shape != wanted:
            raise MedFLError(
                f"the {what} has {' × '.join(map(str, values.shape))} pixels, but {patient.name} has "
                f"{' × '.join(map(str, wanted))} (slices, rows, columns); open the patient again and "
                "correct it there"
            )
        if values.dtype not in (np.uint8, np.bool_):
            raise MedFLError(f"the {what} holds {values.dtype}, not 0 and 255; convert it first")


def _part_for(patient: PreparedPatient) -> str:
    """The part of the output for a patient who has just got the first masks. A split is by folder, so a person with
    two folders could be on both sides of it."""
    others = (one for one in find_prepared(patient.out) if one.name != patient.name)
    trains = any(one.part == TRAINING and one.masks and one.person == patient.person for one in others)
    return MORE if trains else TRAINING


def _put(
    patient: PreparedPatient, part: str, mask: np.ndarray, proposal: np.ndarray, by: Correction
) -> tuple[PreparedPatient, Saved]:
    """Write a new folder for the patient, and move it to where it belongs."""
    beside = Path(tempfile.mkdtemp(dir=patient.out, prefix=SAVING))
    try:
        new, old_masks = beside / patient.name, (*patient.masks, *patient.spare)
        new.mkdir()
        former = _free_place(patient.folder) if old_masks else None
        for source in sorted(patient.folder.rglob("*")):
            to = new / source.relative_to(patient.folder)
            if source in old_masks:
                to = new / str(former) / source.name
            if source.is_file() and source.name != LOG:
                to.parent.mkdir(parents=True, exist_ok=True)
                _same_file(source, to)
        masks = tuple(new / f"{image.stem}_mask.tif" for image in patient.images)
        for path, pixels in zip(masks, mask, strict=True):
            with open(path, "wb") as file:
                Image.fromarray(pixels).save(file, format="TIFF")
                file.flush()
                os.fsync(file.fileno())
        saved = Saved(
            **by.model_dump(),
            when=datetime.now(UTC),
            patient=patient.name,
            slices=len(mask),
            pixels=int(np.count_nonzero(mask)),
            proposed_pixels=int(np.count_nonzero(proposal)),
            changed_pixels=int(np.count_nonzero((mask > 0) != proposal)),
            former=former,
            masks_sha256=content_of(masks),
        )
        _write_log(patient.folder / LOG, saved, new / LOG)
        _take_its_place(patient, part, new, beside / OLD)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    there = find_patient(patient.out, patient.name)
    assert there is not None and there.part == part
    return there, saved


def _free_place(folder: Path) -> str:
    """A new folder name for masks that were the truth."""
    number = 1
    while (folder / FORMER / f"{number:04}").exists():
        number += 1
    return f"{FORMER}/{number:04}"


def _same_file(source: Path, to: Path) -> None:
    """Link a file under another name; copy it if the file system has no hard links."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)


def _write_log(old: Path, saved: Saved, new: Path) -> None:
    """Write the old lines and a new one."""
    before = old.read_bytes() if old.exists() else b""
    with open(new, "wb") as file:
        file.write(before + saved.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _take_its_place(patient: PreparedPatient, part: str, new: Path, old: Path) -> None:
    """Put a new folder where the patient belongs. Between the two renames the old folder lies in `old`. If the
    process is killed there, `_recover` brings it back."""
    place = patient.out / part / patient.name
    place.parent.mkdir(parents=True, exist_ok=True)
    if part != patient.part:
        new.rename(place)
        shutil.rmtree(patient.folder, ignore_errors=True)
        return
    kept = old / (part or "train") / patient.name
    kept.parent.mkdir(parents=True)
    patient.folder.rename(kept)
    try:
        new.rename(place)
    except OSError:
        kept.rename(place)
        raise


def _recover(out: Path) -> None:
    """Bring back the folders that a killed save had put aside, and remove its remains. Runs under the folder's lock,
    so no save is in progress."""
    for left in out.glob(f"{SAVING}*"):
        for kept in left.glob(f"{OLD}/*/*"):
            place = out / ("" if kept.parent.name == "train" else kept.parent.name) / kept.name
            if not place.exists():
                with contextlib.suppress(OSError):
                    kept.rename(place)
        shutil.rmtree(left, ignore_errors=True)
    for name in [path.name for path in (out / UNMASKED).glob("*")]:
        if any(
            (out / part / name / LOG).exists() for part in (TRAINING, MORE)
        ):  # it was moved, but the old folder was not removed
            shutil.rmtree(out / UNMASKED / name, ignore_errors=True)


def in_words(saved: Saved) -> str:
    """A line of the log as a sentence."""
    return (
        f"{saved.when:%Y-%m-%d %H:%M} UTC, {saved.who}: {counted(saved.changed_pixels, 'pixel')} of the proposal by "
        f"{saved.model} changed"
    )
