"""A hostile hospital as a real process: it runs a MedFL of its own that sends something else."""

import json

import pytest
from federations import SMALL, Scene
from running import change, copy_of_medfl

pytestmark = pytest.mark.slow


def hostile_copy(folder):
    """MedFL as a hospital would change it: its updates are spoilt, and that its code is not the server's does
    not trouble it."""
    copy = copy_of_medfl(folder)
    app = copy / "federation" / "hospital" / "app.py"
    change(app, "to_record(update, mine", "to_record(update * float('nan'), mine")
    change(app, "if code == here.code:", "if True:")
    return copy


def test_its_update_is_left_out_and_the_rounds_go_on(phantoms, tmp_path):
    scene = Scene(tmp_path)
    server = scene.server("--clients", 2, "--min-clients", 1, "--rounds", 2, *SMALL)
    honest = scene.hospital("honest", "--cid", 0, "--data-dir", phantoms)
    hostile = scene.hospital(
        "hostile", "--cid", 1, "--data-dir", phantoms, root=hostile_copy(tmp_path / "copy")
    )
    assert (server.end(), honest.end(), hostile.end()) == (0, 0, 0), server.output
    assert (
        server.output.count("without hospital-1: its update holds values that are not finite; it is left out")
        == 2
    )
    events = [
        json.loads(line) for line in (scene.out / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [event["hospitals"] for event in events if event["event"] == "round"] == [["hospital-0"]] * 2
    assert [event["hospital"] for event in events if event["event"] == "left_out"] == ["hospital-1"] * 2
    assert scene.close() == []
