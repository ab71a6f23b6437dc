"""common.py and storage/files.py: whole files or none, options made from settings, exit codes of real processes."""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import common
from common import MedFLError, add_settings, setting, settings_from
from storage.files import atomic_write, text_of, write_json


@dataclass(frozen=True)
class Settings:
    batch_size: int = setting(16, "slices a step")
    rate: float = setting(0.001, "step size, 10 % of it at the end")
    norm: str = setting("batch", "normalisation layer", choices=("batch", "group"))
    minutes: float | None = setting(None, "time to train, in minutes", kind=float)
    resume: bool = setting(False, "go on with the last run")


def parser_of(names=None):
    parser = argparse.ArgumentParser()
    add_settings(parser, Settings, names)
    return parser


def test_atomic_write_replaces_the_file_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_write(path, "w") as file:
        file.write("line\nümlaut\n")
        assert not path.exists()
    assert path.read_bytes() == "line\nümlaut\n".encode()
    with atomic_write(path) as file:
        file.write(b"second")
        assert path.read_bytes() != b"second"
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_atomic_write_keeps_the_old_file_when_the_block_raises(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old and whole")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        raise error
    assert path.read_bytes() == b"old and whole"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_atomic_write_leaves_nothing_where_there_was_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file.bin") as file:
        file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(MedFLError, match="can't be written"), atomic_write(tmp_path / "file" / "below.bin"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(MedFLError, match="can't be written"), atomic_write(tmp_path / "folder") as file:
        file.write(b"a folder is in the way")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "ours", {})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"dice": 0.5, "none": None})
    with pytest.raises(ValueError):
        write_json(path, {"dice": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"dice": 0.5, "none": None}


def test_no_options_give_the_dataclass_defaults():
    assert settings_from(parser_of().parse_args([]), Settings) == Settings()


def test_options_arrive_with_their_types():
    given = ["--batch-size", "4", "--rate", "0.5", "--norm", "group", "--minutes", "2", "--resume"]
    settings = settings_from(parser_of().parse_args(given), Settings)
    assert settings == Settings(batch_size=4, rate=0.5, norm="group", minutes=2.0, resume=True)
    assert isinstance(settings.minutes, float)


@pytest.mark.parametrize("given", [["--norm", "layer"], ["--batch-size", "1.5"], ["--minutes", "long"]])
def test_an_option_of_the_wrong_kind_is_refused(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser_of().parse_args(given)
    assert stopped.value.code == 2 and given[0] in capsys.readouterr().err


def test_help_says_every_option_its_unit_and_default():
    text = " ".join(parser_of().format_help().split())
    for part in (
        "--batch-size SIZE slices a step (default 16)",
        "10 % of it at the end (default 0.001)",
        "{batch,group} normalisation layer (default batch)",
        "in minutes (default none)",
        "--resume",
    ):
        assert part in text


def test_only_the_named_settings_become_options():
    parser = parser_of(["rate"])
    assert settings_from(parser.parse_args(["--rate", "2"]), Settings) == Settings(rate=2.0)
    with pytest.raises(SystemExit):
        parser.parse_args(["--batch-size", "4"])


def script(tmp_path, body):
    """A script whose `main` has this body, started as a process of its own."""
    file = tmp_path / "script.py"
    file.write_text(
        f"import time\nfrom common import MedFLError, run_script\n\ndef main():\n    "
        f"{body}\n\nrun_script(main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(common.__file__).parent)}
    return subprocess.Popen(
        [sys.executable, str(file)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_script_that_ends_well_ends_with_0(tmp_path):
    process = script(tmp_path, "print('done')")
    assert process.communicate(timeout=60) == ("done\n", "") and process.returncode == 0


def test_a_users_mistake_is_one_sentence_and_2(tmp_path):
    process = script(tmp_path, "raise MedFLError('the folder is empty; fill it')")
    _, errors = process.communicate(timeout=60)
    assert (
        errors == "script.py: the folder is empty; fill it\n"
        and process.returncode == common.EXIT_BAD_INPUT == 2
    )


def test_a_bug_is_a_traceback_and_1(tmp_path):
    process = script(tmp_path, "[][0]")
    _, errors = process.communicate(timeout=60)
    assert "Traceback" in errors and "IndexError" in errors and process.returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_script_ends_with_130_and_runs_its_finally(tmp_path, number):
    process = script(
        tmp_path,
        """try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("saved")""",
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == common.EXIT_INTERRUPTED == 130
    assert output == "saved\n" and "script.py: stopped" in errors and "Traceback" not in errors


def test_the_time_is_utc_and_iso_8601():
    moment = common.datetime.fromisoformat(common.utc_now())
    assert moment.utcoffset().total_seconds() == 0
    assert abs((common.datetime.now(common.UTC) - moment).total_seconds()) < 60


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_windows_writes_as_text_is_read(tmp_path, encoding):
    text, windows = "mercy ü\n", tmp_path / "members.pub"
    windows.write_bytes(text.encode(encoding))
    assert text_of(windows) == text
    windows.write_bytes(b"\xfc")
    with pytest.raises(UnicodeDecodeError):
        text_of(windows)


def test_the_home_folder_is_meant_where_the_shell_left_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    words = ["--out=~/models", "~/scans", "~", "--name", "~bert", "a~/b", "--mask-suffix=~"]
    assert [common._with_home(word) for word in words] == [
        "--out=/home/anna/models", "/home/anna/scans", "/home/anna", "--name", "~bert", "a~/b",
        "--mask-suffix=/home/anna",
    ]  # fmt: skip


def test_a_repository_around_an_unpacked_copy_is_not_its_commit(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    (tmp_path / "medfl").mkdir()
    monkeypatch.setattr(common, "ROOT", tmp_path / "medfl")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "medfl" / "common.py"))
    assert common.git_commit() is None
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert len(common.git_commit()) == 40
