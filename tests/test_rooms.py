"""docs/architecture.md: a room uses what stands above it, no files import each other in a circle, and every import
finds the module that is meant."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from common import ROOT

NO_ROOM = (
    "docs/",
    "requirements/",
    "tests/",
    "federation/__init__.py",
)  # scripts for the texts, and a docstring


def files() -> list[str]:
    """The code's files, relative to the root."""
    listed = (
        (ROOT / "pyproject.toml").read_text().split("[tool.setuptools]")[1].split("[tool.setuptools.dyn")[0]
    )
    packages = [
        name.replace(".", "/")
        for name in re.findall(r'"([\w.]+)"', listed.split("packages = [")[1].split("]")[0])
    ]
    found = [*ROOT.glob("*.py"), *(path for package in packages for path in (ROOT / package).glob("*.py"))]
    return sorted(str(path.relative_to(ROOT)) for path in found)


CODE = files()
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in CODE}


def rooms() -> list[list[str]]:
    """Files and folders of each row of the table, from the top."""
    table = (ROOT / "docs" / "architecture.md").read_text().split("| --- | --- |")[1].split("\n\n")[0]
    return [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in table.strip().splitlines()]


ROOMS = rooms()


def row_of(name: str) -> int | None:
    """The row that a file stands in, by the longest folder that fits."""
    fits = [
        (len(room), row)
        for row, each in enumerate(ROOMS)
        for room in each
        if name == room or room.endswith("/") and name.startswith(room)
    ]
    return max(fits)[1] if fits else None


def imported(name: str) -> Iterator[str]:
    """The files that a file imports, also inside of functions and for types only."""
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            asked = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (MODULES[module] for module in asked if module in MODULES and MODULES[module] != name)


IMPORTS = {name: set(imported(name)) for name in CODE}


def test_every_file_has_a_room():
    assert [name for name in CODE if row_of(name) is None and not name.startswith(NO_ROOM)] == []


def test_no_room_uses_one_below_it():
    rows = {name: row for name in CODE if (row := row_of(name)) is not None}
    assert [(one, other) for one in rows for other in IMPORTS[one] if rows.get(other, 0) > rows[one]] == []


def test_no_circle():
    waiting, done = {name: set(others) for name, others in IMPORTS.items()}, set()
    while free := {name for name, others in waiting.items() if others <= done}:
        done |= free
        waiting = {name: others for name, others in waiting.items() if name not in free}
    assert waiting == {}


def test_no_module_beside_a_script_takes_a_rooms_name():
    """Python looks beside the script first: benchmarks/evaluation.py would be imported in the place of evaluation/."""
    top = {module.split(".")[0] for module in MODULES}
    beside = {name: Path(name).stem for name in CODE if "/" in name and not name.endswith("__init__.py")}
    started = {
        str(Path(name).parent)
        for name in CODE
        if "/" in name and "run_script(main)" in (ROOT / name).read_text()
    }
    started.add("deployment/app")  # by `streamlit run`
    assert [name for name, stem in beside.items() if str(Path(name).parent) in started and stem in top] == []
