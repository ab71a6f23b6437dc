"""A study from an archive, like one from a folder: the series that the rules need, with their files fetched into a
folder that is removed after use.

Only headers cross the network before the rules have chosen.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Protocol

import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import RLELossless

from common import MedFLError
from radiology.bounds import InMemory
from radiology.headers import OTHER_MODALITY, OUTLINES, read_header
from radiology.rules import Rules
from radiology.segmentation import MANUFACTURER
from radiology.series import Series, find_series
from radiology.studies import Line, Study, plan_studies
from storage.files import run_folder

INCOMING = "incoming"  # in the private folder
SCANS = ("MR",)
SUFFIX = ".dcm"
DAMAGED = "the archive sends a file of it that can't be read"
UNREADABLE = (
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    RuntimeError,
)  # from pydicom, for invalid tags


class Missing(MedFLError):
    """The archive does not have the requested study or series."""


class Damaged(MedFLError):
    """A file that the archive sends can't be read."""


class Denied(MedFLError):
    """The archive refuses us, or we don't trust it; the same applies to every study."""


class Unreachable(MedFLError):
    """The archive did not answer, or not completely, at any try."""


@dataclass(frozen=True)
class Query:
    """A selection of studies. filters: by DICOM keyword, each must match. patients: their numbers; empty means all.
    since: the first day, YYYYMMDD."""

    filters: tuple[tuple[str, str], ...] = ()
    patients: tuple[str, ...] = ()
    since: str = ""

    def each(self) -> Iterator[dict[str, str]]:
        """The queries to the archive, one for each patient."""
        asked = dict(self.filters) | ({"StudyDate": f"{self.since}-"} if self.since else {})
        for patient in self.patients:
            yield asked | {"PatientID": patient}
        if not self.patients:
            yield asked


@dataclass(frozen=True)
class FoundStudy:
    """A study that an archive has. when: its date in DICOM's form."""

    uid: str
    patient_id: str
    when: str


@dataclass(frozen=True)
class FoundSeries:
    """A series in an archive's list. instances: the number of its files."""

    uid: str
    modality: str
    description: str
    number: int | None
    instances: int


class Archive(Protocol):
    """The methods of an archive. Each raises MedFLError if the archive refuses (Denied for the login), Missing if it
    does not have the object, Damaged for a file that can't be read, and Unreachable if it does not answer."""

    def find_studies(self, query: Query) -> list[FoundStudy]: ...

    def find_series(self, study: str) -> list[FoundSeries]: ...

    def header(self, study: str, series: str, folder: Path) -> pydicom.Dataset:
        """The header of one file of a series. folder: for the series, if an archive can send only whole files."""
        ...

    def fetch(self, study: str, series: str, folder: Path) -> None:
        """Write the files of a series that `folder` does not hold yet."""
        ...


def ordered(studies: list[FoundStudy]) -> list[FoundStudy]:
    """Each study once, sorted by patient and date: the order in which they are prepared."""
    return sorted(set(studies), key=lambda s: (s.patient_id, s.when, s.uid))


class Retrieval:
    """Fetches studies into `private`/incoming, which only its owner can read."""

    def __init__(self, archive: Archive, rules: Rules, private: Path):
        self.archive, self.rules = archive, rules
        self.folder = private / INCOMING

    def state_of(self, listed: list[FoundSeries]) -> str:
        """A digest of the rules and of the archive's series of a study. It changes when a series that could be used
        gets another file; objects that MedFL sent do not count."""
        used = sorted(
            f"{s.uid} {s.instances}"
            for s in listed
            if s.modality in SCANS + OUTLINES and not s.description.startswith(MANUFACTURER)
        )
        return hashlib.sha256("\n".join([self.rules.text, *used]).encode()).hexdigest()

    def plan(self, study: FoundStudy) -> Study:
        """The choice for a study, from the archive's list and one header of each series that could be used."""
        with passing_folder() as folder:
            listed = self.archive.find_series(study.uid)
            return self._plan(study, {s.uid: self._described(study, s, folder) for s in listed})

    @contextlib.contextmanager
    def fetched(
        self, study: FoundStudy, listed: list[FoundSeries], with_mask: bool = True
    ) -> Iterator[Study]:
        """A study like one from a folder, with the files of the listed series that the rules need. The files are
        removed when the block ends. They stay if it ends with an error after which another try may succeed.

        If a fetched series turns out to be unusable, the next that fits is taken. Raises MedFLError for a study
        that keeps changing while it is fetched.
        """
        folder = self._folder_of(study)
        try:
            yield self._fetch(study, {s.uid: s for s in listed}, folder, with_mask)
        except (Unreachable, KeyboardInterrupt):
            raise
        except MedFLError as error:
            if not isinstance(error.__cause__, OSError):  # a full disk can be emptied
                _remove(folder)
            raise
        _remove(folder)
        with contextlib.suppress(OSError):  # it may hold other studies
            self.folder.rmdir()

    def _folder_of(self, study: FoundStudy) -> Path:
        folder = self.folder / hashlib.sha256(study.uid.encode()).hexdigest()[:16]
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
        except OSError as error:
            raise MedFLError(
                f"{self.folder} can't be made ({error.strerror or error}); name another folder with --private"
            ) from error
        return folder

    def _fetch(
        self, study: FoundStudy, listed: dict[str, FoundSeries], folder: Path, with_mask: bool
    ) -> Study:
        if not listed:
            raise Missing("the archive has no such study; check its UID")
        known = {uid: self._described(study, s, folder) for uid, s in listed.items()}
        here: set[str] = set()
        while True:
            plan = self._plan(study, known)
            wanted = [*plan.channels.values(), *([plan.mask] if plan.mask and with_mask else [])]
            if not (needed := [series for series in wanted if series.uid not in here]):
                return plan
            for series in needed:
                place = _series_folder(folder, series.uid)
                try:
                    self.archive.fetch(study.uid, series.uid, place)
                    known[series.uid] = _read(place, listed[series.uid], known[series.uid])
                except Damaged as error:
                    known[series.uid] = replace(known[series.uid], problems=(str(error),))
                here.add(series.uid)

    def _plan(self, study: FoundStudy, known: dict[str, Series]) -> Study:
        """The rules' choice; masks that MedFL drew are not used as truth."""
        own = [s for s in known.values() if s.modality in OUTLINES and s.manufacturer == MANUFACTURER]
        others = [
            replace(s, patient_id=study.patient_id, study_uid=study.uid)
            for s in _of_one_patient(study, [s for s in known.values() if s not in own])
        ]
        lines = tuple(Line(s, "", "MedFL drew it, so it is not a truth") for s in own)
        if not others:
            return Study(study.patient_id, study.uid, study.when, {}, None, None, lines)
        (plan,) = plan_studies(others, self.rules)
        return replace(plan, when=plan.when or study.when, lines=plan.lines + lines)

    def _described(self, study: FoundStudy, listed: FoundSeries, folder: Path) -> Series:
        """A series from its header, with the number of slices that the archive states."""
        if listed.modality not in SCANS + OUTLINES:
            return _bare(listed, f"{OTHER_MODALITY} {listed.modality or 'unknown'}, not MR")
        try:
            header = self.archive.header(study.uid, listed.uid, _series_folder(folder, listed.uid))
            return _from_header(header, listed)
        except Missing:
            return _bare(listed, "the archive lists it but has no file of it")
        except Damaged as error:
            return _bare(listed, str(error))
        except UNREADABLE:  # pydicom can't convert the header; the fetched files decide
            return _bare(listed)


def _of_one_patient(study: FoundStudy, found: list[Series]) -> list[Series]:
    """These series, with a problem for those of another patient than the study's, if they are of several."""
    if len({series.patient_id for series in found} - {""}) < 2:
        return found  # an archive that corrects a number in its list may leave it in all files as it was
    told = (
        "the study's series are of several patients, and this one is not of the patient in the archive's list"
    )
    return [
        series
        if series.patient_id in ("", study.patient_id)
        else replace(series, problems=(*series.problems, told))
        for series in found
    ]


def _series_folder(folder: Path, uid: str) -> Path:
    return folder / hashlib.sha256(uid.encode()).hexdigest()[:16]


def _bare(listed: FoundSeries, *problems: str) -> Series:
    """A series with only the data from the archive's list."""
    return Series(
        uid=listed.uid,
        study_uid="",
        patient_id="",
        modality=listed.modality,
        description=listed.description,
        number=listed.number,
        files=(Path(),) * listed.instances,
        problems=problems,
    )


def _from_header(header: pydicom.Dataset, listed: FoundSeries) -> Series:
    """The series that its files would form, as far as the header of one file shows."""
    header = pydicom.Dataset({e.tag: e for e in header if e.tag.group not in (0x0002, 0x7FE0)})
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = RLELossless  # the length of compressed pixels is not checked
    header.file_meta.MediaStorageSOPClassUID = header.get("SOPClassUID", "")
    header.file_meta.MediaStorageSOPInstanceUID = header.get("SOPInstanceUID", "")
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, header, implicit_vr=False, little_endian=True, enforce_file_format=True)
    found, refused = find_series([InMemory(listed.uid, buffer.getvalue())])
    if not found:
        return _bare(listed, refused[0].why)
    (series,) = found
    if series.frames or series.modality in OUTLINES:
        return series
    of_file = read_header(
        InMemory(listed.uid, buffer.getvalue())
    ).problems  # one slice is not enough to check the geometry
    return replace(series, files=(Path(),) * listed.instances, problems=tuple(of_file))


def _read(folder: Path, listed: FoundSeries, described: Series) -> Series:
    """The series that fetched files form."""
    found, refused = find_series(sorted(folder.glob(f"*{SUFFIX}")))
    mine = [series for series in found if series.uid == listed.uid]
    if refused or not mine:
        why = refused[0].why if refused else "the archive sent another series"
        return replace(described, problems=(f"a file of it can't be used: {why}",))
    return mine[0]


@contextlib.contextmanager
def passing_folder() -> Iterator[Path]:
    """A folder for files that name patients, which only its owner can read. It is removed when the block ends,
    together with the folders of killed runs."""
    folder = run_folder("study")
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove fetched files. Raises MedFLError if they can't be removed, because they name patients."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise MedFLError(
            f"{folder} holds scans with names and can't be removed ({error.strerror or error}); remove it by hand"
        ) from error
