"""Reads a torch file without running any of its code and without taking more memory than the file has bytes."""

import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from common import MedFLError

VIEWS = 4  # times that a file's values may be shared; a run's state and the model share weights
PICKLE = "data.pkl"  # in the archive: the file's content without the values of tensors
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
    """Raises MedFLError for packed entries and for more bytes than the file has (torch packs nothing). Raises also
    what `_check_names` raises."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise MedFLError(
                f"{path} is packed, or claims more than it holds; take the file as it was written"
            )
        for entry in entries:
            if entry.filename.endswith(PICKLE):
                with archive.open(entry) as content:
                    _check_names(content)


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
    many tensors over the same bytes."""
    waiting, seen, claimed = [content], set(), 0
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            if one.layout != torch.strided or one.numel() > _held(one):
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
