"""What --resume trusts: a changed checkpoint, a log that was cut or taken away, a second server in the folder, and a
kit that others can change are refused."""

import os
import shutil

import pytest
import torch
from scripted import Worker, federate, make_fast

from checkpoint import update_metadata
from common import MedFLError
from federation.runtime import certificates, hospital_kit
from federation.server.state import BEST, LAST, check_best, finish_keeping, load_run, nothing_left
from run_server import parse, take_up
from storage.files import claim


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The folder of a run of two rounds."""
    make_fast(monkeypatch)
    workers = [Worker(f"hospital-{k}", [0.5] * 9) for k in range(2)]
    assert federate(workers, 2, tmp_path)[0] == 0
    load_run(tmp_path)
    return tmp_path


def poisoned(out) -> None:
    content = torch.load(out / LAST, weights_only=True)
    content["state"]["weights"] = content["state"]["weights"] * 0 + 3.0
    torch.save(content, out / LAST)


def cut(out) -> None:
    lines = (out / "audit.jsonl").read_bytes().splitlines(keepends=True)
    (out / "audit.jsonl").write_bytes(b"".join(lines[:2]))


def deleted(out) -> None:
    (out / "audit.jsonl").unlink()


@pytest.mark.parametrize("harm", [poisoned, cut, deleted], ids=lambda harm: harm.__name__)
def test_a_changed_checkpoint_or_log_is_not_gone_on_with(ran, harm):
    harm(ran)
    with pytest.raises(MedFLError, match="it was changed|cut off, rewritten or removed"):
        load_run(ran)


def test_a_best_model_that_was_changed_is_not_gone_on_with(ran):
    """It would be tested, and sent to the hospitals as the federation's."""
    check_best(ran)
    update_metadata(ran / BEST, threshold=0.01)
    with pytest.raises(MedFLError, match="it was changed"):
        check_best(ran)


def test_a_server_that_is_killed_between_log_and_best_model_goes_on(ran):
    """The log has the new file's hash, and the file waits beside the old one."""
    shutil.copy(ran / BEST, ran / f".new-{BEST}")
    (ran / BEST).write_bytes(b"of the round before")
    check_best(ran)
    assert not (ran / f".new-{BEST}").exists()


def test_an_end_that_somebody_wrote_into_the_log_ends_nothing(ran, monkeypatch):
    lines = (ran / "audit.jsonl").read_bytes()
    (ran / "audit.jsonl").write_bytes(lines + b'{"n": 99, "event": "end", "exit": 0, "before": ""}\n')
    monkeypatch.setattr("sys.argv", ["run_server.py", "--resume", "--out", str(ran)])
    with pytest.raises(MedFLError, match="does not follow from the one before it"):
        take_up(parse())


def test_a_line_that_was_written_half_does_not_stop_a_start(ran):
    """Whether anything is left to do is looked at before the log is mended."""
    with open(ran / "audit.jsonl", "ab") as log:
        log.write(b'{"n": 99, "ti')
    assert not nothing_left(ran, None)


def test_a_server_that_is_killed_between_log_and_file_goes_on(ran, monkeypatch):
    """The log has the new file's hash, and the file waits beside the old one."""
    new, old = ran / f".new-{LAST}", ran / "old.pth"
    shutil.copy(ran / LAST, new)
    old.write_bytes(b"of the round before")
    shutil.copy(old, ran / LAST)
    load_run(ran)
    assert not new.exists()
    new.write_bytes(b"half")
    finish_keeping(ran / LAST, ran / "audit.jsonl")
    assert not new.exists() and load_run(ran)


def test_one_server_at_a_time_writes_into_a_folder(tmp_path):
    first = claim(tmp_path / "out", "server")
    with pytest.raises(MedFLError, match="another server writes into"):
        claim(tmp_path / "out", "server")
    first.release()
    claim(tmp_path / "out", "server").release()


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX systems")
@pytest.mark.parametrize(
    ("name", "mode", "sentence"),
    [
        ("ca.key", 0o640, "others can read"),
        ("server.key", 0o604, "others can read"),
        ("hospitals.json", 0o666, "others can change"),
        ("ca.pem", 0o646, "others can change"),
        ("", 0o777, "others can change"),
    ],
)
def test_a_kit_that_others_can_read_or_change_is_refused(consortium, name, mode, sentence):
    mercy = consortium.hospital("mercy")
    assert certificates.server_certificate(consortium.kit) and hospital_kit.hospital_label(mercy) == "mercy"
    (consortium.kit / name).chmod(mode)
    with pytest.raises(MedFLError, match=sentence):
        certificates.server_certificate(consortium.kit)
    if name in ("ca.pem", ""):
        (mercy / name).chmod(mode)
        with pytest.raises(MedFLError, match=sentence):
            hospital_kit.hospital_label(mercy)


def test_electricity_is_of_a_training(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["run_server.py", "--evaluate", "m.pth", "--energy", "--out", str(tmp_path)]
    )
    with pytest.raises(MedFLError, match="--energy measures a training; leave it out with --evaluate"):
        take_up(parse())


def test_a_pretrained_encoder_does_not_stand_in_the_way_of_a_training(monkeypatch, tmp_path):
    """pretrain.py writes it into the folder that the server takes by default."""
    (tmp_path / "encoder.safetensors").write_bytes(b"an encoder")
    command = ["run_server.py", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    take_up(parse())
    monkeypatch.setattr("sys.argv", [*command, "--pretraining"])
    with pytest.raises(MedFLError, match="encoder.safetensors is of an earlier run"):
        take_up(parse())
