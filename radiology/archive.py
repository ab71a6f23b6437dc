"""A run over an archive's studies: each is prepared once, put where it belongs and recorded, so that an
interrupted run can continue."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from common import MedFLError, counted
from radiology.layout import MORE, TRAINING, UNMASKED, has_truth, turn_in
from radiology.overview import SUFFIX, contact_sheet, report_rows, write_page, write_report, write_rows
from radiology.preparation import Prepared, prepare, write_study
from radiology.pseudonyms import Pseudonyms
from radiology.rules import FLAIR, Rules
from radiology.series import Refused
from radiology.studies import Study
from storage.files import atomic_write, file_sha256

VERSION = 4  # of the prepared files; with another version, every study is prepared again
MADE, REPORT = "prepared.json", "report.csv"  # in the private folder
FIRST_TIME = 315_532_800  # the earliest time of prepared files: the beginning of 1980, as in ZIP
PAGE, SHEETS = "index.html", "contact_sheets"  # in the output
NAMED = 5  # studies of earlier runs that a message names
PARTS = {
    TRAINING: "for training",
    MORE: "kept apart: another study of this patient is used for training",
    UNMASKED: "kept apart from training",
}


@dataclass
class Made:
    """The result for one study. fingerprint: of its files and the rules. part: the folder in the output. failures:
    by the series' uid."""

    fingerprint: str
    part: str
    slices: int
    mask: bool
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class Preparation:
    """A run that puts studies into `out`. tell: takes a sentence about a study. Raises MedFLError if the record
    of earlier runs is damaged."""

    def __init__(self, out: Path, pseudonyms: Pseudonyms, rules: Rules, tell: Callable[[str], None]):
        self.out, self.pseudonyms, self.rules, self.tell = out, pseudonyms, rules, tell
        self._file = pseudonyms.folder / MADE
        self._made = self._read()
        self._left_out: dict[str, str] = {}  # by the FLAIR's uid

    def run(self, studies: list[Study], show: bool = True) -> None:
        """Prepare every study that has a FLAIR, one after the other. A study that was already prepared from the
        same files is kept. show: whether to show a progress bar.

        The first study of a patient that has a mask is used for training. The others are kept apart: a split is
        by folder, and a patient with two folders could be on both sides of it. Raises MedFLError if a file
        can't be written.
        """
        for killed in self.out.glob(".preparing-*"):
            shutil.rmtree(killed, ignore_errors=True)
        with tqdm(total=len(studies), desc="preparing", unit="study", disable=None if show else True) as bar:
            for _, group in groupby(studies, lambda s: s.patient_id or s.uid):
                of_patient = list(group)
                trains = self._trains_already(of_patient)
                for study in of_patient:
                    if study.channels and (name := self._ready(study)) and self._made[name].mask:
                        self._place(name, MORE if trains else TRAINING)
                        trains = True
                    bar.update()

    def _trains_already(self, of_patient: list[Study]) -> bool:
        """Whether a study of this patient from an earlier export is used for training."""
        names = {self.pseudonyms.name(study.patient_id, study.uid) for study in of_patient}
        person = min(names).split("_")[0]
        return any(
            name.startswith(f"{person}_")
            and name not in names
            and made.mask
            and made.part == TRAINING
            and self.is_whole(name)
            for name, made in self._made.items()
        )

    def of(self, studies: list[Study]) -> list[Made]:
        """The results for these studies, without those that could not be prepared."""
        return [self._made[name] for name, _ in self._there(studies)]

    def write_overview(self, studies: list[Study], refused: list[Refused]) -> None:
        """Write the page of all prepared studies, and the report on every series."""
        there = self._there(studies)
        self._write_page([name for name, _ in there])
        names = {(study.patient_id, study.uid): name for name, study in there}
        named = [(names.get((study.patient_id, study.uid), ""), study) for study in studies]
        write_report(named, refused, self._failures(studies), self.pseudonyms.folder / REPORT)

    def prepare_one(self, study: Study) -> tuple[str, list[list]]:
        """Prepare one study. Returns its name ("" if it can't be prepared) and its lines in the report."""
        self.run([study], show=False)
        name = next((name for name, _ in self._there([study])), "")
        return name, report_rows(name, study, self._failures([study]))

    def write_overview_of(self, names: list[str], rows: list[list]) -> list[Made]:
        """Write the page of prepared studies, and the report, from the results of `prepare_one`. Returns the
        results for the studies that are there."""
        whole = [name for name in names if self.is_whole(name)]
        self._write_page(whole)
        write_rows(rows, self.pseudonyms.folder / REPORT)
        return [self._made[name] for name in whole]

    def _failures(self, studies: list[Study]) -> dict[str, str]:
        """Why chosen series could not be used, by their uids."""
        return {uid: why for made in self.of(studies) for uid, why in made.failures.items()} | self._left_out

    def _write_page(self, names: list[str]) -> None:
        entries = [
            {
                "name": name,
                "sheet": f"{SHEETS}/{name}{SUFFIX}",
                "slices": made.slices,
                "mask": made.mask,
                "part": PARTS[made.part],
                "notes": made.notes,
            }
            for name in sorted(names)  # not in the order of the patients' numbers
            for made in [self._made[name]]
        ]
        if entries:
            write_page(entries, self.out / PAGE)
        there = {folder.name for part in PARTS for folder in (self.out / part).glob("p*_s*")}
        if former := sorted(there - {*names}):
            more = ", …" if len(former) > NAMED else ""
            self.tell(
                f"{self.out} also holds {counted(len(former), 'folder')} of studies that are not among these "
                f"({', '.join(former[:NAMED])}{more}), and training reads them: delete those of patients who "
                "should not take part, and the cache of decoded scans"
            )

    def _read(self) -> dict[str, Made]:
        try:
            return {
                name: Made(**made)
                for name, made in json.loads(self._file.read_text(encoding="utf-8")).items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise MedFLError(
                f"{self._file} can't be read; delete it, and every study is prepared again"
            ) from error

    def _there(self, studies: list[Study]) -> list[tuple[str, Study]]:
        names = [
            (self.pseudonyms.name(study.patient_id, study.uid), study) for study in studies if study.channels
        ]
        return [(n, s) for n, s in names if self.is_whole(n) and s.channels[FLAIR].uid not in self._left_out]

    def is_whole(self, name: str) -> bool:
        """Whether a study of this name was prepared and is still there."""
        made = self._made.get(name)
        return made is not None and (self.out / made.part / name / "volume.json").exists()

    def _ready(self, study: Study) -> str | None:
        """The name of a study that is prepared now, or None if it can't be: the reason is reported, and the run
        continues with the other studies."""
        name = self.pseudonyms.name(study.patient_id, study.uid)
        fingerprint = _fingerprint(study, self.rules)
        if self._keeps_its_truth(name, fingerprint):
            return name
        if self.is_whole(name) and self._made[name].fingerprint == fingerprint:
            return name
        try:
            prepared = prepare(study, self.rules)
        except MedFLError as error:
            self._left_out[study.channels[FLAIR].uid] = str(error)
            self.tell(f"{name} is left out: {error}")
            return None
        part = UNMASKED if prepared.mask is None else TRAINING
        self.pseudonyms.save()
        if not self._put(prepared, part, name):
            return name if self._keeps_its_truth(name, fingerprint) else None
        self._remember(
            name,
            Made(
                fingerprint,
                part,
                len(prepared.volume),
                prepared.mask is not None,
                list(prepared.notes),
                prepared.failures,
            ),
        )
        for sentence in [*prepared.notes, *prepared.failures.values()]:
            self.tell(f"{name}: {sentence}")
        return name

    def _keeps_its_truth(self, name: str, fingerprint: str) -> bool:
        """Whether a person saved a truth for a study (radiology/truths.py). Such a study is left as it is, wherever
        it lies now."""
        part = has_truth(self.out, name)
        if part is None:
            return False
        before = self._made.get(name)
        if before is None or before.fingerprint != fingerprint:
            self.tell(
                f"{name} has a truth that a person saved, and is left unchanged; move its folder away to "
                "prepare it again"
            )
        slices = len(list((self.out / part / name).glob("*_mask.tif")))
        notes, failures = (before.notes, before.failures) if before else ([], {})
        made = Made(before.fingerprint if before else fingerprint, part, slices, True, notes, failures)
        if made != before:
            self._remember(name, made)
        return True

    def _put(self, prepared: Prepared, part: str, name: str) -> bool:
        """Write a study into a temporary folder, then move it to its place as a whole. Returns False, and moves
        nothing, if a person has saved a truth in the meantime."""
        beside = None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(dir=self.out, prefix=".preparing-"))
            (beside / name).mkdir()
            write_study(prepared, beside / name, name)
            contact_sheet(prepared.volume, prepared.mask).save(beside / "sheet.png")
            _hide_times(beside)
            with turn_in(self.out):
                if has_truth(self.out, name) is not None:
                    return False
                for old in PARTS:
                    shutil.rmtree(self.out / old / name, ignore_errors=True)
                _move(beside / "sheet.png", self.out / SHEETS / f"{name}{SUFFIX}")
                _move(beside / name, self.out / part / name)
            return True
        except OSError as error:
            raise MedFLError(
                f"{self.out} can't be written ({error.strerror or error}); free the space or change --out"
            ) from error
        finally:
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)

    def _place(self, name: str, part: str) -> None:
        made = self._made[name]
        if made.part != part:
            with turn_in(self.out):
                _move(self.out / made.part / name, self.out / part / name)
            made.part = part
            self._remember(name, made)

    def _remember(self, name: str, made: Made) -> None:
        self._made[name] = made
        with atomic_write(self._file, "w", private=True) as file:
            json.dump({name: asdict(made) for name, made in self._made.items()}, file)


def _fingerprint(study: Study, rules: Rules) -> str:
    """A digest that changes when a file of the study, the rules or the format of the prepared files changes."""
    digest = hashlib.sha256(f"{VERSION}\n{rules.text}\n".encode())
    for series in [*study.channels.values(), *([study.mask] if study.mask else [])]:
        for path in series.files:
            about = path.stat()
            digest.update(os.fsencode(f"{path} {about.st_size} {about.st_mtime_ns}\n"))
    return digest.hexdigest()


def _hide_times(folder: Path) -> None:
    """Give everything in a folder the same time, derived from its content. The real time would reveal when a study
    was prepared, and so the order of the patients' numbers. A constant time would hide a change from programs that
    compare only size and time."""
    inside = sorted(folder.rglob("*"))
    contents = "".join(file_sha256(path) for path in inside if path.is_file())
    when = FIRST_TIME + int(hashlib.sha256(contents.encode()).hexdigest()[:8], 16) // 4
    for path in inside:
        os.utime(path, (when, when))


def _move(what: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    what.replace(to)
