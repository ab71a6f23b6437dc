"""A hospital's consent: the server's code never runs there, and settings that were not approved train
nothing."""

import json
import re

import pytest
from federations import SMALL, Scene
from flwr.app import Context, Message, RecordDict
from running import change, copy_of_medfl, run_here
from scripted import make_messages_outside_of_a_run

from common import MedFLError, __version__
from federation.hospital.app import make_app
from federation.hospital.identity import Identity
from federation.hospital.sums import JOINED
from federation.protocol.agreement import approval, to_json, unusual
from federation.protocol.messages import message, read
from federation.protocol.settings import FederationSettings
from federation.protocol.weights import pack, to_record
from run_client import approved
from training import TrainingSettings
from transunet import TransUNet

SETTINGS = to_json(TrainingSettings(image_size=32, batch_size=8), FederationSettings(rounds=3))
CODE = "c" * 64


@pytest.mark.slow
def test_the_code_of_a_server_that_was_changed_does_not_run(scene: Scene, phantoms):
    evil = copy_of_medfl(scene.folder / "evil")
    mark = scene.folder / "the server's code was here"
    change(
        evil / "federation" / "hospital" / "app.py",
        "import traceback\n",
        f"import traceback\nopen({str(mark)!r}, 'a').write('x')\n",
    )
    server = scene.server("--clients", 2, *SMALL, root=evil)
    server.wait_for("waiting for 2 hospitals")
    mark.unlink(missing_ok=True)
    hospital = scene.hospital("hospital-0", "--cid", 0, "--data-dir", phantoms, "--wait", 5)
    assert hospital.end() == 2, hospital.output
    assert "nothing of it was run; install the server's version" in hospital.output
    server.wait_for(
        "hospital-0 can't take part: it runs its own MedFL alone, and the server's code is another"
    )
    assert not mark.exists() and "joined" not in server.output


@pytest.mark.slow
def test_a_hospital_trains_what_it_approved_and_nothing_else(scene: Scene, phantoms):
    options = ("--cid", 0, "--data-dir", phantoms)
    server = scene.server("--clients", 1, "--rounds", 1, "--lr", 0.0005, *SMALL)
    server.wait_for("listening")
    wanted = re.search(r"that use --approve: ([0-9a-f]{64})", server.output)[1]
    looking = scene.hospital("looking", *options, "--approve")
    assert looking.end() == 2, looking.output
    assert f"start again with --approve {wanted}" in looking.output and "--lr 0.0005" in looking.output
    server.wait_for("hospital-0 can't take part: it has not approved these settings")
    (scene.folder / "approved.txt").write_text(f"{'a' * 64}  # another\n\n{wanted}\n")
    agreeing = scene.hospital("agreeing", *options, "--approve", "approved.txt")
    assert (server.end(), agreeing.end()) == (0, 0), agreeing.output
    assert "round 1 of 1" in agreeing.output

    other = scene.server("--overwrite", "--clients", 1, "--rounds", 1, "--lr", 0.0006, *SMALL)
    refusing = scene.hospital("refusing", *options, "--approve", wanted)
    assert refusing.end() == 2 and f"start again with --approve {wanted}" not in refusing.output, (
        refusing.output
    )
    other.wait_for("it has not approved these settings")


@pytest.fixture
def ask(monkeypatch, tmp_path, phantoms, home):
    """What a hospital that approved SETTINGS says to a round with other settings."""
    make_messages_outside_of_a_run(monkeypatch)

    def answer(settings: str, approved: list[str]) -> dict:
        Identity(
            label="hospital-0",
            cid=0,
            data=phantoms,
            device="cpu",
            medfl=__version__,
            models=tmp_path,
            code=CODE,
            approved=approved,
        ).save(tmp_path)
        about = {
            "settings": settings,
            "without": [],
            "run": "r",
            "round": 1,
            "rate": 1.0,
            "seconds": 60.0,
            "partition": None,
        }
        weights = to_record(pack(TransUNet("tiny", 32).state_dict()))
        incoming = Message(message(about, weights), 1, "train")
        return read(make_app(lambda context: tmp_path)(incoming, Context(1, 1, {}, RecordDict(), {})).content)

    return answer


def test_settings_that_change_after_joining_are_refused_in_the_round(ask, capsys):
    told = ask(SETTINGS.replace('"rounds": 3', '"rounds": 4'), [approval(CODE, SETTINGS)])
    assert told["failure"] == "consent" and "--rounds 4" in capsys.readouterr().out
    assert (
        ask(SETTINGS, [approval(CODE, SETTINGS)])["failure"] == "data"
    )  # goes on, up to the partition it was not told


def test_who_joined_a_secure_aggregation_trains_nothing_without_it(ask, capsys, tmp_path):
    """Whatever it approved: the server would read the update."""
    (tmp_path / JOINED).write_text('{"run": "r"}')
    assert ask(SETTINGS, [approval(CODE, SETTINGS)])["failure"] == "consent"
    assert "an update without masks" in capsys.readouterr().out


def test_the_hash_is_of_code_and_settings():
    hashes = {
        approval(code, settings)
        for code in (CODE, "d" * 64)
        for settings in (SETTINGS, SETTINGS.replace("3", "4"))
    }
    assert len(hashes) == 4 and all(re.fullmatch("[0-9a-f]{64}", entry) for entry in hashes)
    assert unusual(SETTINGS) == "--image-size 32, --batch-size 8, --rounds 3"
    assert unusual(to_json(TrainingSettings(), FederationSettings())) == "all as by default"


def test_the_option_takes_hashes_and_files(tmp_path):
    (tmp_path / "list").write_text(f"{CODE} # this one\n# none\n{'d' * 64}\n")
    assert approved([str(tmp_path / "list"), "e" * 64]) == [CODE, "d" * 64, "e" * 64] and approved([]) == []
    for wrong in ("c" * 63, "C" * 64, "nothing.txt"):
        with pytest.raises(MedFLError, match=f"--approve got {wrong}"):
            approved([wrong])


def test_a_mistyped_hash_is_told_at_the_start(phantoms, home):
    done = run_here("run_client.py", "--cid", 0, "--data-dir", phantoms, "--approve", "abc")
    assert done.returncode == 2 and "neither a hash of 64 digits" in done.stderr


def test_settings_as_they_travel_hold_no_path_of_the_server():
    settings = json.loads(
        to_json(TrainingSettings(encoder="/somewhere/vit.safetensors"), FederationSettings())
    )
    assert settings["training"]["encoder"] == "vit.safetensors"
