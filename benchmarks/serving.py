"""The app as a real server, for tests and benchmarks."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from federation.runtime.processes import free_port

DEADLINE = 120.0  # seconds for the server's start on a busy machine


@contextlib.contextmanager
def served(root: Path, checkpoint: Path | None, log: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of `streamlit run` on the app below `root`, ended when the block is left."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(root)}  # as the Space's Dockerfile has it
    environment |= {"MEDFL_CHECKPOINT": str(checkpoint)} if checkpoint else {}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "streamlit",
                "run",
                str(root / "deployment" / "app" / "app.py"),
                "--server.port",
                str(port),
            ],
            cwd=root,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + DEADLINE
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield f"http://localhost:{port}", process.pid
    finally:
        process.terminate()
        process.wait(30)
