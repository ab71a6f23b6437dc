"""A hospital's way from its archive into a federation: export, prepare, check, join."""

import json

import pytest
from dicom_phantoms import small_study
from federations import BEST, SMALL, history
from running import run_script

pytestmark = pytest.mark.slow


def test_a_hospital_joins_with_prepared_data(scene):
    export, prepared = scene.folder / "export", scene.folder / "prepared"
    for number in range(3):
        small_study(export / str(number), number, f"QX-{number}", f"1.2.{number}", "20200101")
    done = run_script("data/prepare_hospital.py", "--dicom", export, "--out", prepared)
    assert done.returncode == 0 and "3 of 3 studies" in done.stdout, done.stderr
    server = scene.server("--clients", 1, "--rounds", 1, *SMALL)
    server.wait_for("listening on")
    check = scene.hospital("check", "--own-data", prepared, "--name", "mercy", "--check")
    assert check.end() == 0 and "own data" in check.output and "3 patients, 24 slices" in check.output, (
        check.output
    )
    # not before: while it runs, the label is its own
    hospital = scene.hospital("mercy", "--own-data", prepared, "--name", "mercy")
    assert server.end() == 0 and hospital.end() == 0, server.output + hospital.output
    first = history(scene.out)[0]
    assert first["site"] == "mercy" and first["examples"] == "16"
    split = json.loads((scene.folder / "models" / "mercy_split.json").read_text())
    assert len(split["train"]) == 2 and all(
        name.startswith("p") and "QX" not in name for name in split["train"]
    )
    assert (scene.out / BEST).exists()
