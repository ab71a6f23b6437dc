"""An archive that speaks classic DICOM (DIMSE): studies are found with C-FIND, series fetched with C-GET, or with
C-MOVE to our own port. Nothing in the archive is changed or deleted.

The connection uses TLS if the login names certificates. Without TLS, names and scans cross the hospital's network
unencrypted, as they do between its scanners and the archive.
"""

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
)
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made when it is imported
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from common import MedFLError
from radiology.dimse_messages import (
    COMPRESSED,
    FIND,
    KINDS,
    PLAIN,
    drain,
    found_answers,
    identifier,
    of_series,
    offers,
    store_handler,
    stored_instances,
    text_of,
)
from radiology.login import Login
from radiology.retrieval import SUFFIX, Denied, FoundSeries, FoundStudy, Missing, Query, Unreachable
from radiology.values import whole_number_in

WAITS = (1.0, 4.0, 15.0)  # s, before the archive is asked again after a fault
TIMEOUT = 120  # s, for an answer
ADDRESS = re.compile(r"(?P<aet>[^@\\]{1,16})@(?P<host>\[[0-9a-fA-F:]+\]|[^@:]+):(?P<port>\d{1,5})")
GET = StudyRootQueryRetrieveInformationModelGet
MOVE = StudyRootQueryRetrieveInformationModelMove


class DIMSE:
    """An archive at AET@HOST:PORT. aet: our title. move_port: our port, to which the archive sends by C-MOVE; None
    for C-GET. Raises MedFLError for an address of another form."""

    def __init__(
        self,
        address: str,
        login: Login,
        aet: str = "MEDFL",
        move_port: int | None = None,
        waits: tuple[float, ...] = WAITS,
    ):
        parts = ADDRESS.fullmatch(address)
        if parts is None or not 0 < int(parts["port"]) < 65536:
            raise MedFLError(
                "the archive's address for DIMSE must be TITLE@HOST:PORT, such as PACS@10.0.0.5:104; "
                "correct it"
            )
        if login.token is not None or login.user is not None:
            raise MedFLError(
                "DIMSE has no tokens and no users, only certificates; remove them from the login"
            )
        self._called, self._host, self._port = parts["aet"], parts["host"].strip("[]"), int(parts["port"])
        self._aet, self._move_port, self._tls, self.waits = aet, move_port, login.tls(), waits
        self._listening_tls = None if move_port is None else login.listening_tls()

    def find_studies(self, query: Query) -> list[FoundStudy]:
        found = []
        for filters in query.each():
            asked = {"StudyInstanceUID": "", "PatientID": "", "StudyDate": "", **filters}
            for answer in self._find("STUDY", **asked):
                found.append(
                    FoundStudy(
                        str(answer.StudyInstanceUID),
                        text_of(answer, "PatientID"),
                        text_of(answer, "StudyDate"),
                    )
                )
        return found

    def find_series(self, study: str) -> list[FoundSeries]:
        names = (
            "SeriesInstanceUID",
            "Modality",
            "SeriesDescription",
            "SeriesNumber",
            "NumberOfSeriesRelatedInstances",
        )
        found = []
        for answer in self._find("SERIES", StudyInstanceUID=study, **dict.fromkeys(names, "")):
            uid, count = str(answer.SeriesInstanceUID), whole_number_in(text_of(answer, names[-1]))
            found.append(
                FoundSeries(
                    uid,
                    text_of(answer, "Modality"),
                    text_of(answer, "SeriesDescription"),
                    whole_number_in(text_of(answer, "SeriesNumber")),
                    len(self._find("IMAGE", **of_series(study, uid), SOPInstanceUID=""))
                    if count is None
                    else count,
                )
            )
        return found

    def header(self, study: str, series: str, folder: Path) -> pydicom.Dataset:
        """The header of one file of the series. The file stays in `folder`: this protocol can't send only headers."""
        if not any(folder.glob(f"*{SUFFIX}")):
            self._patiently(lambda: self._fetch_first(study, series, folder))
        path = next(iter(sorted(folder.glob(f"*{SUFFIX}"))), None)
        if path is None:
            raise Missing("the archive sends no file of this series")
        return pydicom.dcmread(path, stop_before_pixels=True)

    def fetch(self, study: str, series: str, folder: Path) -> None:
        """Write the files of a series that `folder` does not hold yet, as FOLDER/UID.dcm. A series that grows in
        the meantime is fetched until it no longer changes. Raises like the other methods, and MedFLError if the
        disk is full."""

        self._patiently(lambda: self._fetch_missing(study, series, folder))

    def _fetch_first(self, study: str, series: str, folder: Path) -> None:
        with self._transferring(series, folder) as (association, receive):
            instances = stored_instances(association, study, series)
            if not instances:
                raise Missing("the archive has no file of this series")
            receive(identifier("IMAGE", **of_series(study, series), SOPInstanceUID=min(instances)))

    def _fetch_missing(self, study: str, series: str, folder: Path) -> None:
        there = {path.stem for path in folder.glob(f"*{SUFFIX}")}
        with self._transferring(series, folder) as (association, receive):
            missing = stored_instances(association, study, series) - there
            if not missing:
                return
            if there:
                receive(identifier("IMAGE", **of_series(study, series), SOPInstanceUID=sorted(missing)))
            else:
                receive(identifier("SERIES", **of_series(study, series)))
            there = {path.stem for path in folder.glob(f"*{SUFFIX}")}
            if stored_instances(association, study, series) - there:
                raise Unreachable(
                    "the archive did not send all of a series, or it keeps growing; try again later"
                )

    def _find(self, level: str, **asked: str) -> list[Dataset]:
        def ask() -> list[Dataset]:
            with self._associated(FIND, [build_context(FIND)]) as association:
                return found_answers(association, level, **asked)

        return self._patiently(ask)

    @contextlib.contextmanager
    def _transferring(
        self, series: str, folder: Path
    ) -> Iterator[tuple[Association, Callable[[Dataset], None]]]:
        """An association that lists a series' files, and a function that makes the archive send the files of an
        identifier into a folder. Both use one association, because opening and closing one takes 0.1 s."""
        faults: list[MedFLError] = []
        storing = [(evt.EVT_C_STORE, store_handler(series, folder, faults))]
        if self._move_port is None:
            contexts = [build_context(FIND), build_context(GET), *offers()]
            roles = [build_role(kind, scp_role=True) for kind in KINDS]
            with self._associated(GET, contexts, ext_neg=roles, storing=storing) as association:
                yield association, lambda asked: drain(association.send_c_get(asked, GET), faults)
        else:
            contexts = [build_context(FIND), build_context(MOVE)]
            with self._listening(storing), self._associated(MOVE, contexts) as association:
                yield (
                    association,
                    lambda asked: drain(association.send_c_move(asked, self._aet, MOVE), faults),
                )

    @contextlib.contextmanager
    def _listening(self, storing: list) -> Iterator[None]:
        entity = AE(ae_title=self._aet)
        entity.supported_contexts = [build_context(kind, [*PLAIN, *COMPRESSED]) for kind in KINDS]
        try:
            server = entity.start_server(
                ("", self._move_port or 0),
                block=False,
                evt_handlers=storing,
                ssl_context=self._listening_tls,
            )
        except OSError as error:
            raise MedFLError(
                f"port {self._move_port} is not available; choose another --move-port"
            ) from error
        try:
            yield
        finally:
            if server is not None:
                server.shutdown()

    @contextlib.contextmanager
    def _associated(
        self, needed: UID, contexts: list, storing: Sequence = (), **more: Any
    ) -> Iterator[Association]:
        entity = AE(ae_title=self._aet)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT
        entity.connection_timeout = 10
        association = entity.associate(
            self._host,
            self._port,
            contexts,
            ae_title=self._called,
            tls_args=(self._tls, self._host) if self._tls else None,
            evt_handlers=[(evt.EVT_CONN_OPEN, _send_at_once), *storing],
            **more,
        )
        if association.is_rejected:
            raise Denied(
                f"the archive refuses {self._aet}, or is not called {self._called}; ask its administrator "
                "to register us"
            )
        if not association.is_established:
            tls = ", and the certificates on both sides" if self._tls else " (does it require TLS?)"
            raise Unreachable(
                f"the archive can't be reached by DIMSE; check address, port and network{tls}, and try again"
            )
        if all(context.abstract_syntax != needed for context in association.accepted_contexts):
            association.abort()
            raise MedFLError(
                "the archive does not offer this service of DIMSE; try with or without --move-port"
            )
        try:
            yield association
        finally:
            if association.is_established:
                association.release()

    def _patiently(self, ask: Callable) -> Any:
        """What `ask` returns. After a temporary fault, it is called again a few times."""
        for wait in self.waits:
            try:
                return ask()
            except Unreachable:
                time.sleep(wait)
        return ask()


def _send_at_once(event: Any) -> None:
    """Turn off Nagle's delay: a request goes out in two parts, and the second would otherwise wait 40 ms until the
    archive confirms the first."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
