"""What every part of MedFL may use: the user's error, exit codes, atomic writes, settings as options, the
version."""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

__version__ = "0.3.0"

ROOT = Path(__file__).parent

SMALLEST_GROUP = 3  # patients: a mean over fewer says something of one

EXIT_BAD_INPUT = 2
EXIT_NO_QUORUM = 3
EXIT_INTERRUPTED = 130


class MedFLError(Exception):
    """A user's mistake, or the machine's: one sentence that says what is wrong; and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` with the exit codes of this project: 0, 2 bad input, 130 Ctrl-C or SIGTERM, 1 a
    bug."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except MedFLError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        beside = Path(name)
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not private:
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
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def utc_now() -> str:
    """The time now, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit of this working copy, or None outside one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
