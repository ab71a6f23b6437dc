"""The download against a local server that speaks as Kaggle does, through the real kagglehub: whole, broken
off, refused."""

import http.server
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
from running import run_script

from common import MedFLError
from dataset import find_dataset, read_patients

pytest.importorskip("kagglehub", reason="the download's tests need kagglehub")
from data.download import PAGE, cache_folder, check, copy_set, download

LISTED = "/api/v1/datasets.DatasetApiService/GetDataset"
FETCHED = "/api/v1/datasets.DatasetApiService/DownloadDataset"


class Kaggle(http.server.BaseHTTPRequestHandler):
    """Stands where a proxy stands, and answers as Kaggle: which version there is, the way to the archive, the
    archive."""

    archive = b""
    code = 200  # of the answer to the download
    breaks_at = None  # bytes after which the connection ends
    asked: list[tuple[str, str | None, dict, str | None]] = []  # address, range, what was sent, authorization

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        address = self.path.removeprefix("http://localhost")
        self.asked.append((address, None, sent, self.headers["Authorization"]))
        if address == LISTED:
            self.answer(200, json.dumps({"currentVersionNumber": 2}).encode())
        elif self.code != 200:
            self.answer(self.code, json.dumps({"code": self.code, "message": "refused"}).encode())
        else:
            self.send_response(302)
            self.send_header("Location", "http://storage.example/archive.zip")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.asked.append((self.path, wanted, {}, self.headers["Authorization"]))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.answer(206 if wanted else 200, self.archive[start:], "application/zip")

    def answer(self, code: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(code)
        for name, value in (
            ("Content-Type", kind),
            ("Accept-Ranges", "bytes"),
            ("Content-Length", str(len(content))),
        ):
            self.send_header(name, value)
        self.end_headers()
        whole = self.breaks_at is None or kind == "application/json"
        self.wfile.write(content if whole else content[: self.breaks_at])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def archive(phantoms, tmp_path_factory) -> bytes:
    """The phantoms packed as Kaggle packs the scans: twice."""
    path = tmp_path_factory.mktemp("kaggle") / "archive.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for place in ("kaggle_3m", "lgg-mri-segmentation/kaggle_3m"):
            packed.writestr(f"{place}/data.csv", "Patient\n")
            for file in sorted((phantoms / "kaggle_3m").rglob("*.tif")):
                packed.write(file, f"{place}/{file.relative_to(phantoms / 'kaggle_3m').as_posix()}")
    return path.read_bytes()


@pytest.fixture
def kaggle(archive, tmp_path, monkeypatch):
    """The server as the only one that can be reached, an empty cache, and no account."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kaggle)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    Kaggle.archive, Kaggle.code, Kaggle.breaks_at, Kaggle.asked = archive, 200, None, []
    for name in [
        name for name in os.environ if name.upper().startswith("KAGGLE") or name.lower().endswith("_proxy")
    ]:
        monkeypatch.delenv(name)
    for name, value in (
        ("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}"),
        ("KAGGLE_API_ENVIRONMENT", "LOCALHOST"),
        ("HTTPS_PROXY", f"http://127.0.0.1:{server.server_port}"),
        ("KAGGLEHUB_CACHE", str(tmp_path / "cache")),
        ("KAGGLE_CONFIG_DIR", str(tmp_path / "account")),
        ("HOME", str(tmp_path / "home")),
    ):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.lower() if name.endswith("PROXY") else name, value)
    yield Kaggle
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def numbers(phantoms) -> tuple[int, int]:
    """How many patients and slices the archive holds."""
    found = read_patients(phantoms / "kaggle_3m", "own")
    return len(found), sum(len(patient.images) for patient in found)


def refused(out: Path, numbers: tuple[int, int]) -> str:
    """The sentence with which the download ends; it always says how to do it by hand."""
    with pytest.raises(MedFLError) as error:
        download(out, *numbers)
    assert PAGE in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def same_files(one: Path, other: Path) -> bool:
    contents = [
        {file.relative_to(top): file.read_bytes() for file in top.rglob("*.tif")} for top in (one, other)
    ]
    return bool(contents[0]) and contents[0] == contents[1]


def test_the_set_is_fetched_once_and_nothing_but_its_name_is_sent(kaggle, phantoms, numbers, tmp_path):
    out = tmp_path / "data"
    folder, fetched = download(out, *numbers)
    assert (
        fetched
        and folder == out / "kaggle_3m" == find_dataset(out)
        and same_files(folder, phantoms / "kaggle_3m")
    )
    assert (folder / "data.csv").exists() and {path.name for path in out.iterdir()} == {
        "kaggle_3m"
    }  # one copy
    named = {"ownerSlug": "mateuszbuda", "datasetSlug": "lgg-mri-segmentation"}
    assert [address for address, *_ in kaggle.asked] == [
        LISTED,
        FETCHED,
        "http://storage.example/archive.zip",
    ]
    assert [sent for _, _, sent, _ in kaggle.asked] == [named, {**named, "datasetVersionNumber": 2}, {}]
    assert not any(authorization for *_, authorization in kaggle.asked)
    kaggle.asked.clear()
    assert download(out, *numbers) == (folder, False) and not kaggle.asked
    (out / "lgg-mri-segmentation").mkdir()
    shutil.move(folder, out / "lgg-mri-segmentation" / "kaggle_3m")  # another layout that people end up with
    assert download(out, *numbers) == (out / "lgg-mri-segmentation" / "kaggle_3m", False) and not kaggle.asked


def test_a_broken_connection_goes_on_where_it_stopped(kaggle, phantoms, numbers, tmp_path):
    kaggle.breaks_at = len(kaggle.archive) // 2
    assert "connection was lost" in refused(tmp_path / "data", numbers)
    assert not (tmp_path / "data").exists()
    kaggle.breaks_at = None
    folder, _ = download(tmp_path / "data", *numbers)
    start = int(kaggle.asked[-1][1].removeprefix("bytes=").rstrip("-"))
    assert 0 < start <= len(kaggle.archive) // 2 and same_files(folder, phantoms / "kaggle_3m")


def test_a_broken_copying_goes_on_and_leaves_no_half_patient(kaggle, phantoms, numbers, tmp_path):
    folder, _ = download(tmp_path / "data", *numbers)
    first, second = sorted(path for path in folder.iterdir() if path.is_dir())[:2]
    half = folder / f".{second.name}.partial"
    second.rename(half)  # as a run leaves it that was killed in the middle of the second patient
    next(half.iterdir()).unlink()
    before = next(first.iterdir()).stat().st_mtime_ns
    assert download(tmp_path / "data", *numbers)[1] and same_files(folder, phantoms / "kaggle_3m")
    assert not half.exists() and next(first.iterdir()).stat().st_mtime_ns == before


def test_what_is_not_of_the_download_is_never_overwritten(kaggle, phantoms, numbers, tmp_path):
    patient = sorted((phantoms / "kaggle_3m").iterdir())[0].name
    drawn = tmp_path / "data" / "kaggle_3m" / patient / f"{patient}_1.tif"
    drawn.parent.mkdir(parents=True)
    drawn.write_bytes(b"a mask that someone drew anew")
    with pytest.raises(MedFLError, match="differs from the download; move it away"):
        download(tmp_path / "data", *numbers)
    assert drawn.read_bytes().startswith(b"a mask")


def test_a_set_that_lacks_a_patient_a_slice_or_a_mask_is_told(kaggle, numbers, tmp_path):
    with pytest.raises(
        MedFLError, match=f"{numbers[0]} patients and {numbers[1]} slices, but the dataset has 110 and 3929"
    ):
        download(tmp_path / "data")
    assert not (tmp_path / "data").exists()
    folder, _ = download(tmp_path / "data", *numbers)
    next(folder.rglob("*_1_mask.tif")).unlink()
    with pytest.raises(MedFLError, match="has no mask"):
        check(folder, *numbers)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(401, "requires an account"), (403, "accepted its terms"), (404, "code 404"), (500, "code 500")],
)
def test_each_refusal_gets_a_sentence(kaggle, numbers, tmp_path, code, sentence):
    kaggle.code = code
    assert sentence in refused(tmp_path / "data", numbers)


def test_a_damaged_archive_is_fetched_anew(kaggle, archive, numbers, tmp_path):
    for damaged in (b"<html>sign in</html>", archive[:-30]):
        kaggle.archive = damaged
        assert "damaged or not an archive" in refused(tmp_path / "data", numbers)
    kaggle.archive = archive
    assert download(tmp_path / "data", *numbers)[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full needs /dev/full")
def test_a_full_disk_is_told_in_the_download_and_in_the_copying(kaggle, phantoms, numbers, tmp_path):
    cache_folder().mkdir(parents=True)
    (cache_folder() / "2.archive").symlink_to("/dev/full")
    assert "disk is full" in refused(tmp_path / "data", numbers)
    (cache_folder() / "2.archive").unlink()
    (tmp_path / "data" / "kaggle_3m").mkdir(parents=True)
    (tmp_path / "data" / "kaggle_3m" / ".data.csv.partial").symlink_to("/dev/full")
    assert "disk is full" in refused(tmp_path / "data", numbers)


def test_no_network_no_folder_and_an_unreadable_account(kaggle, numbers, tmp_path, monkeypatch):
    (tmp_path / "account").mkdir()
    (tmp_path / "account" / "kaggle.json").write_text("{")
    assert "account's file" in refused(tmp_path / "data", numbers)
    (tmp_path / "account" / "kaggle.json").unlink()
    (tmp_path / "file").write_text("")
    assert "can't be written" in refused(tmp_path / "file", numbers)
    shutil.rmtree(cache_folder())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    done = run_script("data/download.py", "--out", tmp_path / "data")
    assert done.returncode == 2 and "can't be reached" in done.stderr and PAGE in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_an_account_is_used_where_there_is_one(kaggle, numbers, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-token")
    download(tmp_path / "data", *numbers)
    told = {address: authorization for address, _, _, authorization in kaggle.asked}
    assert told[FETCHED] == "Bearer a-token" and told["http://storage.example/archive.zip"] is None


def test_without_kagglehub_the_sentence_says_what_to_install(kaggle, tmp_path):
    (tmp_path / "kagglehub.py").write_text("raise ImportError('as if it were not installed')\n")
    done = run_script(
        "data/download.py", "--out", tmp_path / "data", env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert (
        done.returncode == 2 and "requirements-download.txt" in done.stderr and done.stderr.count("\n") == 1
    ), done.stderr


def test_copying_leaves_the_source_as_it_was(phantoms, tmp_path):
    shutil.copytree(phantoms / "kaggle_3m", tmp_path / "source")
    copy_set(tmp_path / "source", tmp_path / "target")
    copy_set(tmp_path / "source", tmp_path / "target")
    assert same_files(tmp_path / "source", phantoms / "kaggle_3m") and same_files(
        tmp_path / "target", tmp_path / "source"
    )
