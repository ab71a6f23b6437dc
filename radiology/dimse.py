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
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    UID,
    EnhancedMRImageStorage,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    RTStructureSetStorage,
    SegmentationStorage,
)
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made when it is imported
    LegacyConvertedEnhancedMRImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from common import MedFLError
from radiology.login import Login
from radiology.retrieval import SUFFIX, Denied, FoundSeries, FoundStudy, Missing, Query, Unreachable
from storage.files import atomic_write

WAITS = (1.0, 4.0, 15.0)  # s, before the archive is asked again after a fault
TIMEOUT = 120  # s, for an answer
ADDRESS = re.compile(r"(?P<aet>[^@\\]{1,16})@(?P<host>\[[0-9a-fA-F:]+\]|[^@:]+):(?P<port>\d{1,5})")
FIND, GET, MOVE = (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)
PENDING, SUCCESS, FULL = (0xFF00, 0xFF01), 0x0000, 0xA700
KINDS = (
    MRImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    SegmentationStorage,
    RTStructureSetStorage,
)
COMPRESSED = (  # each is offered separately, so that an archive sends files as they are stored
    JPEGLosslessSV1,
    JPEGLossless,
    JPEGLSLossless,
    JPEG2000Lossless,
    JPEG2000,
    RLELossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
)
PLAIN: list[str | UID] = [UID("1.2.840.10008.1.2.1"), UID("1.2.840.10008.1.2")]


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
                "the archive's address for DIMSE is TITLE@HOST:PORT, such as PACS@10.0.0.5:104; correct it"
            )
        if login.token is not None or login.user is not None:
            raise MedFLError(
                "DIMSE knows no token and no user, only certificates; take them out of the login"
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
                        str(answer.StudyInstanceUID), _text(answer, "PatientID"), _text(answer, "StudyDate")
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
            uid, number = str(answer.SeriesInstanceUID), _text(answer, "SeriesNumber")
            count = _text(answer, "NumberOfSeriesRelatedInstances")
            found.append(
                FoundSeries(
                    uid,
                    _text(answer, "Modality"),
                    _text(answer, "SeriesDescription"),
                    int(number) if number.lstrip("-").isdigit() else None,
                    int(count)
                    if count.isdigit()
                    else len(self._find("IMAGE", **_of(study, uid), SOPInstanceUID="")),
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
            instances = _instances(association, study, series)
            if not instances:
                raise Missing("the archive has no file of this series")
            receive(_identifier("IMAGE", **_of(study, series), SOPInstanceUID=min(instances)))

    def _fetch_missing(self, study: str, series: str, folder: Path) -> None:
        there = {path.stem for path in folder.glob(f"*{SUFFIX}")}
        with self._transferring(series, folder) as (association, receive):
            missing = _instances(association, study, series) - there
            if not missing:
                return
            if there:
                receive(_identifier("IMAGE", **_of(study, series), SOPInstanceUID=sorted(missing)))
            else:
                receive(_identifier("SERIES", **_of(study, series)))
            there = {path.stem for path in folder.glob(f"*{SUFFIX}")}
            if _instances(association, study, series) - there:
                raise Unreachable(
                    "the archive did not send all of a series, or it keeps growing; try again later"
                )

    def _find(self, level: str, **asked: str) -> list[Dataset]:
        def ask() -> list[Dataset]:
            with self._associated(FIND, [build_context(FIND)]) as association:
                return _answers(association, level, **asked)

        return self._patiently(ask)

    @contextlib.contextmanager
    def _transferring(
        self, series: str, folder: Path
    ) -> Iterator[tuple[Association, Callable[[Dataset], None]]]:
        """An association that lists a series' files, and a function that makes the archive send the files of an
        identifier into a folder. Both use one association, because opening and closing one takes 0.1 s."""
        faults: list[MedFLError] = []
        storing = [(evt.EVT_C_STORE, _storing(series, folder, faults))]
        if self._move_port is None:
            contexts = [build_context(FIND), build_context(GET), *_offers()]
            roles = [build_role(kind, scp_role=True) for kind in KINDS]
            with self._associated(GET, contexts, ext_neg=roles, storing=storing) as association:
                yield association, lambda asked: _drain(association.send_c_get(asked, GET), faults)
        else:
            contexts = [build_context(FIND), build_context(MOVE)]
            with self._listening(storing), self._associated(MOVE, contexts) as association:
                yield (
                    association,
                    lambda asked: _drain(association.send_c_move(asked, self._aet, MOVE), faults),
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
                f"port {self._move_port} can't be listened on; choose another --move-port"
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
                f"the archive refuses {self._aet}, or is not called {self._called}; let its engineer enter us"
            )
        if not association.is_established:
            tls = ", and the certificates on both sides" if self._tls else " (does it want TLS?)"
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


def _offers() -> list:
    """The kinds of files that we accept, each compression offered separately."""
    return [build_context(kind, PLAIN) for kind in KINDS] + [
        build_context(kind, syntax) for kind in KINDS[:3] for syntax in COMPRESSED
    ]


def _of(study: str, series: str) -> dict[str, str]:
    return {"StudyInstanceUID": study, "SeriesInstanceUID": series}


def _answers(association: Association, level: str, **asked: str) -> list[Dataset]:
    answers = association.send_c_find(_identifier(level, **asked), FIND)
    return [answer for status, answer in answers if _go_on(status) and answer is not None]


def _instances(association: Association, study: str, series: str) -> set[str]:
    answers = _answers(association, "IMAGE", **_of(study, series), SOPInstanceUID="")
    return {str(answer.SOPInstanceUID) for answer in answers}


def _identifier(level: str, **asked: Any) -> Dataset:
    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    for name, value in asked.items():
        setattr(identifier, name, value)
    return identifier


def _storing(series: str, folder: Path, faults: list[MedFLError]) -> Callable:
    """The handler for a file that the archive sends. Files of other series are refused."""

    def store(event: Any) -> int:
        try:
            content = event.encoded_dataset()  # as it was sent, without decoding and encoding
            header = pydicom.dcmread(BytesIO(content), stop_before_pixels=True)
            if str(header.SeriesInstanceUID) != series or not UID(header.SOPInstanceUID).is_valid:
                return 0xA900  # not what was asked for
            with atomic_write(folder / f"{header.SOPInstanceUID}{SUFFIX}", private=True) as file:
                file.write(content)
        except MedFLError as error:
            faults.append(error)
            return FULL
        return SUCCESS

    return store


def _go_on(status: Dataset) -> bool:
    """Whether an answer is followed by others; False at the end. Raises Unreachable if the connection broke, and
    MedFLError if the archive refuses."""
    if not status or "Status" not in status:
        raise Unreachable("the archive broke off; check the network, and try again")
    if status.Status in PENDING:
        return True
    if status.Status == SUCCESS:
        return False
    if status.Status in (0xA801,):
        raise MedFLError(
            "the archive does not know us as a target of C-MOVE; let its engineer enter name and port"
        )
    raise Unreachable(
        f"the archive answers with status {status.Status:04X}; its log tells more, then try again"
    )


def _drain(answers: Iterator, faults: list[MedFLError]) -> None:
    """Wait for the end of a transfer. An error on our side is raised before one of the archive's."""
    failed = None
    try:
        for status, _ in answers:
            _go_on(status)
    except MedFLError as error:
        failed = error
    if faults:
        raise faults[0]  # it says whether the disk was full
    if failed:
        raise failed


def _text(answer: Dataset, name: str) -> str:
    return str(answer.get(name) or "").strip() if answer.get(name) != 0 else "0"
