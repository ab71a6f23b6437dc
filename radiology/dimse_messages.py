"""The single messages of DIMSE: what is asked, what an answer means, and where a file that the archive sends is
stored."""

from collections.abc import Callable, Iterator
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
from pynetdicom import build_context
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made when it is imported
    LegacyConvertedEnhancedMRImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
)

from common import MedFLError
from radiology.retrieval import DAMAGED, SUFFIX, Damaged, Unreachable
from radiology.values import is_uid
from storage.files import atomic_write

FIND = StudyRootQueryRetrieveInformationModelFind
PENDING = (0xFF00, 0xFF01)
SUCCESS = 0x0000
FULL = 0xA700
FOREIGN = 0xA900  # not what was asked for
UNREADABLE = 0xC000
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


def offers() -> list:
    """The kinds of files that we accept, each compression offered separately."""
    return [build_context(kind, PLAIN) for kind in KINDS] + [
        build_context(kind, syntax) for kind in KINDS[:3] for syntax in COMPRESSED
    ]


def of_series(study: str, series: str) -> dict[str, str]:
    return {"StudyInstanceUID": study, "SeriesInstanceUID": series}


def found_answers(association: Association, level: str, **asked: str) -> list[Dataset]:
    answers = association.send_c_find(identifier(level, **asked), FIND)
    return [answer for status, answer in answers if continues(status) and answer is not None]


def stored_instances(association: Association, study: str, series: str) -> set[str]:
    answers = found_answers(association, "IMAGE", **of_series(study, series), SOPInstanceUID="")
    return {str(answer.SOPInstanceUID) for answer in answers}


def identifier(level: str, **asked: Any) -> Dataset:
    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    for name, value in asked.items():
        setattr(identifier, name, value)
    return identifier


def store_handler(series: str, folder: Path, faults: list[MedFLError]) -> Callable:
    """The handler for a file that the archive sends. Files of other series are refused. faults: gets why a file
    could not be stored."""

    def store(event: Any) -> int:
        try:
            content = event.encoded_dataset()  # as it was sent, without decoding and encoding
            header = pydicom.dcmread(BytesIO(content), stop_before_pixels=True)
            if str(header.SeriesInstanceUID) != series:
                return FOREIGN
            if not is_uid(uid := str(header.SOPInstanceUID)):
                raise ValueError("a file without a valid UID")
            with atomic_write(folder / f"{uid}{SUFFIX}", private=True) as file:
                file.write(content)
        except MedFLError as error:
            faults.append(error)
            return FULL
        except Exception:  # pydicom raises many kinds for a damaged file
            faults.append(Damaged(DAMAGED))
            return UNREADABLE
        return SUCCESS

    return store


def continues(status: Dataset) -> bool:
    """Whether an answer is followed by others; False at the end. Raises Unreachable if the connection broke, and
    MedFLError if the archive refuses."""
    if not status or "Status" not in status:
        raise Unreachable("the archive ended the connection; check the network, and try again")
    if status.Status in PENDING:
        return True
    if status.Status == SUCCESS:
        return False
    if status.Status in (0xA801,):
        raise MedFLError(
            "the archive does not know us as a target of C-MOVE; ask its administrator to register our "
            "title and port"
        )
    raise Unreachable(
        f"the archive answers with status {status.Status:04X}; look into its log, then try again"
    )


def drain(answers: Iterator, faults: list[MedFLError]) -> None:
    """Wait for the end of a transfer. An error on our side is raised before one of the archive's."""
    failed = None
    try:
        for status, _ in answers:
            continues(status)
    except MedFLError as error:
        failed = error
    if faults:
        raise faults[0]  # it says whether the disk was full
    if failed:
        raise failed


def text_of(answer: Dataset, name: str) -> str:
    return str(answer.get(name) or "").strip() if answer.get(name) != 0 else "0"
