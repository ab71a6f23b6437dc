"""A consortium's week with real processes (week.py), and what is there afterwards.

Hospitals come and go here; with MEDFL_TEST_WEEK=20 all of a week happens, with twenty killed programs.
"""

import json
import os
import shutil

import pytest
from federations import BEST, history
from week import LAPSE, MANY, SITE, Week

from checkpoint import load_checkpoint
from federation.runtime.processes import free_port
from federation.server.audit import verify

KILLS = os.environ.get("MEDFL_TEST_WEEK")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None,
        reason="no nginx for the gateway's tests: install it",
    ),
    pytest.mark.skipif(os.name != "posix", reason="signals and limits are of POSIX systems"),
]


@pytest.fixture
def short_heartbeats(tmp_path, monkeypatch):
    """Flower's limit of a minute is shorter, in all processes that are started."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE.format(lapse=LAPSE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)


def test_a_week(short_heartbeats, scene, phantoms):
    week = Week(scene, phantoms, int(KILLS or 0))
    week.begin()
    week.add("grace")
    week.put_out("hope", "charity")
    if KILLS:
        week.kill()
        week.sleep()
        week.set_clock()
        week.fill_disks()
        week.let_certificate_end()
        week.upgrade()
    week.end()

    rows, lines = history(scene.out), (scene.out / "audit.jsonl").read_bytes().splitlines()
    rounds = sorted({int(row["round"]) for row in rows if row["examples"]})
    assert rounds == list(range(1, week.rounds + 1)) and week.rounds < MANY
    assert verify(scene.out / "audit.jsonl")[0] == len(lines)
    kept = [json.loads(line) for line in lines]
    assert [line["round"] for line in kept if line["event"] == "round"] == rounds
    best = load_checkpoint(scene.out / BEST)
    for label in ("mercy", "grace", "charity"):
        mine = load_checkpoint(scene.folder / "models" / f"{label}_federated_best.pth")
        assert mine.metadata == best.metadata
        assert all(v.equal(best.model.state_dict()[n]) for n, v in mine.model.named_parameters())
    assert not [path for path in scene.folder.rglob(".*") if path.name.startswith((".new-", ".updates-"))]
    lost = scene.server("--rounds", 1)
    assert lost.end() == 2 and "--overwrite" in lost.output
    scene.address = f"127.0.0.1:{free_port()}"
    longer = scene.server("--resume", "--rounds", week.rounds + 1, root=week.root)
    longer.wait_for(f"continuing after round {week.rounds} of {week.rounds + 1}")
    longer.wait_for("admitted: charity, grace, mercy")  # the kit is remembered, and who was put out
