"""Answers of an archive that no archive of ours gives, from a server of a few lines."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from bombs import dicom

from common import MedFLError
from radiology.dicomweb import DICOMweb
from radiology.login import Login
from radiology.retrieval import Denied, FoundSeries, FoundStudy, Query, Retrieval
from radiology.rules import load_rules

SERIES = {
    "0020000E": {"vr": "UI", "Value": ["1.2.3"]},
    "00080018": {"vr": "UI", "Value": ["1.2.3.4"]},
    "00080060": {"vr": "CS", "Value": ["MR"]},
    "0008103E": {"vr": "LO", "Value": ["FLAIR"]},
    "00201209": {"vr": "IS", "Value": [9]},
}

NESTED: dict = {}
for _ in range(200):
    NESTED = {"00081140": {"vr": "SQ", "Value": [NESTED]}}


@pytest.fixture
def archive():
    """An archive of one series, what it tells of its header, and where it refers to."""

    class Answers(BaseHTTPRequestHandler):
        header, listed, refers_to = [SERIES], [SERIES], ""

        def do_GET(self):
            if self.refers_to:
                self.send_response(302)
                self.send_header("Location", self.refers_to + self.path)
                self.end_headers()
                return
            told = self.header if "/metadata" in self.path else self.listed if "offset=0" in self.path else []
            body = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/dicom+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield DICOMweb(f"http://127.0.0.1:{server.server_port}/dicom-web", Login(), waits=()), Answers
        server.shutdown()


@pytest.mark.parametrize(
    "header",
    [
        [{"00180087": {"vr": "DS", "Value": ["1.5 T"]}}],
        [{"00280010": {"vr": "US", "Value": ["many"]}}],
        [{"00080060": {"vr": "CS", "Value": "MR"}}],
        [{"00080060": {"Value": ["MR"]}}],
        [],
        [None],
        [{"00081140": {"vr": "SQ", "Value": [NESTED]}}],
    ],
)
def test_a_header_that_can_not_be_taken_over_costs_no_other_series(archive, header, tmp_path):
    there, answers = archive
    answers.header = header
    plan = Retrieval(there, load_rules(), tmp_path).plan(FoundStudy("1.2", "p", "20260101"))
    assert [(line.series.description, line.used_as) for line in plan.lines] == [("FLAIR", "FLAIR")]


@pytest.mark.parametrize("listed", [["x"], [None], [{**SERIES, "0020000E": "1.2.3"}], {"a": 1}, 5])
def test_a_list_of_another_form_is_no_list_of_series(archive, listed):
    there, answers = archive
    answers.listed = listed
    with pytest.raises(MedFLError, match="not DICOMweb"):
        there.find_series("1.2")


def test_an_archive_that_refers_to_a_machine_without_encryption_is_not_followed(archive):
    there, answers = archive
    answers.refers_to = "http://pacs.example"
    with pytest.raises(Denied, match="pacs.example, which is not encrypted"):
        there.find_studies(Query(patients=("QX-1",)))


def test_an_address_that_begins_like_the_archives_is_another():
    session = DICOMweb("http://localhost", Login())._client._session
    with pytest.raises(Denied, match="localhost.pacs.example, which is not encrypted"):
        session.get("http://localhost.pacs.example/studies")


class Mixed:
    """An archive of one study whose series are of these patients, by their descriptions."""

    def __init__(self, patients: dict[str, str]):
        self.patients = patients

    def find_series(self, study):
        return [FoundSeries(f"1.2.{k}", "MR", name, k, 20) for k, name in enumerate(self.patients)]

    def header(self, study, series, folder):
        name, patient = list(self.patients.items())[int(series[-1])]
        return dicom(SeriesInstanceUID=series, SeriesDescription=name, PatientID=patient)


def test_series_of_another_patient_in_a_study_are_not_laid_together(tmp_path):
    def used(patients):
        plan = Retrieval(Mixed(patients), load_rules(), tmp_path).plan(FoundStudy("1.2", "A", ""))
        return {line.series.description: line.used_as or line.why for line in plan.lines}

    mixed = used({"FLAIR": "A", "T1": "B", "T1 post": ""})
    assert mixed["FLAIR"] == "FLAIR" and mixed["T1 post"] == "post-contrast"
    assert "of several patients" in mixed["T1"]
    assert used({"FLAIR": "a", "T1": "a"}) == {"FLAIR": "FLAIR", "T1": "pre-contrast"}
