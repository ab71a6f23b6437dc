"""The content of a folder on disk: all of it or a refusal, so that nothing is left out silently."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from borders.limits import MAX_FILES
from common import MedFLError

# made by file systems and shares, never scans; lost+found of ext4 can't be read, Synology's @eaDir holds thumbnails
OF_THE_SYSTEM = {"lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "__MACOSX"}

TREES_OF_IMAGES = {"images", "image", "imagestr"}  # folders of all patients' scans, in lower case
TREES_OF_MASKS = {"masks", "mask", "labels", "label", "labelstr"}


def contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in `folder`, each sorted by name, without hidden ones and those of a file
    system.

    Raises MedFLError if it can't be read, for a link to a missing target, and for a pipe or a device, because
    reading it would never end.
    """
    folders: list[Path] = []
    files: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in OF_THE_SYSTEM:
                    continue
                path = folder / entry.name
                if entry.is_symlink():
                    refuse_dangling(path)
                if not entry.is_dir() and not entry.is_file():
                    raise MedFLError(f"{path} is a pipe or a device, not a file; remove it")
                (folders if entry.is_dir() else files).append(path)
    except OSError as error:
        raise MedFLError(f"{folder} can't be read ({error.strerror}); check its permissions") from error
    return sorted(folders), sorted(files)


def as_text(path: str | PurePath) -> str:
    """A path as text that can be written anywhere: bytes that are not UTF-8 are written like `\\xfc`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def refuse_dangling(path: Path) -> None:
    """Raises MedFLError for a link to a missing target or to itself."""
    if path.is_symlink() and not os.path.exists(path):
        if _is_circle(path):
            raise MedFLError(f"{path} is a link that leads to itself; remove it")
        raise MedFLError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; fetch it (`git annex get`, "
            "`datalad get`), connect the share that it is on, or remove the link"
        )


def walk(top: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder from `top` down and its files, nearest first. Links to folders are followed, unless they
    lead back to a folder on the path to the link. Raises MedFLError for what `contents` refuses, and for
    links that lead to the same folders over and over: thirty of them can name a folder in a billion ways."""
    level, seen, again = [top], set(), 0
    while level:
        below: list[Path] = []
        for folder in level:
            folders, files = contents(folder)
            yield folder, files
            for inside in folders:
                if _leads_back(inside):
                    continue
                if inside.is_symlink():
                    real = inside.resolve()
                    again += real in seen
                    seen.add(real)
                below.append(inside)
            if again > MAX_FILES:
                raise MedFLError(
                    f"links below {top} lead to the same folders more than {MAX_FILES:,} times; remove them"
                )
        level = below


def _leads_back(folder: Path) -> bool:
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    return any(way.resolve().is_relative_to(target) for way in folder.absolute().parents)


def _is_circle(link: Path) -> bool:
    try:
        link.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False
