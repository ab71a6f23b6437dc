"""Scripts run as a user runs them."""

import contextlib
import importlib
import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import common

ROOT = Path(__file__).parent.parent


def copy_of_medfl(folder: Path) -> Path:
    """The scripts and what they import in another folder, for a test to change."""
    packages = [
        path
        for name in ("appearance", "evaluation", "federation", "scans", "tasks")
        for path in (ROOT / name).rglob("*.py")
    ]
    for path in [ROOT / "LICENSE", *ROOT.glob("*.py"), *packages]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return folder


def change(path: Path, before: str, after: str) -> None:
    """Replace a piece of a file that stands in it once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{before!r} in {path}"
    path.write_text(text.replace(before, after), encoding="utf-8")


def run_script(script: str, *options: object, cwd: Path = ROOT, **kept) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user does; what it printed is kept."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, options)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        **kept,
    )


def run_here(script: str, *options: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """The same in this process, which has torch loaded already: a start takes four seconds, and most tests
    look at what a script says and writes. Each script is started for real somewhere."""
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    command, output, errors, code = [str(ROOT / script), *map(str, options)], io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            common.run_script(main)
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())
