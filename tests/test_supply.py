"""What is installed is pinned: each lock file holds what its requirements name, by version and SHA-256, from no place
of its own; images install from these and nothing else."""

import re

import pytest
from running import ROOT

from requirements.lock import PURPOSES, TORCH

LOCKS = ROOT / "requirements"
PIN = re.compile(r"(?m)^([A-Za-z0-9._-]+)(?:\[[\w,-]+\])?==([^ ;#\n]+)")


def named(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> set[tuple[str, str]]:
    return {(named(name), version) for name, version in PIN.findall(text)}


def wanted(file: str) -> set[tuple[str, str]]:
    """What a requirements file pins, with those that it includes."""
    path = ROOT / file
    text = path.read_text(encoding="utf-8")
    return pins(text).union(*(wanted(one) for one in re.findall(r"(?m)^-r (\S+)", text)))


def locked(name: str) -> str:
    return (LOCKS / f"{name}.lock").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PURPOSES)
def test_a_lock_holds_what_its_requirements_name(name):
    missing = set().union(*map(wanted, PURPOSES[name])) - pins(locked(name)) - pins(locked(TORCH))
    assert not missing, "run `make lock`"


@pytest.mark.parametrize("name", [*PURPOSES, TORCH])
def test_every_package_has_hashes_and_no_address(name):
    lines = locked(name).splitlines()
    assert not [line for line in lines if "//" in line or line.startswith("-") or " @ " in line]
    for line, after in zip(lines[1:], [*lines[2:], ""]):
        assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?|[\w.-]+(\[[\w,-]+\])?==.* \\", line), line
        assert "==" not in line or after.startswith("    --hash=sha256:")


@pytest.mark.parametrize("side", ["server", "hospital", "space"])
def test_images_install_by_hash(side):
    """All but torch, by its pinned version, and MedFL itself."""
    text = (ROOT / "deployment" / side / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [one.strip() for one in re.findall(r"pip install([^;&\n]*)", text)]
    by_hash = [one for one in commands if "--require-hashes --no-deps -r" in one]
    others = [one for one in commands if one not in by_hash]
    assert by_hash and all("requirements" in one and ".lock" in one for one in by_hash)
    assert [
        one for one in others if "grep -Eo '^torch(vision)?==" not in one and not one.endswith("-e .")
    ] == []
