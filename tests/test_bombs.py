"""Tiny files that ask for a machine's memory are refused before anything is decoded or allocated, through
every way in: a child under a memory limit reads them all."""

import json
import os
import subprocess
import sys

import pytest
from running import ROOT

from borders.limits import BUDGET

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it")


def test_no_file_takes_more_than_the_budget_or_a_moment(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "bombs.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    read = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(read) >= 80, done.stderr[-2000:]
    assert [(name, told) for name, told, *_ in read if not told.startswith("refused: ")] == []
    assert [(name, used) for name, _, used, _ in read if used > BUDGET // 2] == []
