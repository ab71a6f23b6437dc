"""A consortium's days in small, with real processes: hospitals with keys and data of their own, one that is
admitted late, programs that die, the end, and what is there afterwards."""

import os
import shutil
import signal

import pytest
from consortium import Consortium
from federations import BEST, SMALL, child_of, history
from test_trouble import own_folder

from checkpoint import load_checkpoint
from federation.runtime.processes import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None,
        reason="no nginx for the gateway's tests: install it",
    ),
]


def test_a_run_that_is_watched_by_nobody(scene, phantoms):
    consortium = Consortium(scene.folder)
    data = {
        "mercy": own_folder(phantoms, scene.folder / "a", slice(0, 4)),
        "hope": own_folder(phantoms, scene.folder / "b", slice(4, 7)),
        "grace": own_folder(phantoms, scene.folder / "c", slice(7, 10)),
    }
    kits = {label: consortium.hospital(label, admitted=label != "grace") for label in data}

    def join(label, *options):
        return scene.hospital(label, "--own-data", data[label], "--kit", kits[label], *options)

    service = ("--kit", consortium.kit, "--clients", 3, "--rounds", 3, "--min-clients", 1, *SMALL)
    server = scene.server("--start-or-resume", *service)
    server.wait_for("2 keys admitted and 3 hospitals are waited for")
    server.kill()  # before any round: the next start begins it, with as many hospitals as there are keys
    server = scene.server("--start-or-resume", *service[:2], "--clients", 2, *service[4:])
    server.wait_for("listening on")
    hospitals = [join("mercy")]
    consortium.provision("admit", kits["grace"] / "hospital.pub", "--kit", consortium.kit)
    looks = join("grace", "--check")
    assert looks.end() == 0 and "a round will take about" in looks.output, looks.output
    assert "fit, this hospital can join; nothing was trained" in looks.output
    hospitals += [join("grace", "--observer"), join("hope")]
    server.wait_for("round 1 of 3: ")
    again = join("mercy")
    assert again.end() == 2 and "mercy runs already" in again.output
    os.kill(child_of(server, "serverapp"), signal.SIGKILL)
    server.wait_for("starting again after the last complete round")
    assert server.end() == 0, server.output
    assert [hospital.end() for hospital in hospitals] == [0, 0, 0], hospitals[0].output
    rows = history(scene.out)
    assert {row["round"] for row in rows} == {str(n) for n in range(1, 5)}
    assert all(row["examples"] == "" for row in rows if row["site"] == "grace")
    best = load_checkpoint(scene.out / BEST)
    for label in data:
        mine = load_checkpoint(scene.folder / "models" / f"{label}_federated_best.pth")
        assert mine.metadata == best.metadata
        assert all(v.equal(best.model.state_dict()[n]) for n, v in mine.model.named_parameters())
    over = scene.server("--start-or-resume", *service[:2], "--clients", 2, *service[4:])
    assert over.end() == 0 and "nothing is left to do" in over.output
    lost = scene.server("--rounds", 1)
    assert lost.end() == 2 and "--overwrite" in lost.output
    scene.address = f"127.0.0.1:{free_port()}"
    longer = scene.server("--resume", "--rounds", 4)
    longer.wait_for("going on after round 3 of 4")
    longer.wait_for("admitted: grace, hope, mercy")  # the kit is remembered
