"""What a user's machine does to a run: terminals, pipes, disks, memory, folders. A sentence, or nothing."""

import errno
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.supercore.utils import get_flwr_home
from running import run_here
from test_cohort import patient
from torch._inductor.runtime import cache_dir_utils

import common
from checkpoint import save_checkpoint
from common import MedFLError, in_words
from dataset import load_dataset
from federation.runtime.flower import name_home_where_missing
from federation.runtime.processes import no_proxy
from federation.runtime.proxies import leave_out_odd
from predict import TABLE, output_names, refuse_to_mix
from scans.cache import cache_folder
from storage.files import atomic_write, claim, run_folder, write_csv
from torchvision_operators import name_cache_where_missing
from training import TrainingSettings

ROOT = Path(common.__file__).parent


def python(code: str, encoding: str = "utf-8", **kept) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, timeout=120, **kept
    )


SAYS = "from common import run_script; run_script(lambda: print('loss – ü ≤ 1', flush=True))"


@pytest.mark.parametrize("encoding", ["latin-1", "cp949", "cp932", "gbk", "ascii", "utf-8"])
def test_no_terminal_ends_a_run(encoding):
    done = python(SAYS, encoding)
    assert done.returncode == 0 and done.stdout.startswith(b"loss ") and b"1" in done.stdout, done.stderr


def test_flowers_programs_say_what_they_say_on_every_terminal():
    code = "import sys; from federation.runtime import programs; programs.tie_to_parent = lambda *_: None\n"
    code += "programs.run_superlink = lambda *_: print('round – 1'); sys.argv = ['', '1', 'superlink']; programs.main()"
    done = python(code, "latin-1")
    assert done.returncode == 0 and done.stdout == b"round \\u2013 1\n", done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no /dev/full there")
@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_a_run_goes_on_when_nobody_can_hear_it(tmp_path, kind):
    code = (
        "from common import run_script\n"
        "def main():\n"
        "    for k in range(3): print('x' * 100_000, flush=True)\n"
        f"    open({str(tmp_path / 'end')!r}, 'w').close()\n"
        "run_script(main)"
    )
    if kind == "closed pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=environment, timeout=120
    )
    os.close(write)
    assert done.returncode == 0 and done.stderr == b"" and (tmp_path / "end").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP there")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_stops_a_run_unless_it_was_told_not_to(ignored):
    code = (
        "import os, signal; from common import run_script\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "run_script(lambda: (os.kill(os.getpid(), signal.SIGHUP), print('on')))"
    )
    done = python(code)
    assert (done.returncode, done.stdout) == ((0, b"on\n") if ignored else (130, b""))


def test_no_memory_and_a_full_disk_are_sentences():
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "not enough memory" in in_words(torchs.value) and "not enough memory" in in_words(MemoryError())
    assert "the disk is full (x)" in in_words(OSError(errno.ENOSPC, "No space left on device", "x"))
    away = OSError(errno.ESTALE, "Stale file handle", "/share/anna_1.png")
    assert "/share/anna_1.png can't be read or written (Stale file handle)" in in_words(away)
    assert in_words(RuntimeError("a bug")) is None and in_words(OSError(errno.EIO, "odd")) is None


@pytest.mark.skipif(os.name == "nt", reason="no limit of a file's size there")
def test_a_checkpoint_for_which_there_is_no_room_leaves_the_old_one_whole(tmp_path):
    path = tmp_path / "m.pth"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(MedFLError, match="m.pth can't be written"):
            save_checkpoint(path, {f"w{k}": torch.randn(30_000) for k in range(4)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="processes are not asked for there")
def test_what_a_killed_run_left_is_removed_at_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    code = (
        f"import os, signal, tempfile; tempfile.tempdir = {str(tmp_path / 'tmp')!r}\n"
        "from storage.files import atomic_write, run_folder; from pathlib import Path\n"
        "run_folder('server')\n"
        f"with atomic_write(Path({str(tmp_path / 'm.pth')!r})) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert python(code).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "tmp").iterdir())) == 1 and len(list(tmp_path.glob(".m.pth.*"))) == 1
    ours = run_folder("server")
    assert list((tmp_path / "tmp").iterdir()) == [ours] and run_folder("server") != ours and ours.exists()
    with atomic_write(tmp_path / "m.pth") as file:
        file.write(b"whole")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["m.pth"]


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """Three patients, and a home of the test's own."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.delenv("MEDFL_CACHE", raising=False)
    monkeypatch.setenv("MEDFL_CACHE", "")  # so that what a script sets is taken back
    for k in range(3):
        patient(tmp_path / "scans" / f"pat{k}", k)
    return tmp_path / "scans"


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: (cache / "images.bin").unlink(),
        lambda cache: os.truncate(cache / "images.bin", 50),
        lambda cache: os.truncate(cache / "masks.bin", 0),
        lambda cache: os.truncate(cache / "index.json", 0),
        lambda cache: (cache / "index.json").write_text('{"patients": [{}]}'),
        lambda cache: (cache / "index.json").write_text("[1]"),
        lambda cache: (shutil.rmtree(cache), cache.mkdir(), (cache / "index.json").write_text("{}")),
    ],
)
def test_a_damaged_cache_is_built_again(scans, damage):
    before = load_dataset(scans, progress=False).volume("pat1")[0].copy()
    (cache,) = (path for path in cache_folder().iterdir() if path.is_dir())
    damage(cache)
    for _ in range(2):
        assert np.array_equal(load_dataset(scans, progress=False).volume("pat1")[0], before)
    assert [path for path in cache_folder().iterdir() if path.is_dir()] == [cache]


def test_a_cache_that_cannot_be_had_is_told_and_can_lie_elsewhere(scans, tmp_path, monkeypatch):
    check = ("run_client.py", "--own-data", scans, "--name", "mercy", "--check", "--server", "127.0.0.1:9")
    (tmp_path / "home").write_text("a file where a folder would be")
    done = run_here(*check)
    assert done.returncode == 2 and "can't be made" in done.stderr and "--cache" in done.stderr
    done = run_here(*check, "--cache", tmp_path / "cache")
    assert "no server answers" in done.stderr and any((tmp_path / "cache").iterdir())
    monkeypatch.setenv("MEDFL_CACHE", "")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    done = run_here(*check)
    assert done.returncode == 2 and "there is no home folder" in done.stderr
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MedFLError, match="is not yours to write; name a folder of your own with --cache"):
        monkeypatch.setenv("MEDFL_CACHE", str(tmp_path / "cache"))
        cache_folder()


def test_proxies_of_a_desktop_are_dropped_or_kept(monkeypatch, capsys):
    for name in ("all_proxy", "http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("all_proxy", "socks://127.0.0.1:1080/")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "fl.example.org,localhost")
    monkeypatch.setenv("NO_PROXY", ".intern")
    leave_out_odd()
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "all_proxy" in told and "socks" in told and "all_proxy" not in os.environ
    assert os.environ["https_proxy"] == "http://proxy:3128"
    assert (
        no_proxy()["no_proxy"] == no_proxy()["NO_PROXY"] == ".intern,fl.example.org,localhost,127.0.0.1,::1"
    )


def test_one_slice_of_16_pixels_and_a_finished_run_are_told(scans, tmp_path):
    with pytest.raises(MedFLError, match="--batch-size 2, --image-size 32 or --norm group"):
        TrainingSettings(image_size=16, batch_size=1)
    assert TrainingSettings(image_size=16, batch_size=1, norm="group").batch_size == 1
    run = ("train_centralized.py", "--data-dir", scans, "--out", tmp_path / "o", "--image-size", 16)
    done = run_here(*run, "--batch-size", 2, "--epochs", 1, "--val-fraction", 0, "--test-fraction", 0)
    assert done.returncode == 0, done.stderr
    assert (
        "steps/s, " in done.stdout
        and " of training steps, " in done.stdout
        and "GiB of memory" in done.stdout
    )
    assert "next: python evaluate.py" not in done.stdout  # nobody is kept for the test
    assert (
        " epoch   1 " in (log := (tmp_path / "o" / "centralized.log").read_text())
        and "left of the run" in log
    )
    again = run_here(*run, "--resume")
    assert again.returncode == 0 and "this run is finished (1 epoch); nothing was trained" in again.stdout
    assert "going on" not in again.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("data/make_phantoms.py", "--patients", 2, "--out", "FILE/phantoms"),
        ("predict.py", "PATIENT", "--checkpoint", "FILE/m.pth"),
        ("train_centralized.py", "--data-dir", "SCANS", "--out", "FILE/o", "--image-size", 16),
        ("run_client.py", "--own-data", "SCANS", "--name", "m", "--approve", "BYTES"),
        ("data/prepare_task.py", "--task", "wounds", "--source", "FILE", "--out", "OUT"),
        ("pretrain.py", "--data-dir", "FILE"),
    ],
)
def test_a_path_that_can_not_be_is_a_sentence(scans, tmp_path, command):
    (tmp_path / "file").write_text("a file where a folder would be")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\0")
    places = {"FILE": tmp_path / "file", "SCANS": scans, "PATIENT": scans / "pat0", "OUT": tmp_path / "out"}
    places["BYTES"] = tmp_path / "bytes"
    for name, place in places.items():
        command = [str(part).replace(name, str(place)) for part in command]
    done = run_here(*command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "; " in done.stderr, done.stderr


def test_a_notebooks_or_desktops_backend_of_matplotlib_ends_no_run(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.missing")
    done = python("from evaluation.curves import new_figure; new_figure((1, 1))")
    assert done.returncode == 0, done.stderr


def test_two_trainings_write_not_into_one_folder(scans, tmp_path):
    run = (
        "train_centralized.py",
        "--data-dir",
        scans,
        "--out",
        tmp_path / "o",
        "--image-size",
        16,
        "--steps",
        1,
    )
    claimed = claim(tmp_path / "o", "training")
    done = run_here(*run, "--overwrite")
    assert done.returncode == 2 and "another training writes into" in done.stderr
    claimed.release()


def test_where_a_share_has_no_locks_nobody_is_held_off(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    claim(tmp_path, "server").release()


@pytest.mark.skipif(os.name == "nt", reason="no closing of descriptors by a shell there")
def test_a_service_without_any_output_goes_on(tmp_path):
    code = (
        "from common import run_script\nfrom tqdm import tqdm\n"
        "def main():\n"
        "    for k in tqdm(range(3), disable=None): print(k, flush=True)\n"
        f"    open({str(tmp_path / 'end')!r}, 'w').close()\n"
        "run_script(main)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"exec '{sys.executable}' -c \"$CODE\" <&- >&- 2>&-"
    done = subprocess.run(command, shell=True, env={**environment, "CODE": code}, timeout=120)
    assert done.returncode == 0 and (tmp_path / "end").exists()


@pytest.mark.parametrize("quota, cores", [("max 100000", None), ("50000 100000", 1), ("nonsense", None)])
def test_a_containers_quota_counts(quota, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(common, "QUOTA", tmp_path / "none")
    before = common.usable_cores()
    monkeypatch.setattr(common, "QUOTA", tmp_path / "cpu.max")
    assert common.usable_cores() == (cores or before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process can't be held to cores there")
def test_only_the_cores_that_a_process_may_use_are_counted():
    code = "import common, os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(common.usable_cores())"
    assert python(code).stdout == b"1\n"


def test_a_share_that_keeps_its_own_permissions_and_a_long_name_are_written(tmp_path, monkeypatch):
    def not_permitted(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", not_permitted)
    for name in ("split.json", "a" * 250 + ".csv", "脳" * 80 + ".png"):
        with atomic_write(tmp_path / name) as file:
            file.write(b"whole")
        assert (tmp_path / name).read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_container_without_a_folder_for_temporary_files_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(FileNotFoundError) as raised:
        run_folder("hospital")
    assert "no writable folder for temporary files" in in_words(raised.value) and "TMPDIR" in in_words(
        raised.value
    )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what is set is taken back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    name_cache_where_missing()  # before torchvision, whose import asks torch for this folder
    assert cache_dir_utils.cache_dir()


def test_python_that_drops_docstrings_still_has_help(monkeypatch):
    monkeypatch.setattr("provision.__doc__", None)  # PYTHONOPTIMIZE=2
    done = run_here("provision.py", "--help")
    assert done.returncode == 0 and "admit a hospital" in done.stdout, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="other quotes there")
def test_the_next_command_can_be_typed_where_a_folder_has_spaces(tmp_path):
    out = tmp_path / "vor bereitet ü"
    said = run_here(
        "data/make_phantoms.py", "--patients", 1, "--size", 32, "--slices", 8, "--out", out
    ).stdout
    assert shlex.split(said.splitlines()[-1])[-1] == str(out)


def test_a_service_of_a_user_without_a_home_has_a_folder_for_flower(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("FLWR_HOME", "")  # so that what is set is taken back
    monkeypatch.delenv("FLWR_HOME")
    name_home_where_missing()
    assert get_flwr_home().is_absolute()


@pytest.mark.parametrize("other", ["p_1.tif", "P_1.tif", "p\u0301_1.tif"])
def test_no_mask_takes_the_place_of_another_one_on_any_disk(other):
    first = Path("anna/ṕ_1.tif" if "\u0301" in other else "anna/p_1.tif")
    names = output_names([first, Path("bert") / other])
    assert [name.split("_")[0] for name in names.values()] == ["anna", "bert"]
    with pytest.raises(MedFLError, match="would have the same name"):
        output_names([first, Path("elsewhere/ANNA") / other])


@pytest.mark.parametrize("number", ["²", "99999999999999999999"])
def test_a_file_that_is_called_like_a_leftover_stops_no_writing(tmp_path, number):
    beside = tmp_path / f".a.csv.{number}-x"
    beside.touch()
    write_csv(tmp_path / "a.csv", [("b",)])
    assert (tmp_path / "a.csv").read_text() == "b\n" and beside.exists()


def test_a_table_that_is_not_ours_is_no_earlier_run(tmp_path):
    (tmp_path / TABLE).write_text("file\n" + "x" * 200_000 + "\n")
    (tmp_path / "a_mask.png").touch()
    refuse_to_mix({tmp_path / "a.png": "a"}, tmp_path)
