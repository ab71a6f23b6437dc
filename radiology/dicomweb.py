"""An archive that speaks DICOMweb: studies found (QIDO-RS), series fetched (WADO-RS), objects sent (STOW-RS).

Nothing in the archive is changed or deleted. Scans are fetched as they are stored, compressed or not.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pydicom
import requests
import urllib3
from dicomweb_client import DICOMwebClient
from requests.adapters import HTTPAdapter

from common import MedFLError
from radiology.login import Login
from radiology.retrieval import (
    DAMAGED,
    SUFFIX,
    Damaged,
    Denied,
    FoundSeries,
    FoundStudy,
    Missing,
    Query,
    Unreachable,
)
from radiology.values import is_uid, whole_number_in
from storage.files import atomic_write

WAITS = (1.0, 4.0, 15.0)  # s, before the archive is asked again after a fault
TIMEOUT = (10, 120)  # s, to connect, and between two pieces of an answer
PAGE = 200  # entries of a list in one request
AGAIN = {408, 425, 429, 500, 502, 503, 504}  # answers after which another try may succeed
KEYS = (
    "0020000D",
    "0020000E",
    "00080018",
)  # UIDs of study, series and instance, which identify an entry of a list
AS_STORED = (("application/dicom", "*"),)
HERE = {"localhost", "127.0.0.1", "::1"}
# of the connection, as its libraries raise them
BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, ConnectionError)
T = TypeVar("T")


class _Changed(Exception):
    """A series got more files while it was fetched."""


class _WildcardsAsTheyAre(HTTPAdapter):
    """Sends the wildcards * and ? of a query unescaped, as a URL allows: Orthanc 1.10 finds nothing otherwise."""

    def send(self, request: requests.PreparedRequest, *more: Any, **how: Any) -> requests.Response:
        address, mark, query = (request.url or "").partition("?")
        request.url = address + mark + query.replace("%2A", "*").replace("%3F", "?")
        return super().send(request, *more, **how)


class _Encrypted(HTTPAdapter):
    """Sends nothing unencrypted to another machine, even if an archive redirects there."""

    def send(self, request: requests.PreparedRequest, *more: Any, **how: Any) -> requests.Response:
        if (refusal := _clear_text(request.url or "")) is not None:
            raise Denied(f"the archive redirects to {refusal}; correct its settings, or the address")
        return super().send(request, *more, **how)


class DICOMweb:
    """An archive at an address such as https://pacs.example/dicom-web. waits: seconds before each further try.

    Raises MedFLError for an address that is not valid, contains a password, or is unencrypted and on another
    machine.
    """

    def __init__(self, url: str, login: Login, waits: tuple[float, ...] = WAITS):
        self.waits = waits
        _check_address(url)
        session = login.session()
        session.mount("http://", _Encrypted())
        session.mount(url.rstrip("/") + "/", _WildcardsAsTheyAre())  # and no address that only begins so
        self._client = DICOMwebClient(url.rstrip("/"), session=session, timeout=TIMEOUT)
        self._client.set_http_retry_params(retry=False)  # its own retries don't know of broken connections

    def find_studies(self, query: Query) -> list[FoundStudy]:
        found = []
        for filters in query.each():
            for entry in self._list(self._client.search_for_studies, search_filters=filters):
                uid, patient, when = (_text(entry, t) for t in ("0020000D", "00100020", "00080020"))
                found.append(FoundStudy(_checked(uid), patient, when))
        return found

    def find_study(self, uid: str) -> FoundStudy:
        """One study. Raises Missing if the archive has no study with this UID."""
        found = self.find_studies(Query((("StudyInstanceUID", _checked(uid)),)))
        if not found:
            raise Missing(f"the archive has no study {uid}; check --study")
        return found[0]

    def find_series(self, study: str) -> list[FoundSeries]:
        fields = ["SeriesDescription", "NumberOfSeriesRelatedInstances"]
        found = []
        for entry in self._list(self._client.search_for_series, study, fields=fields):
            count = whole_number_in(_text(entry, "00201209"))
            uid = _checked(_text(entry, "0020000E"))
            found.append(
                FoundSeries(
                    uid,
                    _text(entry, "00080060"),
                    _text(entry, "0008103E"),
                    whole_number_in(_text(entry, "00200011")),
                    len(self._instances(study, uid)) if count is None else count,
                )
            )
        return found

    def header(self, study: str, series: str, folder: Path) -> pydicom.Dataset:
        instances = self._list(self._client.search_for_instances, study, series, first_only=True)
        if not instances:
            raise Missing("the archive has no file of this series")
        uid = _checked(_text(instances[0], "00080018"))
        told: Any = self._patiently(lambda: self._client.retrieve_instance_metadata(study, series, uid))
        entry = told[0] if isinstance(told, list) else told
        return pydicom.Dataset.from_json(entry, bulk_data_uri_handler=lambda *_: None)

    def fetch(self, study: str, series: str, folder: Path) -> None:
        """Write the files of a series that `folder` does not hold yet, as FOLDER/UID.dcm. A series that grows in
        the meantime is fetched until it no longer changes. Raises like the other methods, Damaged for a file that
        can't be read, and MedFLError if the disk is full."""
        self._patiently(lambda: self._fetch_missing(study, series, folder))

    def has(self, study: str, series: str, instance: str) -> bool:
        """Whether the archive has an object."""
        return instance in self._instances(study, series)

    def send(self, study: str, objects: Sequence[pydicom.Dataset]) -> None:
        """Store objects in the archive. Raises MedFLError if the archive does not accept all of them."""
        answer = self._patiently(lambda: self._client.store_instances(list(objects), study))
        if failed := answer.get("FailedSOPSequence"):
            reason = failed[0].get("FailureReason")
            raise MedFLError(
                f"the archive did not accept {len(failed)} of {len(objects)} objects (reason {reason}); its "
                "log says more"
            )

    def _fetch_missing(self, study: str, series: str, folder: Path) -> None:
        expected = self._instances(study, series)
        if not expected:
            raise Missing("the archive has no file of this series")
        there = {path.stem for path in folder.glob(f"*{SUFFIX}")}
        try:
            if not there:
                for content in self._client.iter_series(study, series, media_types=AS_STORED):
                    _save(content, folder)
            else:
                for uid in sorted(expected - there):
                    _save(self._client.retrieve_instance(study, series, uid, media_types=AS_STORED), folder)
        except (MedFLError, *BROKEN):
            raise
        except Exception as error:  # the client reads each file with pydicom, which raises many kinds
            raise Damaged(DAMAGED) from error
        there = {path.stem for path in folder.glob(f"*{SUFFIX}")}
        if self._instances(study, series) - there:
            raise _Changed

    def _instances(self, study: str, series: str) -> set[str]:
        listed = self._list(self._client.search_for_instances, study, series)
        return {_checked(_text(entry, "00080018")) for entry in listed}

    def _list(self, search: Callable, *where: str, first_only: bool = False, **how: Any) -> list[dict]:
        """A complete list from the archive, page by page. Some archives ignore which page is requested, so the list
        ends when a page has nothing new."""
        entries: dict[tuple[str, ...], dict] = {}
        while True:
            page = partial(
                _listed, search, *where, limit=1 if first_only else PAGE, offset=len(entries), **how
            )
            before = len(entries)
            for entry in self._patiently(page):
                entries.setdefault(tuple(_text(entry, tag) for tag in KEYS), entry)
            if first_only or len(entries) - before == 0:
                return list(entries.values())

    def _patiently(self, ask: Callable[[], T]) -> T:
        """What `ask` returns. After a temporary fault, it is called again a few times."""
        for wait in (*self.waits, None):
            try:
                return ask()
            except _Changed:
                fault = "a series keeps growing while it is fetched; try again when the study is complete"
            except requests.HTTPError as error:
                fault = _judge(error)
            except requests.exceptions.SSLError as error:
                raise Denied(
                    "the archive's certificate, or ours, fails the check of TLS; name the CA of the "
                    "archive's certificate as authority in the login's file, or correct the address"
                ) from error
            except BROKEN:
                fault = (
                    "the archive can't be reached, or the connection was lost; check the address and the "
                    "network, and try again"
                )
            except (ValueError, KeyError, RecursionError) as error:  # not DICOM as JSON or multipart
                raise MedFLError("the archive's answer is not DICOMweb; check the address") from error
            if wait is None:
                break
            time.sleep(wait)
        raise Unreachable(fault)


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise MedFLError(
            "the archive's address is not a URL; give one such as https://pacs.example/dicom-web"
        )
    if parts.username or parts.password or parts.query:
        raise MedFLError(
            "the archive's address contains a login, which others can see there; put it into a --login file"
        )
    if (refusal := _clear_text(url)) is not None:
        raise MedFLError(f"{refusal}; use https://")


def _clear_text(url: str) -> str | None:
    """Why nothing is sent to an address, or None if it is encrypted or on this machine."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname in HERE:
        return None
    return f"http://{parts.hostname}, which is not encrypted, so names would cross the network in clear text"


def _judge(error: requests.HTTPError) -> str:
    """What an error's status means, if another try may succeed; raises MedFLError otherwise."""
    status = 0 if error.response is None else error.response.status_code
    if status in (401, 403):
        raise MedFLError(
            f"the archive refuses the login ({status}); check --login and the account's rights"
        ) from error
    if status in (404, 410):
        raise Missing("the archive does not have it, or the address is not that of DICOMweb (404)") from error
    if status not in AGAIN:
        raise MedFLError(f"the archive refuses the request ({status}); its log says more") from error
    return f"the archive reports an internal error ({status}); try again later"


def _listed(search: Callable, *where: str, **how: Any) -> list[dict]:
    """The archive's answer to a search. Raises ValueError if it is not a list of tags as JSON."""
    told = search(*where, **how)
    if not isinstance(told, list) or not all(
        isinstance(entry, dict) and all(isinstance(element, dict) for element in entry.values())
        for entry in told
    ):
        raise ValueError("not a list of tags")
    return told


def _text(entry: dict, tag: str) -> str:
    values = entry.get(tag, {}).get("Value")
    first = values[0] if isinstance(values, list) and values else None
    return "" if first is None else str(first).strip()


def _checked(uid: str) -> str:
    if not is_uid(uid):
        raise MedFLError("a UID of the study is not valid; a UID consists of digits and points")
    return uid


def _save(content: pydicom.Dataset, folder: Path) -> None:
    uid, encoded = str(content.SOPInstanceUID), BytesIO()
    if not is_uid(uid):
        raise ValueError("a file without a valid UID")
    content.save_as(encoded)  # before the file is opened: an error of pydicom's is not one of the disk
    with atomic_write(folder / f"{uid}{SUFFIX}", private=True) as file:
        file.write(encoded.getbuffer())
