"""Studies of an archive with a damaged file or odd numbers: each costs itself at most, and no other study."""

import io
from collections.abc import Callable

import pydicom
import pytest
from dicom_phantoms import phantom, write_series
from orthanc import AET, Orthanc, executable

from radiology.archive import Preparation
from radiology.dicomweb import DICOMweb
from radiology.dimse import DIMSE
from radiology.ledger import Ledger
from radiology.login import read_login
from radiology.pseudonyms import Pseudonyms
from radiology.retrieval import Query, Retrieval, ordered
from radiology.rules import load_rules
from radiology.worklist import prepare_studies


def odd_number(content: bytes) -> bytes:
    """A file whose series' number is text."""
    return content.replace(b"\x20\x00\x11\x00IS\x02\x007 ", b"\x20\x00\x11\x00IS\x04\x00--5 ")


def zeros(content: bytes) -> bytes:
    """A file whose own number has a part that begins with 0, as some scanners write it."""
    file = pydicom.dcmread(io.BytesIO(content))
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = f"1.2.840.0{file.InstanceNumber}"
    written = io.BytesIO()
    file.save_as(written)
    return written.getvalue()


def damaged(content: bytes) -> bytes:
    """A file in which the kind of a value is no kind; the archive takes it."""
    return content.replace(b"\x08\x00\x20\x00DA", b"\x08\x00\x20\x00\x55\x00")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    if executable() is None:
        pytest.skip("no Orthanc with DICOMweb (Debian's orthanc and orthanc-dicomweb)")
    root = tmp_path_factory.mktemp("archive")
    running = Orthanc(root / "orthanc").start()
    flair = phantom(0, slices=4, size=64)[0][1]
    changes: list[Callable[[bytes], bytes]] = [odd_number, zeros, damaged, bytes]
    for number, change in enumerate(changes, 1):
        about = {"study": f"1.2.840.77.{number}", "SeriesDescription": "AX FLAIR", "SeriesNumber": "7"}
        for path in write_series(root / str(number), flair, {"PatientID": change.__name__}, **about):
            path.write_bytes(change(path.read_bytes()))
            running.add(path)
    yield running
    running.kill()


@pytest.mark.parametrize(
    "web, name", [(True, "damaged"), (True, "odd_number"), (False, "odd_number"), (False, "zeros")]
)
def test_a_study_with_odd_files_costs_no_other_study(archive, web, name, tmp_path):
    login = read_login(str(archive.write_login(tmp_path)))
    there = (
        DICOMweb(archive.url, login, waits=())
        if web
        else DIMSE(f"{AET}@127.0.0.1:{archive.dicom}", read_login(None), waits=())
    )
    retrieval = Retrieval(there, load_rules(), tmp_path / "private")
    told: list[str] = []
    preparation = Preparation(
        tmp_path / "out", Pseudonyms(tmp_path / "private"), retrieval.rules, told.append
    )
    found = ordered(there.find_studies(Query(patients=(name, "bytes"))))
    entries = prepare_studies(found, retrieval, preparation, Ledger(tmp_path / "private"), told.append)
    assert len(found) == len(entries) == 2
    lines = [line for entry in entries if not entry.name for line in entry.rows]
    assert len(lines) == (name == "damaged")
    assert all("the archive sends a file of it that can't be read" in str(line) for line in lines)
    assert not (tmp_path / "private" / "incoming").exists()
