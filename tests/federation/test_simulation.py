"""Hospitals in Flower's simulation engine: bounded workers, an end by Ctrl-C, nothing left behind. Its
weights: test_runs.py."""

import importlib.util
import re
import signal

import pytest
from federations import SMALL, Scene, Script, history
from running import run_here

from common import MedFLError
from federation.runtime import simulation

SERVER = ("run_server.py", "--simulate", 3, *SMALL)


@pytest.mark.slow
def test_one_core_serves_all_hospitals_and_a_stopped_run_goes_on(scene: Scene, phantoms):
    """To its end a simulation comes in test_runs.py."""
    options = (*SERVER, "--data-dir", phantoms, "--out", scene.out, "--cores", 1)
    server = Script(scene.folder, "server", *options, "--rounds", 30)
    scene.scripts.append(server)
    server.wait_for(r"round 1 of 30: [\d.]+ s")
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 130, server.output
    assert len(set(re.findall(r"ClientAppActor pid=(\d+)", server.output))) == 1
    done = int(history(scene.out)[-1]["round"])
    assert len([row for row in history(scene.out) if row["round"] == str(done)]) == 3
    again = Script(scene.folder, "again", *options, "--resume")
    scene.scripts.append(again)
    again.wait_for(r"continuing after round \d+ of 30")
    again.wait_for(rf"round {done + 1} of 30: [\d.]+ s")
    again.process.send_signal(signal.SIGTERM)
    assert again.end() == 130, again.output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--simulate", 0), "--simulate and --cores are 1 or more"),
        (("--simulate", 2, "--kit", "kit"), "leave --kit out"),
        (("--simulate", 2, "--data-dir", "nothing"), "nothing"),
        (("--simulate", 2, "--strategy", "krum"), "needs 5 hospitals"),
        (("--simulate", 90), "too few"),
    ],
    ids=str,
)
def test_bad_options(home, phantoms, tmp_path, options, sentence):
    done = run_here("run_server.py", "--data-dir", phantoms, "--out", tmp_path, *options)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MedFLError, match="requirements-simulation.txt"):
        simulation.check_ray()
