"""Reads a torch file without running any of its code and without taking more memory than the file has bytes."""

import os
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from common import MedFLError

LFS_POINTER = b"version https://git-lfs"
VIEWS = 4  # times that a file's values may be shared; weights are, by a run's state and the model
PICKLE = (
    "data.pkl"  # in the archive, in letters of any size: what the file holds, without the values of tensors
)
END, END_64, LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"  # the ends of a ZIP, the last two of a large one
END_BYTES, LOCATOR_BYTES, END_64_BYTES = 22, 20, 56
MODULES = (
    "torch ",
    "torch.storage ",
    "collections OrderedDict",
    "torch._utils _rebuild_",
)  # names that the pickle may use
# names among these that make large objects from a few bytes
REFUSED = ("torch Tensor", "torch.storage TypedStorage", "torch._utils _rebuild_sparse")
DAMAGED = (
    zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, OSError, TypeError, AttributeError,
    IndexError, OverflowError, MemoryError, NotImplementedError,
)  # fmt: skip


def refuse_pointer(path: Path) -> None:
    """Raises MedFLError for Git LFS's note in the place of weights, and OSError for what can't be read."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise MedFLError(
                f"{path} is a Git LFS pointer, not the weights; run `git lfs install` and `git lfs pull`"
            )


def read_torch_file(path: Path) -> Any:
    """The file's content as torch reads it, on the CPU.

    Raises MedFLError for a file that is packed or claims more values than it holds, pickle.UnpicklingError for Python
    objects other than tensors and plain values and for a pickle without an archive, which could ask for any amount of
    memory, and the errors of `DAMAGED` for a damaged file or no archive.
    """
    with open(path, "rb") as file:
        head = file.read(2)
    if head[:1] == b"\x80":
        raise pickle.UnpicklingError("a pickle by itself")
    if head != b"PK":
        raise ValueError("no torch file")
    _check_archive(path)
    _check_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=True), path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: Path) -> None:
    """Raises MedFLError for packed entries, for more bytes than the file has (torch packs nothing), for entries that
    torch would not see as we do, and what `_check_names` raises."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if (
            packed
            or sum(entry.file_size for entry in entries) > path.stat().st_size
            or not _has_one_list(path)
        ):
            raise MedFLError(
                f"{path} is packed, or claims more than it holds; take the file as it was written"
            )
        for entry in entries:
            if entry.orig_filename.lower().endswith(PICKLE):
                with archive.open(entry) as content:
                    _check_names(content)


def _has_one_list(path: Path) -> bool:
    """Whether a ZIP has one list of its entries for every reader: Python takes the one that lies before the end, and
    torch the one whose place the end tells."""
    with open(path, "rb") as file:
        place = file.seek(0, os.SEEK_END) - END_BYTES
        end = _read_at(file, place, END_BYTES)
        if not end.startswith(END):
            return False
        size, offset = struct.unpack_from("<II", end, 12)
        locator = _read_at(file, place - LOCATOR_BYTES, LOCATOR_BYTES)
        if locator.startswith(LOCATOR_64):
            place -= LOCATOR_BYTES + END_64_BYTES
            end = _read_at(file, place, END_64_BYTES)
            if not end.startswith(END_64) or struct.unpack_from("<Q", locator, 8) != (place,):
                return False
            size, offset = struct.unpack_from("<QQ", end, 40)
    return bool(size + offset == place)


def _read_at(file: IO[bytes], place: int, count: int) -> bytes:
    file.seek(max(0, place))
    return file.read(count)


def _check_names(content: IO[bytes]) -> None:
    """Raises pickle.UnpicklingError if a pickle names more than tensors. torch's own list also allows `bytearray`,
    with which a few bytes can ask for any number of gigabytes."""
    for operation, name, _ in pickletools.genops(content):
        if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(operation.name)
        if operation.name == "GLOBAL" and (
            not str(name).startswith(MODULES) or str(name).startswith(REFUSED)
        ):
            raise pickle.UnpicklingError(str(name))


def _check_tensors(content: Any, path: Path) -> None:
    """Raises MedFLError for tensors that stand for more values than the file holds: repeated or sparse ones, and
    many tensors over the same bytes; and for nested ones, which have no shape."""
    waiting, seen, claimed = [content], set(), 0
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            if one.is_nested or one.layout != torch.strided or one.numel() > _held(one):
                raise MedFLError(
                    f"{path} holds tensors that are not plain values; take one that holds plain weights"
                )
            claimed += one.numel() * one.element_size()
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting += one
    if claimed > VIEWS * path.stat().st_size:
        raise MedFLError(f"{path} claims more values than it holds; take the file as it was written")


def _held(tensor: torch.Tensor) -> int:
    """How many values lie behind a tensor."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()
