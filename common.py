"""What every part of MedFL may use: the user's error, exit codes, atomic writes, settings as options, the
version."""

import argparse
import ast
import codecs
import contextlib
import csv
import dataclasses
import errno
import glob
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import escaping

if TYPE_CHECKING:
    from filelock import FileLock

__version__ = "0.3.0"

ROOT = Path(__file__).parent

# nothing here opens a window, and what a notebook or a desktop exports may not be installed here
os.environ["MPLBACKEND"] = "agg"

SMALLEST_GROUP = 3  # patients: a mean over fewer says something of one

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container (cgroup 2): microseconds of work, and in how many
NAME_KEPT = 40  # characters of a file's name in that of its half; a name has at most 255 bytes
NO_TEMPORARY = "No usable temporary directory"  # as Python's tempfile says it
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what shares say that have none
NO_MEMORY = (  # as torch says it, and oneDNN within it
    "can't allocate memory",
    "CUDA out of memory",
    "MPS backend out of memory",
    "could not create a primitive",
)
TORN = (
    "PytorchStreamWriter",
    "inline_container",
)  # torch's words in the error of a file that it could not write

EXIT_BAD_INPUT = 2
EXIT_NO_QUORUM = 3
EXIT_INTERRUPTED = 130


class MedFLError(Exception):
    """A user's mistake, or the machine's: one sentence that says what is wrong; and what to do."""


class SteadyStream:
    """A terminal, file or pipe that never ends a run and that no name commands: what it can't show is escaped, as
    are control codes, and when it is gone (a closed pipe, a full disk, a terminal that was closed) what is said
    goes nowhere."""

    def __init__(self, stream: Any):
        self._stream = stream
        if hasattr(stream, "reconfigure"):  # not so in a notebook
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._unbroken():
            self._stream.write(escaping.stream(text))
        return len(text)

    def flush(self) -> None:
        with self._unbroken():
            self._stream.flush()

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: it was closed
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())  # also for what Python still holds, at the end
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_output() -> None:
    """See to it that nothing that is printed from now on raises. A service may have been started with both closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  until the process ends
        if not isinstance(stream, SteadyStream):
            setattr(sys, name, SteadyStream(stream))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` with the exit codes of this project: 0, 2 bad input, a full disk or too little
    memory, 130 Ctrl-C, SIGTERM or a closed terminal, 1 a bug."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    sys.argv[1:] = [_with_home(word) for word in sys.argv[1:]]
    signal.signal(signal.SIGTERM, interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # but nohup's
        signal.signal(signal.SIGHUP, interrupt)
    steady_output()
    script = sys.modules[main.__module__]
    script.__doc__ = (
        script.__doc__ or "\n"
    )  # --help begins with its first line, and `python -OO` takes it away
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        sentence = in_words(error)
        if sentence is None:
            raise
        print(f"{Path(sys.argv[0]).name}: {escaping.terminal(sentence)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def _with_home(word: str) -> str:
    """A word of the command line with the home folder for `~/`: shells leave it behind `=` (`--out=~/models`) and in
    quotes, and a folder called ~ would be made."""
    option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{sign}{os.path.expanduser(value)}" if value == "~" or value.startswith("~/") else word


def in_words(error: Exception) -> str | None:
    """The sentence for an error that is the user's or the machine's, None for a bug."""
    if isinstance(error, MedFLError):
        return str(error)
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        return (
            "there is not enough memory; end other programs, or take a smaller --batch-size or --image-size"
        )
    if isinstance(error, OSError) and NO_TEMPORARY in text:  # in a container without a writable folder
        return "there is no folder for temporary files (as /tmp) that can be written; name one in TMPDIR"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return (
            f"the disk is full ({error.filename or 'where a file was written'}); free space and start again"
        )
    if isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike):
        return (
            f"{error.filename} can't be read or written ({error.strerror}); check the name, its permissions and "
            "that its disk is there"
        )
    return None


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb", private: bool = False) -> Iterator[IO]:
    """An open file that takes the place of `path` at the end of the block, whole or not at all. Only its
    owner can read a private one.

    Raises MedFLError where the folder can't be made or written, or the disk is full.
    """
    path = Path(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = f".{path.name[:NAME_KEPT]}."
        _remove_leftovers(path.parent, hidden)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{hidden}{os.getpid()}-")
        beside = Path(name)
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not private:
            with contextlib.suppress(OSError):  # many shares keep their own permissions
                beside.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        _replace(beside, path)
    except PermissionError as error:
        raise MedFLError(
            f"{path} can't be written; close the program that has it open, or choose a folder of your own"
        ) from error
    except OSError as error:
        raise MedFLError(
            f"{path} can't be written ({error.strerror or error}); free the space or choose another place"
        ) from error
    except RuntimeError as error:  # torch's word for a file that took no more bytes
        if not any(sign in str(error) for sign in TORN):
            raise
        raise MedFLError(
            f"{path} can't be written (the disk is full?); free the space or choose another place"
        ) from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def run_folder(kind: str) -> Path:
    """A new folder in the system's place for temporary files, called medfl-KIND-…; those that killed runs of
    this kind left there are removed."""
    place = Path(tempfile.gettempdir())
    _remove_leftovers(place, f"medfl-{kind}-")
    try:
        return Path(tempfile.mkdtemp(prefix=f"medfl-{kind}-{os.getpid()}-", dir=place))
    except OSError as error:
        raise MedFLError(
            f"no folder can be made in {place} ({error.strerror}); free space there, or name another place in TMPDIR"
        ) from error


def claim(out: Path, what: str) -> "FileLock":
    """The lock of a folder for as long as it is kept: one `what` ("server", "training") at a time writes there.
    Where the file system has no locks nobody is held off. Raises MedFLError where another one does."""
    from filelock import FileLock, Timeout  # not there where scans are prepared only

    lock = FileLock(out / f".{what}.lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MedFLError(
            f"another {what} writes into {out}; wait for its end, or choose another --out"
        ) from error
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise MedFLError(
                f"{out} can't be written ({error.strerror or error}); free it, or choose another --out"
            ) from error
    return lock


def _remove_leftovers(place: Path, prefix: str) -> None:
    """Remove what processes that are no more left in `place` under `prefix` and their number."""
    if os.name != "posix":
        return
    for left in place.glob(f"{glob.escape(prefix)}*-*"):
        number = left.name[len(prefix) :].split("-")[0]
        if number.isdigit() and left.lstat().st_uid == os.getuid() and not _is_alive(int(number)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True


def _replace(beside: Path, path: Path) -> None:
    """Rename, with patience: on Windows a virus scanner or a viewer can hold the old file for a moment."""
    for wait in (0.1, 0.3, 0.6, 1.0):
        try:
            return os.replace(beside, path)
        except PermissionError:
            time.sleep(wait)
    os.replace(beside, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_csv(path: Path, rows: Iterable[Sequence], private: bool = False) -> None:
    """Write rows of values as CSV, the names of the columns first, atomically; texts in it are no formulas."""
    with atomic_write(path, "w", private=private) as file:
        csv.writer(file).writerows([escaping.cell(value) for value in row] for row in rows)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN is a bug here, not a number."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def setting(default: Any, help: str, choices: tuple | None = None, kind: type | None = None) -> Any:
    """A field of a settings dataclass: its default, its help text with the unit, the values it may take, and
    its type where the default is None."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "kind": kind or type(default)}
    )


def add_settings(parser: argparse.ArgumentParser, settings: type, names: list[str] | None = None) -> None:
    """Add an option for each field of a settings dataclass (or those named), with the field's own default and
    help."""
    for field in dataclasses.fields(settings):
        if names is not None and field.name not in names:
            continue
        option, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help=text)
            continue
        default = "none" if field.default is None else str(field.default)
        parser.add_argument(
            option,
            type=field.metadata["kind"],
            default=field.default,
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else field.name.split("_")[-1].upper(),
            help=f"{text} (default {default})".replace("%", "%%"),
        )


def settings_from(arguments: argparse.Namespace, settings: type) -> Any:
    """The settings dataclass filled with the parsed options of the same names."""
    given = vars(arguments)
    return settings(**{f.name: given[f.name] for f in dataclasses.fields(settings) if f.name in given})


def given_options(parser: argparse.ArgumentParser) -> set[str]:
    """The options that the command line names, in the names of their values: those that no default made."""
    missing = object()
    values = argparse.Namespace(**{action.dest: missing for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(namespace=values)).items() if value is not missing}


def files_needed(*entries: str, root: Path = ROOT, without: tuple[str, ...] = ()) -> list[str]:
    """The Python files of this repository that running these files imports, themselves included, as sorted
    paths below `root`.

    without: packages that are left out, for a program that does without them where they are missing. Imports
    inside of functions count as well.
    """
    found, waiting = set(), [entry.removesuffix(".py").replace("/", ".") for entry in entries]
    while waiting:
        module = waiting.pop()
        file = next(
            (
                path
                for path in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py")
                if (root / path).is_file()
            ),
            None,
        )
        if file is None or file in found or module.split(".")[0] in without:
            continue
        found.add(file)
        waiting += [module.rpartition(".")[0]]  # the package that it lies in
        for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    return sorted(found)


def counted(number: int, noun: str) -> str:
    """A number of things in words: "1 patient", "5 patients", "2 series"."""
    return f"{number} {noun}" if number == 1 or noun.endswith("series") else f"{number} {noun}s"


def typed(path: Path) -> str:
    """A path as it is typed into a command: in quotes where it holds spaces or other signs of the shell."""
    return shlex.quote(str(path)) if os.name == "posix" else subprocess.list2cmdline([str(path)])


def tell(notes: Iterable[str]) -> None:
    """Print what a user should know before trusting a result, a line each."""
    for note in notes:
        print(f"note: {escaping.terminal(note)}", flush=True)


def text_of(path: Path, errors: str = "strict", most: int = -1) -> str:
    """A text file that a person wrote or a terminal did: UTF-8, or UTF-16 with its mark, as Windows' `>` writes it.
    most: bytes, any number where it is below 0. Raises OSError, and ValueError where it is neither or longer."""
    with open(path, "rb") as file:
        content = file.read(most + 1 if most >= 0 else -1)
    if 0 <= most < len(content):
        raise ValueError(f"more than {most:,} bytes")
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_wide else "utf-8-sig", errors)


def usable_cores() -> int:
    """Cores that this process may use: a batch system, `taskset` or a container's quota can leave it fewer than the
    machine has."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        return min(there, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # another system, or "max"
        return there


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def utc_now() -> str:
    """The time now, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit of this working copy, or None outside one: git would take that of a repository around it."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
