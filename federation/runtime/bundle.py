"""The bundle of code that the server sends to the hospitals: the files of this repository that the two apps import,
and nothing else. Hospitals compare the files that run at a hospital with their own."""

import functools
import hashlib
import io
import zipfile

from borders.limits import ZIP_KINDS
from common import ROOT, __version__, files_needed
from federation.runtime.flower import CLIENT_APP, SERVER_APP, build_bundle

LARGEST = 1_000_000  # bytes; a larger file is not MedFL's code


def _entry(app: str) -> str:
    return app.replace(".", "/") + ".py"


def _content(name: str) -> bytes:
    """A file as it is sent: text with line feeds, whatever the checkout has."""
    return (ROOT / name).read_bytes().replace(b"\r\n", b"\n")


@functools.cache
def make_bundle() -> bytes:
    """The bundle; the same files give the same bytes."""
    names = ["LICENSE", *files_needed(_entry(SERVER_APP), _entry(CLIENT_APP))]
    return build_bundle({name: _content(name) for name in names}, __version__)


@functools.cache
def hospital_files() -> tuple[str, ...]:
    """The files that run at a hospital."""
    return tuple(files_needed(_entry(CLIENT_APP)))


@functools.cache
def hospital_code() -> str:
    """SHA-256, in hexadecimal, of the installed MedFL's files that run at a hospital."""
    return _hash({name: _content(name) for name in hospital_files()})


def code_in(bundle: bytes) -> str:
    """The same hash of a received bundle, over those of its files that run at a hospital here. Nothing in it is run."""
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            entries = {info.filename: info for info in archive.infolist() if info.compress_type in ZIP_KINDS}
            there = [entries[name] for name in hospital_files() if name in entries]
            return _hash({e.filename: _unpacked(archive, e) for e in there if e.file_size < LARGEST})
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, NotImplementedError):
        return _hash({})


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The content of a file in an archive, at most as many bytes as the archive announces."""
    with archive.open(entry) as file:
        return file.read(entry.file_size)


def _hash(files: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\n{len(files[name])}\n".encode())
        total.update(files[name])
    return total.hexdigest()
