"""ZIP and gzip files in memory, unpacked within bounds."""

import gzip
import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from borders.limits import MAX_FILES, MAX_NAME, MAX_UNPACKED, ZIP_KINDS
from common import MedFLError
from deployment.app.case import short

# exceptions of Python's zipfile and its decompressors for an archive that is damaged, encrypted or of another
# kind
DAMAGED = (
    zipfile.BadZipFile,
    RuntimeError,
    NotImplementedError,
    OSError,
    EOFError,
    ValueError,
    IndexError,
    zlib.error,
    MemoryError,
)


def check_number(files: int) -> None:
    """Raises MedFLError for more files than a case has."""
    if files > MAX_FILES:
        raise MedFLError(
            f"{files} files are more than the {MAX_FILES} of one case; upload one patient at a time"
        )


def check_lengths(names: Iterable[str]) -> None:
    """Raises MedFLError for a name that no file system could hold."""
    if long := next((name for name in names if max(map(len, name.split("/"))) > MAX_NAME), None):
        raise MedFLError(f"{short(long)} has a name of more than {MAX_NAME} letters; rename it")


def check_names(names: Iterable[str]) -> None:
    """Raises MedFLError for a name that occurs twice: one of the two files would be lost."""
    counts = Counter(names)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise MedFLError(
            f"{short(twice)} is there {counts[twice]} times, so it is not clear which one counts; give each "
            "file a different name"
        )


def unpack_zip(name: str, content: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of a ZIP's files, without folders and hidden files. Raises MedFLError for a damaged
    archive, names that point out of it, and archives that unpack to too much."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_number(len(archive.infolist()))
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in entries:
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts[:1]):
                    raise MedFLError(
                        f"{short(name)} holds a name that points out of the archive; pack the slices again"
                    )
            if any(entry.compress_type not in ZIP_KINDS for entry in entries):
                raise MedFLError(
                    f"{short(name)} is compressed with bzip2 or LZMA; pack it again as an ordinary ZIP"
                )
            if sum(entry.file_size for entry in entries) > MAX_UNPACKED:
                raise MedFLError(
                    f"{short(name)} unpacks to more than {MAX_UNPACKED >> 20} MB; pack one patient at a time"
                )
            files, room = [], MAX_UNPACKED
            for entry in entries:
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if any(part.startswith((".", "__MACOSX")) for part in path.parts):
                    continue
                with archive.open(entry) as file:
                    piece = file.read(min(room, entry.file_size) + 1)  # a header can lie about the size
                room -= len(piece)
                if room < 0:
                    raise MedFLError(
                        f"{short(name)} unpacks to more than {MAX_UNPACKED >> 20} MB; pack one patient at a "
                        f"time"
                    )
                files.append((str(path), piece))
    except DAMAGED as error:
        raise MedFLError(
            f"{short(name)} can't be unpacked (damaged, encrypted or of another kind); pack it again"
        ) from error
    if not files:
        raise MedFLError(f"{short(name)} holds no files; pack the slices into it")
    return files


def unpack_gzip(content: bytes) -> bytes:
    """The content of a .gz file. Raises MedFLError, in words that follow the file's name, for a damaged one,
    or one that unpacks to too much."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            unpacked = file.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise MedFLError("can't be unpacked, it is truncated or damaged; copy it again") from error
    if len(unpacked) > MAX_UNPACKED:
        raise MedFLError(f"unpacks to more than {MAX_UNPACKED >> 20} MB; crop it first")
    return unpacked


def gzip_begins_with(content: bytes, length: int) -> bytes:
    """The first bytes of a .gz file's content. Raises MedFLError like `unpack_gzip`."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            return file.read(length)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise MedFLError("can't be unpacked, it is truncated or damaged; copy it again") from error
