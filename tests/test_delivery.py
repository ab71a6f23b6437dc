"""Proposals sent back to a real Orthanc, by predict.py and by the worker; and what an archive then has."""

import io
import sys
import warnings
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_phantoms import phantom, write_series
from orthanc import PASSWORD, Orthanc, executable
from running import run_here, run_script
from streamlit.testing.v1 import AppTest
from test_prediction import save_untrained

import radiology.watch
from checkpoint import load_checkpoint
from data import watch_archive
from deployment.app.cases import read_case
from deployment.app.sending import options
from radiology.prediction import propose
from radiology.retrieval import Unreachable
from radiology.rules import load_rules
from radiology.series import find_series
from radiology.studies import plan_studies
from radiology.watch import Watch

STUDY, NAME = "1.2.840.78.1", "Zzyzxova^Ludmila"


def write_flair(folder: Path, study: str, patient: str) -> list[Path]:
    images, _ = phantom(0, slices=8, size=64)
    who = {
        "PatientID": patient,
        "PatientName": NAME,
        "PatientBirthDate": "19431117",
        "AccessionNumber": "ACC1",
    }
    return write_series(
        folder,
        images[1],
        who,
        study=study,
        frame="1.2.840.9",
        SeriesDescription="AX FLAIR",
        StudyDate="20260102",
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "untrained_best.pth"
    save_untrained(path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An Orthanc with one study; the tests use it one after the other, and nothing in it changes."""
    if executable() is None:
        pytest.skip(
            "no Orthanc for the tests against an archive: install Debian's orthanc and orthanc-dicomweb"
        )
    root = tmp_path_factory.mktemp("archive")
    running = Orthanc(root / "orthanc").start()
    running.add(*write_flair(root / "scan", STUDY, "QX-1"))
    yield running
    running.kill()


@pytest.fixture(scope="module")
def predicted(archive, model, tmp_path_factory):
    """What the archive held before a prediction, and what predict.py said of it."""
    before = files(archive)
    return before, predict(archive, model, tmp_path_factory.mktemp("login"))


def stored(archive: Orthanc, modality: str) -> list[pydicom.Dataset]:
    """The archive's objects of a modality, as it has them."""
    return [
        pydicom.dcmread(io.BytesIO(archive.request("GET", f"/instances/{one['ID']}/file").content))
        for one in archive.instances(modality)
    ]


def files(archive: Orthanc) -> dict[str, bytes]:
    found = archive.request("GET", "/instances").json()
    return {one: archive.request("GET", f"/instances/{one}/file").content for one in found}


def predict(archive: Orthanc, model: Path, folder: Path, *more):
    login = archive.write_login(folder)
    options = ["--dicomweb", archive.url, "--login", login, "--study", STUDY, "--checkpoint", model]
    return run_here("predict.py", *options, "--device", "cpu", *more)


def test_a_prediction_is_found_in_the_archive_where_its_series_lies(archive, predicted, model):
    before, done = predicted
    assert done.returncode == 0, done.stderr
    assert "proposed as tumour; 2 objects were sent" in done.stdout
    assert NAME not in done.stdout + done.stderr and "QX-1" not in done.stdout + done.stderr
    (series,), _ = find_series(sorted((archive.folder.parent / "scan").iterdir()))
    (study,) = plan_studies([series], load_rules())
    expected = propose(study, load_checkpoint(model), load_rules()).mask > 0
    (made,) = stored(archive, "SEG")
    assert (made.PatientName, made.PatientID, made.StudyInstanceUID) == (NAME, "QX-1", STUDY)
    first = pydicom.dcmread(series.files[0])
    shared = made.SharedFunctionalGroupsSequence[0]
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == first.ImageOrientationPatient
    assert shared.PixelMeasuresSequence[0].PixelSpacing == first.PixelSpacing
    where = {tuple(pydicom.dcmread(f).ImagePositionPatient): index for index, f in enumerate(series.files)}
    found = np.zeros_like(expected)
    for frame, group in zip(made.pixel_array, made.PerFrameFunctionalGroupsSequence):
        found[where[tuple(group.PlanePositionSequence[0].ImagePositionPatient)]] = frame
    assert np.array_equal(found, expected)
    volume = highdicom.seg.Segmentation.from_dataset(made).get_volume(combine_segments=True)
    assert volume.array.sum() == expected.sum() and volume.spacing == pytest.approx(
        (6.0, *first.PixelSpacing)
    )
    (report,) = stored(archive, "SR")
    assert report.VerificationFlag == "UNVERIFIED"
    assert files(archive).items() > before.items()


def test_sending_twice_makes_no_second_copy_and_rtstruct_is_an_option(archive, predicted, model, tmp_path):
    once = files(archive)
    again = predict(archive, model, tmp_path)
    assert again.returncode == 0 and "already has this model's result" in again.stdout
    assert files(archive) == once
    more = predict(archive, model, tmp_path, "--rtstruct")
    assert "1 objects were sent" in more.stdout
    (structures,) = stored(archive, "RTSTRUCT")
    assert structures.ApprovalStatus == "UNAPPROVED"
    assert len(files(archive)) == len(once) + 1


def test_the_pages_button_sends_the_mask_on_the_page(archive, model, tmp_path, monkeypatch):
    content = [(path.name, path.read_bytes()) for path in sorted((archive.folder.parent / "scan").iterdir())]
    case = read_case(content)
    login = archive.write_login(tmp_path)
    about = ["--dicomweb", archive.url, "--login", str(login)]
    monkeypatch.setattr(sys, "argv", ["app.py", *about])
    checkpoint, masks = load_checkpoint(model), np.zeros(case.volume.shape[:3], np.uint8)
    masks[3, 20:30, 24:44] = 255

    def press() -> AppTest:
        def page(source, masks, checkpoint):
            from deployment.app.correcting import Corrected
            from deployment.app.sending import send_button

            done = Corrected(masks, masks, None, frozenset(), False)
            send_button(source, done, masks.astype("float32") / 255, 0.5, checkpoint)

        shown = AppTest.from_function(page, args=(case.dicom, masks, checkpoint), default_timeout=120).run()
        return shown.button(key="send").click().run()

    assert press().success[0].value == "2 objects sent."
    (made,) = [o for o in stored(archive, "SEG") if o.NumberOfFrames == 1]
    assert made.pixel_array.sum() == 200
    after = files(archive)
    assert press().success[0].value == "The archive has it already." and files(archive) == after
    login.write_text('user = "reader"\npassword = "wrong"\n')
    assert "refuses the login" in press().error[0].value
    monkeypatch.setattr(sys, "argv", ["app.py"])  # started without an archive, the page has no such button
    assert options().dicomweb is None


def test_a_study_that_is_missing_and_one_without_rights_are_told(archive, model, tmp_path):
    login = archive.write_login(tmp_path)
    about = ["--dicomweb", archive.url, "--checkpoint", model]
    done = run_here("predict.py", *about, "--login", login, "--study", "1.2.3.404")
    assert done.returncode == 2 and "has no study 1.2.3.404" in done.stderr
    done = run_here("predict.py", *about, "--study", STUDY)
    assert done.returncode == 2 and "refuses the login" in done.stderr and PASSWORD not in done.stderr
    assert run_here("predict.py", *about).returncode == 2  # without a study


def worker(archive: Orthanc, folder: Path, monkeypatch, *options) -> Watch:
    """A worker as it starts anew, in this process; it asks an archive that does not answer only once."""
    login = archive.write_login(folder)
    about = ["--dicomweb", archive.url, "--login", login, "--private", folder / "worker"]
    monkeypatch.setattr(sys, "argv", [str(v) for v in ("watch_archive.py", *about, *options)])
    watching = watch_archive.watch(watch_archive.parse())
    watching._retrieval.archive.waits = ()
    return watching


def test_the_worker_survives_restarts_of_both_sides_and_does_each_study_once(
    archive, model, tmp_path, monkeypatch, capsys
):
    options = ["--checkpoint", model, "--quiet", 0, "--device", "cpu", "--query", "PatientID=QX-W*"]
    archive.add(*write_flair(tmp_path / "first", "1.2.840.78.4", "QX-W1"))
    before = files(archive)
    watching = worker(archive, tmp_path, monkeypatch, *options)
    assert (watching.look(), watching.look()) == (1, 0)
    once = files(archive)
    assert len(once) == len(before) + 2 and once.items() > before.items()
    archive.stop()
    with pytest.raises(Unreachable, match="can't be reached"):
        watching.look()
    archive.start()
    assert watching.look() == 0
    assert worker(archive, tmp_path, monkeypatch, *options).look() == 0
    archive.add(*write_flair(tmp_path / "second", "1.2.840.78.2", "QX-W2"))
    assert worker(archive, tmp_path, monkeypatch, *options).look() == 1
    assert files(archive).items() > once.items() and len(files(archive)) == len(once) + 10
    said = capsys.readouterr().err
    assert said.count("predicted, 2 objects sent") == 2
    assert not [secret for secret in (PASSWORD, NAME, "QX-W1", "QX-W2") if secret in said]
    assert not (tmp_path / "worker" / "incoming").exists()
    assert (tmp_path / "worker").stat().st_mode & 0o077 == 0


def test_the_worker_waits_until_a_study_is_quiet_and_remembers_what_it_can_not_use(
    archive, model, tmp_path, monkeypatch, capsys
):
    clock = [0.0]
    monkeypatch.setattr(radiology.watch.time, "monotonic", lambda: clock[0])
    images, _ = phantom(0, slices=8, size=64)
    third = write_series(
        tmp_path / "third", images[1], {"PatientID": "QX-3"}, study="1.2.840.78.3", SeriesDescription="AX T2"
    )
    archive.add(*third[:5])
    watching = worker(
        archive, tmp_path, monkeypatch, "--checkpoint", model, "--quiet", 100, "--query", "PatientID=QX-3"
    )
    looks = []
    for clock[0], new in ((0, []), (90, third[5:]), (110, []), (200, []), (400, [])):
        archive.add(*new)
        looks.append(watching.look())
    assert looks == [0, 0, 0, 1, 0] and watching.waiting == 0
    assert "a study is left out; sent.jsonl says why" in capsys.readouterr().err
    assert "the study has no FLAIR" in (tmp_path / "worker" / "sent.jsonl").read_text()
    assert "1.2.840.78.3" not in {o.StudyInstanceUID for o in stored(archive, "SR")}


@pytest.mark.parametrize("prepares", [True, False])
def test_the_workers_lines_quote_nothing_of_a_study_that_it_leaves_out(archive, model, tmp_path, prepares):
    number, images = "1.2.840.78.4", phantom(0, slices=8, size=64)[0]
    blank = images[1] * 0
    born = {"PatientID": f"QX-4{prepares}", "PatientName": NAME, "PatientBirthDate": "1943.11.17"}
    born |= {"PixelPaddingValue": 0, "SeriesDescription": f"AX FLAIR {NAME}", "Manufacturer": "M" * 70}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files_of_it = write_series(tmp_path / "scan", blank, born, study=f"{number}{int(prepares)}")
    archive.add(*files_of_it)
    done = run_script(
        "data/watch_archive.py",
        *("--dicomweb", archive.url, "--login", archive.write_login(tmp_path)),
        *("--private", tmp_path / "worker", "--query", f"PatientID=QX-4{prepares}", "--quiet", 0),
        *(("--prepare-only", "--out", tmp_path / "out") if prepares else ("--checkpoint", model)),
        *("--every", 0.1, "--once"),
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and ("could not be prepared" in said or "left out" in said), said
    assert not [secret for secret in ("Zzyzxova", "1943", "QX-4", number) if secret in said], said
    kept = (tmp_path / "worker" / ("report.csv" if prepares else "sent.jsonl")).read_text(encoding="utf-8")
    assert "holds only padding" in kept


def test_the_worker_can_only_prepare(archive, tmp_path):
    login, out = archive.write_login(tmp_path), tmp_path / "out"
    about = ["--dicomweb", archive.url, "--login", login, "--private", tmp_path / "worker"]
    about += ["--query", "PatientID=QX-1"]
    before = files(archive)
    done = run_script(
        "data/watch_archive.py",
        *about,
        "--prepare-only",
        "--out",
        out,
        "--quiet",
        0,
        "--every",
        0.1,
        "--once",
    )
    assert done.returncode == 0, done.stderr
    (study,) = out.rglob("volume.json")
    assert len(list(study.parent.glob("*.tif"))) == 8 and (out / "index.html").exists()
    assert files(archive) == before
    again = run_here("data/prepare_hospital.py", *about, "--out", out)
    assert again.returncode == 0 and "1 of 1 studies" in again.stdout
