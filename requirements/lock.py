"""Pin what requirements*.txt need, and all that this needs in turn, by version and SHA-256.

    pip install -r requirements-audit.txt
    make lock                          # or: python requirements/lock.py

For each purpose a file with every package for Linux, macOS and Windows, except torch, torchvision and the CUDA
libraries, which stand in torch.lock: torch's builds for the CPU come from an index of their own. How to install
from these files: CONTRIBUTING.md.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HERE = ROOT / "requirements"
PURPOSES = {  # name of the lock: the files that it pins
    "main": ("requirements.txt",),
    "federation": ("requirements.txt", "requirements-privacy.txt"),
    "dicom": ("requirements-dicom.txt",),
    "space": ("deployment/space/requirements.txt",),
    "dev": ("requirements-dev.txt",),
    "audit": ("requirements-audit.txt",),
}
TORCH = "torch"
OF_TORCH = re.compile(r"(torch|torchvision|triton|nvidia-[\w.-]+|cuda-[\w.-]+)==")
HEAD = "# Made by `make lock`; don't edit.\n"


def resolved(files: tuple[str, ...]) -> list[str]:
    """The packages of these files as blocks of lines, each with its hashes."""
    command = ["uv", "pip", "compile", "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += [
        "--no-annotate",
        "--no-header",
        "--no-config",
        "--quiet",
        "--no-emit-package",
        "medfl",
        *files,
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return re.findall(r"(?m)^[\w.-]+(?:\[.*\])?==.*(?:\n    .*)*\n", done.stdout)


def main() -> None:
    blocks = {name: resolved(files) for name, files in PURPOSES.items()}
    files = {name: [one for one in many if not OF_TORCH.match(one)] for name, many in blocks.items()}
    files[TORCH] = [one for one in blocks["main"] if OF_TORCH.match(one)]
    for name, many in files.items():
        path = HERE / f"{name}.lock"
        path.write_text(HEAD + "".join(many), encoding="utf-8", newline="\n")
        print(f"{path.relative_to(ROOT).as_posix()}: {len(many)} packages")


if __name__ == "__main__":
    sys.exit(main())
