"""Shared by all parts of MedFL: the error for users, exit codes, settings as options, wording, the version."""

import argparse
import ast
import dataclasses
import errno
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from borders import escaping
from borders.terminal import steady_output

__version__ = "0.3.0"

ROOT = Path(__file__).parent

# nothing here opens a window, and the backend that a notebook or a desktop exports may not be installed
os.environ["MPLBACKEND"] = "agg"

SMALLEST_GROUP = 3  # patients: a mean over fewer would reveal something about one of them

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container (cgroup 2): microseconds of work, and their period
NO_TEMPORARY = "No usable temporary directory"  # the words of Python's tempfile
NO_MEMORY = (  # the words of torch, and of oneDNN within it
    "can't allocate memory",
    "CUDA out of memory",
    "MPS backend out of memory",
    "could not create a primitive",
)

EXIT_BAD_INPUT = 2
EXIT_NO_QUORUM = 3
EXIT_INTERRUPTED = 130


class MedFLError(Exception):
    """An error of the user or the machine. Its message is one sentence: what is wrong; what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` with the exit codes of this project: 0 for success, 2 for bad input, a full disk or too
    little memory, 130 for Ctrl-C, SIGTERM or a closed terminal, 1 for a bug."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    sys.argv[1:] = [_with_home(word) for word in sys.argv[1:]]
    signal.signal(signal.SIGTERM, interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # keep nohup's
        signal.signal(signal.SIGHUP, interrupt)
    steady_output()
    script = sys.modules[main.__module__]
    script.__doc__ = script.__doc__ or "\n"  # --help begins with its first line, and `python -OO` removes it
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
    """The sentence for an error of the user or the machine; None for a bug."""
    if isinstance(error, MedFLError):
        return str(error)
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        return (
            "there is not enough memory; close other programs, or take a smaller --batch-size or --image-size"
        )
    if isinstance(error, OSError) and NO_TEMPORARY in text:  # in a container without a writable folder
        return "there is no writable folder for temporary files (such as /tmp); name one in TMPDIR"
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


def setting(default: Any, help: str, choices: tuple | None = None, kind: type | None = None) -> Any:
    """A field of a settings dataclass. help: its text with the unit; choices: the values it may take; kind: its
    type, needed where the default is None."""
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
    """The options that the command line gives, by the names of their values. Defaults do not count."""
    missing = object()
    values = argparse.Namespace(**{action.dest: missing for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(namespace=values)).items() if value is not missing}


def files_needed(*entries: str, root: Path = ROOT, without: tuple[str, ...] = ()) -> list[str]:
    """The Python files of this repository that running these files imports, themselves included, as sorted
    paths below `root`.

    without: packages to leave out, for a program that also works without them. Imports inside functions count as
    well.
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
    """A number of things in words: "1 patient", "5 patients", "2 series", "3 classes"."""
    if number == 1 or noun.endswith("series"):
        return f"{number} {noun}"
    return f"{number} {noun}{'es' if noun.endswith('ss') else 's'}"


def typed(path: Path) -> str:
    """A path as it is typed into a command: in quotes if it holds spaces or other special characters."""
    return shlex.quote(str(path)) if os.name == "posix" else subprocess.list2cmdline([str(path)])


def tell(notes: Iterable[str]) -> None:
    """Print what a user should know before trusting a result, one line each."""
    for note in notes:
        print(f"note: {escaping.terminal(note)}", flush=True)


def usable_cores() -> int:
    """Cores that this process may use. A batch system, `taskset` or a container's quota can allow fewer than the
    machine has."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        return min(there, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # another system, or "max"
        return there


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
