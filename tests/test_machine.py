"""What a user's machine does to a run: terminals, pipes, disks, memory, folders. A sentence, or nothing."""

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import common
from checkpoint import save_checkpoint
from common import MedFLError, atomic_write, in_words, run_folder

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
    code = "import sys; from federation.runtime import flower; flower.tie_to_parent = lambda *_: None\n"
    code += "flower.run_superlink = lambda *_: print('round – 1'); sys.argv = ['', '1', 'superlink']; flower.main()"
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
        "from common import atomic_write, run_folder; from pathlib import Path\n"
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
