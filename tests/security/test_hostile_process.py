"""A hostile hospital as a real process: its own copy of MedFL changes the code that came before it runs."""

import json
import shutil

import pytest

from federations import SMALL, Scene
from running import ROOT

pytestmark = pytest.mark.slow
HONEST, SPOILT = "}, to_record(weights)\n", "}, to_record(weights * float('nan'))\n"


def hostile_copy(folder):
    """MedFL as a hospital would change it: once Flower has unpacked the server's code, its last line sends something else."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("federation/*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    program = folder / "federation" / "flower.py"
    before = "            return install(*arguments, **options)\n"
    text = program.read_text(encoding="utf-8")
    assert before in text and HONEST in (ROOT / "federation" / "hospital.py").read_text(encoding="utf-8")
    program.write_text(text.replace(before, f"""            done = install(*arguments, **options)
        for path in Path(os.environ["FLWR_HOME"]).rglob("federation/hospital.py"):
            path.write_text(path.read_text().replace({HONEST!r}, {SPOILT!r}))
        return done
"""), encoding="utf-8")
    return folder


def test_its_update_is_left_out_and_the_rounds_go_on(phantoms, tmp_path):
    scene = Scene(tmp_path)
    server = scene.server("--clients", 2, "--min-clients", 1, "--rounds", 2, *SMALL)
    honest = scene.hospital("honest", "--cid", 0, "--data-dir", phantoms)
    hostile = scene.hospital("hostile", "--cid", 1, "--data-dir", phantoms, root=hostile_copy(tmp_path / "copy"))
    assert (server.end(), honest.end(), hostile.end()) == (0, 0, 0), server.output
    assert server.output.count("without hospital-1: its update holds values that are not finite; it is left out") == 2
    events = [json.loads(line) for line in (scene.out / "audit.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["hospitals"] for event in events if event["event"] == "round"] == [["hospital-0"]] * 2
    assert [event["hospital"] for event in events if event["event"] == "left_out"] == ["hospital-1"] * 2
    assert scene.close() == []
