"""Scripts run as a user runs them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_script(script: str, *options: object, cwd: Path = ROOT, **kept) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user does; what it printed is kept."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, options)], cwd=cwd, capture_output=True,
                          text=True, timeout=300, **kept)
