"""The scripts' options about an archive, and the archive and the query that they describe."""

import argparse
from datetime import date
from pathlib import Path

from pydicom.datadict import tag_for_keyword

from common import MedFLError
from radiology.dicomweb import DICOMweb
from radiology.dimse import DIMSE
from radiology.login import PROMPT, read_login
from radiology.retrieval import Query
from storage.files import text_of


def add_login_option(parser: argparse.ArgumentParser) -> None:
    """Add --login."""
    parser.add_argument(
        "--login",
        help="file with the login for the archive (docs/archive.md), readable only by you; or "
        f'"{PROMPT}" for user and password at a prompt',
    )


def add_query_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select studies."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--patients", type=Path, help="file with patients' numbers (PatientID), one per line")
    which.add_argument(
        "--query",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="select the archive's studies by DICOM keyword, such as StudyDescription=*BRAIN*",
    )
    parser.add_argument("--since", metavar="DATE", help="only studies from this day on, such as 2026-01-31")


def add_dimse_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for our side of DIMSE."""
    parser.add_argument("--aet", default="MEDFL", help="our title for DIMSE (default MEDFL)")
    parser.add_argument(
        "--move-port",
        type=int,
        metavar="PORT",
        help="our port for C-MOVE, as set in the archive (default: C-GET is used, which needs no port)",
    )


def connect(arguments: argparse.Namespace) -> DICOMweb | DIMSE:
    """The archive that the options name. Raises MedFLError for an invalid address or login."""
    login = read_login(arguments.login)
    if arguments.dicomweb is not None:
        return DICOMweb(arguments.dicomweb, login)
    return DIMSE(arguments.dimse, login, arguments.aet, arguments.move_port)


def read_query(arguments: argparse.Namespace) -> Query:
    """The query that the options describe. Raises MedFLError for a key that is no DICOM keyword, an invalid date, or a
    file without a number."""
    filters = []
    for entry in arguments.query:
        key, separator, value = entry.partition("=")
        if not (separator and value) or tag_for_keyword(key) is None:
            raise MedFLError(
                f"--query {entry} is not KEY=VALUE with a DICOM keyword; write for example "
                "StudyDescription=*BRAIN*"
            )
        filters.append((key, value))
    return Query(tuple(filters), _read_patients(arguments.patients), _day(arguments.since))


def _read_patients(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = text_of(path).splitlines()
    except (OSError, ValueError) as error:
        raise MedFLError(f"{path} can't be read as text; check --patients") from error
    patients = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not patients:
        raise MedFLError(f"{path} names no patient; write one number per line")
    if any(set(patient) & set("*?\\") for patient in patients):
        raise MedFLError(f"{path} holds a number with *, ? or \\, which would also match others; correct it")
    return patients


def _day(text: str | None) -> str:
    if text is None:
        return ""
    try:
        day = date.fromisoformat(text)
    except ValueError as error:
        raise MedFLError(f"--since {text} is not a date; write for example 2026-01-31") from error
    return f"{day:%Y%m%d}"
