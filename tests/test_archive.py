"""data/prepare_hospital.py against a real Orthanc on loopback: by DICOMweb, by DIMSE, and with an archive's faults."""

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pydicom
import pytest
import SimpleITK as sitk
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from dicom_phantoms import phantom, scan, write_series
from orthanc import AET, OURS, PASSWORD, USER, Orthanc, executable, free_port
from prepared import SCRIPT, report
from running import run_here
from test_series import write_enhanced

import radiology.dicomweb as dicomweb
from common import MedFLError
from radiology.archive import Preparation
from radiology.dicomweb import DICOMweb
from radiology.dimse import DIMSE
from radiology.ledger import Ledger
from radiology.login import Login, read_login
from radiology.pseudonyms import Pseudonyms
from radiology.retrieval import (
    Denied,
    FoundStudy,
    Missing,
    Query,
    Retrieval,
    Unreachable,
    passing_folder,
)
from radiology.rules import load_rules
from radiology.segmentation import make_segmentation
from radiology.series import find_series
from radiology.worklist import prepare_studies

SAGITTAL = [[0, 0, -1], [1, 0, 0], [0, -1, 0]]
STUDIES = {
    "axial": "1.2.840.77.1",
    "enhanced": "1.2.840.77.2",
    "sagittal": "1.2.840.77.3",
    "none": "1.2.840.77.4",
}
NAME = "Zzyzxova^Ludmila"
QUICK = (0.05, 0.1)  # s, before another try


def write_phantoms(root: Path) -> None:
    """Four studies: axial, compressed, with a mask and series that nobody needs; enhanced; sagittal; without FLAIR."""
    images, truth = phantom(0, slices=8, size=64)
    who = {name: {"PatientID": f"QX-{name}", "PatientName": NAME} for name in STUDIES}
    axial = root / "axial"
    for number, text in enumerate(("AX FLAIR", "AX T2 TSE", "Localizer"), 1):
        paths = write_series(
            axial / text,
            images[1],
            who["axial"],
            study=STUDIES["axial"],
            SeriesDescription=text,
            SeriesNumber=number,
            StudyDate="20260102",
        )
        if number == 1:
            (series,), _ = find_series(paths)
            mask = make_segmentation(sitk.GetArrayFromImage(truth), series)
            mask.Manufacturer = "A reader's workstation"
            mask.save_as(axial / "mask")
            for path in paths:
                file = pydicom.dcmread(path)
                file.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
                file.save_as(path)
    (root / "enhanced").mkdir()
    write_enhanced(root / "enhanced" / "one", images[1], [3, 0, 2, 1, 4, 5, 7, 6])
    file = pydicom.dcmread(root / "enhanced" / "one")
    file.StudyInstanceUID, file.SeriesDescription, file.StudyDate = (
        STUDIES["enhanced"],
        "FLAIR 3D",
        "20260103",
    )
    file.PatientID, file.PatientName = "QX-enhanced", NAME
    file.save_as(root / "enhanced" / "one")
    for name, description in (("sagittal", "SAG FLAIR CUBE"), ("none", "AX T2")):
        image = scan(images[1], 48, 12, SAGITTAL) if name == "sagittal" else images[1]
        write_series(
            root / name,
            image,
            who[name],
            study=STUDIES[name],
            SeriesDescription=description,
            StudyDate="20260104",
        )


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An Orthanc with the phantoms, and the folder that these lie in."""
    if executable() is None:
        pytest.skip(
            "no Orthanc with DICOMweb (Debian's orthanc and orthanc-dicomweb): nothing is tried against an archive"
        )
    root = tmp_path_factory.mktemp("archive")
    write_phantoms(root / "phantoms")
    running = Orthanc(root / "orthanc").start()
    running.add(root / "phantoms")
    yield running
    running.kill()


@pytest.fixture
def login(archive, tmp_path) -> Path:
    return archive.write_login(tmp_path)


def prepare(*options, out: Path):
    return run_here(SCRIPT, *options, "--out", out)


def contents(out: Path) -> set[tuple[str, str]]:
    """Every slice and mask: where it lies, without what depends on the key of the pseudonyms, and its SHA-256."""
    return {
        (
            f"{p.parent.parent.relative_to(out)} {p.stem.split('_', 2)[2]}",
            hashlib.sha256(p.read_bytes()).hexdigest(),
        )
        for p in out.rglob("*.tif")
    }


@pytest.fixture(scope="module")
def from_folder(archive, tmp_path_factory) -> set[tuple[str, str]]:
    out = tmp_path_factory.mktemp("from_folder") / "out"
    done = prepare("--dicom", archive.folder.parent / "phantoms", out=out)
    assert done.returncode == 0, done.stderr
    return contents(out)


def test_what_an_archive_gives_is_what_a_folder_gives(archive, login, from_folder, tmp_path):
    done = prepare("--dicomweb", archive.url, "--login", login, out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "3 of 4 studies" in done.stdout and "1 with a mask" in done.stdout
    assert contents(tmp_path / "out") == from_folder
    private = tmp_path / "out_private"
    assert not (private / "incoming").exists()
    assert private.stat().st_mode & 0o077 == 0
    lines = {row["description"]: row["used_as"] for row in report(tmp_path / "out")}
    assert lines["AX FLAIR"] == "FLAIR" and lines["AX T2 TSE"] == lines["AX T2"] == ""
    said = done.stdout + done.stderr + "".join(p.read_text() for p in private.glob("*.json*"))
    assert PASSWORD not in said and NAME not in said
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"QX-" in p.read_bytes()]


@pytest.mark.parametrize("way, patient", [("get", "QX-axial"), ("move", "QX-enhanced")])
def test_classic_dicom_gives_the_same(way, patient, archive, from_folder, tmp_path):
    options = ["--move-port", archive.ours] if way == "move" else []
    done = prepare(
        "--dimse", archive.dimse, "--query", f"PatientID={patient}", *options, out=tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 studies" in done.stdout
    assert contents(tmp_path / "out") < from_folder
    assert not (tmp_path / "out_private" / "incoming").exists()


class Counting(DICOMweb):
    """An archive that remembers which series were fetched. stop_after: of these, it breaks off."""

    def __init__(self, *how, stop_after: int | None = None):
        super().__init__(*how, waits=QUICK)
        self.fetched: list[str] = []
        self.stop_after = stop_after

    def fetch(self, study: str, series: str, folder: Path) -> None:
        super().fetch(study, series, folder)
        self.fetched.append(series)
        if len(self.fetched) == self.stop_after:
            raise KeyboardInterrupt


def parts(archive, tmp_path, **how):
    asked = Counting(archive.url, read_login(str(archive.write_login(tmp_path))), **how)
    private, rules = tmp_path / "private", load_rules()
    preparation = Preparation(tmp_path / "out", Pseudonyms(private), rules, lambda text: None)
    return asked, Retrieval(asked, rules, private), preparation, Ledger(private)


def test_only_what_the_rules_need_is_fetched_and_only_once(archive, tmp_path):
    asked, retrieval, preparation, ledger = parts(archive, tmp_path)
    studies = asked.find_studies(Query())
    prepare_studies(studies, retrieval, preparation, ledger, print)
    assert len(asked.fetched) == 4  # of seven: three FLAIR and a mask
    prepare_studies(studies, retrieval, preparation, Ledger(tmp_path / "private"), print)
    assert len(asked.fetched) == 4


def test_a_run_that_is_stopped_in_the_middle_goes_on_there(archive, tmp_path):
    asked, retrieval, preparation, ledger = parts(archive, tmp_path, stop_after=1)
    studies = [s for s in asked.find_studies(Query()) if s.uid == STUDIES["axial"]]
    with pytest.raises(KeyboardInterrupt):
        prepare_studies(studies, retrieval, preparation, ledger, print)
    files = sorted((tmp_path / "private" / "incoming").rglob("*.dcm"))
    assert len(files) == 8 and files[0].stat().st_mode & 0o077 == 0
    files[3].unlink()  # as if it had been cut off within the series
    times = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    watched = {}

    class Looking(Counting):
        def fetch(self, study: str, series: str, folder: Path) -> None:
            super().fetch(study, series, folder)
            watched.update({p: p.stat().st_mtime_ns for p in folder.glob("*.dcm")})

    retrieval.archive = Looking(archive.url, read_login(str(archive.write_login(tmp_path))))
    (entry,) = prepare_studies(studies, retrieval, preparation, Ledger(tmp_path / "private"), print)
    assert entry.name and times.items() <= watched.items() and files[3] in watched
    assert not (tmp_path / "private" / "incoming").exists()


def test_an_archive_that_is_stopped_is_named_and_one_that_returns_is_asked_again(archive, tmp_path):
    login = read_login(str(archive.write_login(tmp_path)))
    gone = DICOMweb(f"http://127.0.0.1:{free_port()}/dicom-web", login, waits=QUICK)
    with pytest.raises(Unreachable, match="can't be reached"):
        gone.find_studies(Query())
    late = Orthanc(tmp_path / "late")
    starting = threading.Timer(0.3, late.start)
    starting.start()
    try:
        assert DICOMweb(late.url, login, waits=(0.5, 2, 5)).find_studies(Query()) == []
    finally:
        starting.join()
        late.kill()


def test_a_wrong_password_ends_at_once_and_is_not_repeated(archive, tmp_path):
    wrong = archive.write_login(tmp_path, "mistyped-5551")
    done = prepare("--dicomweb", archive.url, "--login", wrong, out=tmp_path / "out")
    assert done.returncode == 2 and "refuses the login (401)" in done.stderr
    assert "mistyped" not in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    nobody = prepare("--dicomweb", archive.url, out=tmp_path / "out")
    assert nobody.returncode == 2 and "refuses the login" in nobody.stderr


def test_a_stranger_is_refused_by_dimse(archive, tmp_path):
    strict = Orthanc(tmp_path / "strict", {"DicomCheckCalledAet": True}).start()
    try:
        stranger = DIMSE(strict.dimse.replace(AET, "NOBODY"), Login(), waits=QUICK)
        with pytest.raises(MedFLError, match="is not called NOBODY"):
            stranger.find_studies(Query())
    finally:
        strict.kill()


def test_a_study_that_is_gone_is_left_out_and_the_others_are_prepared(archive, tmp_path):
    asked, retrieval, preparation, ledger = parts(archive, tmp_path)
    told: list[str] = []
    studies = [
        FoundStudy("1.2.3.404", "QX-gone", "20260101"),
        FoundStudy(STUDIES["axial"], "QX-axial", "20260102"),
    ]
    (entry,) = prepare_studies(studies, retrieval, preparation, ledger, told.append)
    assert entry.study == STUDIES["axial"] and entry.name
    assert len(told) == 1 and "is left out: the archive has no such study" in told[0] and "QX" not in told[0]
    with pytest.raises(Missing):
        asked.find_study("1.2.3.404")


def test_a_series_that_arrives_slice_by_slice_is_made_again_when_it_is_whole(archive, tmp_path):
    late = Orthanc(tmp_path / "late").start()
    paths = sorted((archive.folder.parent / "phantoms" / "sagittal").iterdir())
    try:
        late.add(*paths[:6])
        asked, retrieval, preparation, ledger = parts(late, tmp_path)
        whole_fetch = DICOMweb._fetch_missing

        def arriving(self, study: str, series: str, folder: Path) -> None:
            whole_fetch(self, study, series, folder)
            if len(list(folder.glob("*.dcm"))) == 6:
                late.add(*paths[6:9])  # three more come while the series is fetched
                raise dicomweb._Changed

        asked._fetch_missing = arriving.__get__(asked)
        studies = asked.find_studies(Query())
        (first,) = prepare_studies(studies, retrieval, preparation, ledger, print)
        slices = {row[6] for row in first.rows}
        late.add(*paths[9:])
        (second,) = prepare_studies(studies, retrieval, preparation, ledger, print)
        assert (slices, {row[6] for row in second.rows}) == ({9}, {len(paths)})
        assert first.name == second.name and first.state != second.state
    finally:
        late.kill()


def test_a_full_disk_ends_with_a_sentence_and_the_next_run_goes_on(archive, tmp_path, monkeypatch):
    asked, retrieval, preparation, ledger = parts(archive, tmp_path)
    studies = [s for s in asked.find_studies(Query()) if s.uid == STUDIES["axial"]]
    real, left = os.fsync, [5]

    def full(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().is_relative_to(tmp_path / "private" / "incoming"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MedFLError, match="No space left on device.*goes on here"):
            prepare_studies(studies, retrieval, preparation, ledger, print)
    there = sorted((tmp_path / "private" / "incoming").rglob("*"))
    assert len([p for p in there if p.suffix == ".dcm"]) == 5 and not [
        p for p in there if p.name.startswith(".IM")
    ]
    (entry,) = prepare_studies(studies, retrieval, preparation, ledger, print)
    assert entry.name and not (tmp_path / "private" / "incoming").exists()


def test_studies_are_chosen_by_patient_by_key_and_by_day(archive, login, tmp_path):
    def planned(*options) -> str:
        done = prepare(
            "--dicomweb", archive.url, "--login", login, "--dry-run", *options, out=tmp_path / "out"
        )
        assert not (tmp_path / "out").exists() and not (tmp_path / "out_private").exists()
        return done.stdout + done.stderr

    (tmp_path / "patients.txt").write_text("QX-axial\n\nQX-sagittal\nQX-nobody\n")
    said = planned("--patients", tmp_path / "patients.txt")
    assert "2 of 2 studies would be" in said
    assert "no matching study of 1 patient in " in said and "patients.txt: QX-nobody\n" in said
    assert "1 of 1 studies would be" in planned("--query", "PatientID=QX-?????")
    assert "3 of 3 studies would be" in planned("--query", "PatientID=QX-*a*")
    assert "1 of 1 studies would be" in planned("--query", "PatientID=QX-e*", "StudyDate=20260103")
    assert "1 of 2 studies would be" in planned("--since", "2026-01-04")
    assert "no study that matches" in planned("--query", "PatientID=nobody")
    assert "is not KEY=VALUE" in planned("--query", "Colour=red")
    assert "is not a date" in planned("--since", "yesterday")
    (tmp_path / "patients.txt").write_text("QX-*\n")
    assert "would also match others" in planned("--patients", tmp_path / "patients.txt")


def test_a_login_is_private_and_an_address_is_encrypted_and_carries_none(tmp_path):
    path = tmp_path / "login.toml"
    path.write_text('token = "abc-secret"\n')
    path.chmod(0o644)
    with pytest.raises(MedFLError, match="can be read by others"):
        read_login(str(path))
    path.chmod(0o600)
    login = read_login(str(path))
    assert "abc-secret" not in repr(login) + str(login)
    path.write_text('token = "abc-secret"\n', encoding="utf-8-sig")  # as Windows' editor writes it
    assert read_login(str(path)) == login
    for wrong, why in (
        ('user = "me"\n', "belong together"),
        ('passwort = "abc-secret"\n', "wrong at: passwort"),
        ('token = "abc-secret\n', "not TOML"),
        ('certificate = "missing.pem"\n', "does not exist"),
    ):
        path.write_text(wrong)
        with pytest.raises(MedFLError, match=why) as caught:
            read_login(str(path))
        assert "abc-secret" not in str(caught.value)
    for url, why in (
        ("http://pacs.example/dicom-web", "is not encrypted"),
        ("https://me:abc-secret@pacs.example/dicom-web", "contains a login"),
        ("pacs.example", "is not a URL"),
    ):
        with pytest.raises(MedFLError, match=why) as caught:
            DICOMweb(url, Login())
        assert "abc-secret" not in str(caught.value)


def certificate(name: str, folder: Path, signed_by: str | None = None) -> str:
    """A key and a certificate for 127.0.0.1, FOLDER/NAME.key and .pem, signed by another of the folder or itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(who).public_key(key.public_key()).serial_number(7 + len(name))
    )
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    made = made.add_extension(x509.BasicConstraints(ca=signed_by is None, path_length=None), critical=True)
    address = x509.IPAddress(IPv4Address("127.0.0.1"))
    made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    signer, issuer = key, who
    if signed_by:
        signer = load_pem_private_key((folder / f"{signed_by}.key").read_bytes(), None)
        issuer = x509.load_pem_x509_certificate((folder / f"{signed_by}.pem").read_bytes()).subject
    pem = made.issuer_name(issuer).sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    (folder / f"{name}.pem").write_bytes(pem)
    return name


NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/errors; events {{}}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.key;
    ssl_client_certificate {folder}/authority.pem; ssl_verify_client {verify};
    location / {{ {inside} proxy_pass {root}; }}
  }}
}}
"""


@pytest.fixture
def behind_nginx(archive, tmp_path):
    """Start an nginx before the archive, over TLS: its address. Debian's Orthanc itself crashes when it sees a
    certificate."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("no nginx for the test of certificates: install it")
    authority = certificate("authority", tmp_path)
    for name in ("server", "us"):
        certificate(name, tmp_path, authority)
    started = []

    def start(verify: str, inside: str = "") -> str:
        port = free_port()
        settings = NGINX.format(folder=tmp_path, port=port, root=archive.root, verify=verify, inside=inside)
        (tmp_path / "nginx.conf").write_text(settings)
        command = [program, "-c", str(tmp_path / "nginx.conf")]
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        return f"https://127.0.0.1:{port}/dicom-web"

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


TOKEN = "quite-secret-token-62318"


def test_a_token_opens_the_archive_and_another_does_not(archive, behind_nginx, tmp_path):
    """A gateway of tokens before Orthanc, as hospitals have it: who brings the right one is let through."""
    basic = b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    url = behind_nginx(
        "off",
        f'if ($http_authorization != "Bearer {TOKEN}") {{ return 401; }} '
        f'proxy_set_header Authorization "Basic {basic}";',
    )
    path = tmp_path / "login.toml"
    path.touch(0o600)
    path.write_text(f'token = "{TOKEN}"\nauthority = "authority.pem"\n')
    done = prepare("--dicomweb", url, "--login", path, "--query", "PatientID=QX-axial", out=tmp_path / "out")
    assert done.returncode == 0 and "1 of 1 studies" in done.stdout, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    path.write_text('token = "another"\nauthority = "authority.pem"\n')
    with pytest.raises(MedFLError, match="refuses the login") as caught:
        DICOMweb(url, read_login(str(path)), waits=QUICK).find_studies(Query())
    assert "another" not in str(caught.value)


def test_dimse_over_tls_finds_and_fetches_and_trusts_nobody_unknown(archive, tmp_path):
    certificate("authority", tmp_path)
    certificate("stranger", tmp_path)
    for name in ("server", "us"):
        certificate(name, tmp_path, "authority")
    names = {"Certificate": "server.pem", "PrivateKey": "server.key", "TrustedCertificates": "authority.pem"}
    settings = {f"DicomTls{name}": str(tmp_path / file) for name, file in names.items()}
    settings |= {"DicomTlsEnabled": True, "DicomTlsRemoteCertificateRequired": True}
    with contextlib.closing(Orthanc(tmp_path / "orthanc", settings)) as safe:
        us = {"AET": OURS, "Host": "127.0.0.1", "Port": safe.ours, "AllowGet": True, "UseDicomTls": True}
        safe.settings["DicomModalities"] = {OURS: us}
        safe.start().add(archive.folder.parent / "phantoms" / "enhanced")
        ours = Login(
            certificate=tmp_path / "us.pem", key=tmp_path / "us.key", authority=tmp_path / "authority.pem"
        )
        sent = pydicom.dcmread(archive.folder.parent / "phantoms" / "enhanced" / "one")
        for way, port in (("get", None), ("move", safe.ours)):
            there = DIMSE(safe.dimse, ours, move_port=port, waits=QUICK)
            (study,) = there.find_studies(Query())
            (series,) = there.find_series(study.uid)
            (tmp_path / way).mkdir()
            there.fetch(study.uid, series.uid, tmp_path / way)
            (fetched,) = (tmp_path / way).iterdir()
            assert pydicom.dcmread(fetched).PixelData == sent.PixelData
        with pytest.raises(MedFLError, match="needs certificate, key and authority"):
            DIMSE(safe.dimse, Login(authority=tmp_path / "authority.pem"), move_port=safe.ours)
        for login in (
            Login(),  # in the clear
            Login(authority=tmp_path / "authority.pem"),  # without a certificate of ours
            ours.model_copy(update={"authority": tmp_path / "stranger.pem"}),  # whom the archive's is not of
        ):
            with pytest.raises(MedFLError, match="can't be reached by DIMSE|broke off"):
                DIMSE(safe.dimse, login, waits=()).find_studies(Query())


def test_tls_is_verified_and_a_client_certificate_opens_the_archive(archive, behind_nginx, tmp_path):
    safe = behind_nginx("on")
    path = archive.write_login(tmp_path)
    user = path.read_text()
    ours = 'certificate = "us.pem"\nkey = "us.key"\n'
    path.write_text(user + ours + 'authority = "authority.pem"\n')
    assert len(DICOMweb(safe, read_login(str(path)), waits=QUICK).find_studies(Query())) == 4
    path.write_text(user + 'authority = "authority.pem"\n')
    with pytest.raises(MedFLError, match="refuses the request"):  # nobody sees a certificate of ours
        DICOMweb(safe, read_login(str(path)), waits=()).find_studies(Query())
    path.write_text(user + ours)
    with pytest.raises(Denied, match="fails the check of TLS"):  # nobody we know signed the archive's
        DICOMweb(safe, read_login(str(path)), waits=()).find_studies(Query())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process to kill")
def test_what_a_killed_run_fetched_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not (child := os.fork()):
        try:
            with passing_folder() as folder:
                (folder / "of_anna.dcm").write_bytes(b"DICM")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    (left,) = tmp_path.rglob("*.dcm")
    assert left.parent.stat().st_mode & 0o077 == 0
    with passing_folder():
        assert not left.exists()
    assert not list(tmp_path.iterdir())
