"""What a user may get wrong on the command line of server and hospital: one sentence each, before anything
starts."""

import pytest
from running import run_here

from federation.runtime.processes import free_port

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("run_server.py", "--address", "0.0.0.0:8080"), "can be reached from other machines"),
        (("run_server.py", "--address", "nonsense"), "write it as HOST:PORT"),
        (("run_server.py", "--min-clients", 5), "--min-clients is 5"),
        (("run_server.py", "--init", "missing.pth"), "there is no checkpoint"),
        (("run_server.py", "--resume"), "start without --resume"),
        (("run_server.py", "--schedule", "plateau", "--val-fraction", 0), "take --schedule cosine"),
        (("run_server.py", "--encoder", "missing.pth"), "there is no weights file"),
        (("run_server.py", "--image-size", 100), "multiple of 16"),
        (("run_server.py", "--local-steps", 0), "--local-steps is 0"),
        (("run_server.py", "--lr-factor", -1), "--lr-factor is -1"),
        (("run_server.py", "--warmup", 0.9), "choose a share of the run from 0 to 0.5"),
        (("train_centralized.py", "--warmup", 100), "choose a share of the run from 0 to 0.5"),
        (("run_client.py",), "give either --cid"),
        (("run_client.py", "--own-data", "x"), "give one with --name"),
        (("run_client.py", "--cid", 0, "--data-dir", "missing"), "there is no folder missing"),
        (("run_client.py", "--cid", 0, "--server", "192.0.2.1:8080"), "another machine"),
        (("run_client.py", "--own-data", "x", "--name", "St. Mary"), "letters, digits"),
        (("run_client.py", "--cid", 0, "--name", "a"), "--name goes with --own-data"),
        (("run_server.py", "--val-fraction", 0.9, "--test-fraction", 0.5), "leave somebody to train"),
        (("run_client.py", "--cid", -1), "numbered from 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_options_end_with_one_sentence(home, tmp_path, options, text):
    script, *rest = options
    if script == "run_server.py":
        rest = ["--address", f"127.0.0.1:{free_port()}", "--out", tmp_path, *rest]
    done = run_here(script, *rest, cwd=tmp_path)
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr, done.stderr
