"""What runs server and hospital as services: images, compose files, units.

No image is built here, because no container engine is needed for the tests: what the Dockerfiles copy is
copied, and what they start is started from that copy.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

SCRIPTS = {"server": "run_server.py", "hospital": "run_client.py"}


def left_out(path: str) -> bool:
    """Whether .dockerignore keeps a file of the repository out of the image."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keeps, pattern = pattern.startswith("!"), pattern.lstrip("!")
        parts = [path, *(str(parent) for parent in Path(path).parents)]  # a pattern begins at the root,
        if pattern.startswith("**/"):  # but for this one
            pattern, parts = pattern.removeprefix("**/"), list(Path(path).parts)
        if any(fnmatch.fnmatch(part, pattern) for part in parts):
            out = not keeps
    return out


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """The folder /app of both images."""
    app = tmp_path_factory.mktemp("image") / "app"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in listed or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py")]:
        if not left_out(name) and (ROOT / name).is_file():
            (app / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, app / name)
    return app


def test_no_scan_model_or_key_gets_into_an_image(image):
    for secret in (
        "kit/ca.key",
        "kit/server.pem",
        "models/x.pth",
        "data/kaggle_3m/a.tif",
        "hospital.key",
        ".git/config",
    ):
        assert left_out(secret), secret
    assert (image / "federation" / "runtime" / "kit.py").exists(), "no key, though it has the name"
    assert (image / "data" / "make_phantoms.py").exists() and not (image / "tests").exists()


@pytest.mark.slow
@pytest.mark.parametrize("side", SCRIPTS)
def test_what_an_image_starts_runs_from_what_it_holds(image, side):
    text = (ROOT / "deployment" / side / "Dockerfile").read_text().replace("\\\n", "")
    program, script, *options = json.loads(re.search(r"(?m)^ENTRYPOINT (.*)$", text)[1])
    assert program == "python" and Path(script).name == SCRIPTS[side]
    done = subprocess.run(
        [sys.executable, "-P", str(image / Path(script).name), *options, "--help"],
        env={**os.environ, "PYTHONPATH": str(image)},
        cwd=image,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "--kit" in done.stdout, done.stderr
    assert (
        "\nUSER medfl\n" in text
        and text.index("\nUSER") < text.index("\nENTRYPOINT")
        and "HEALTHCHECK" in text
    )
    for file in re.findall(r"-r (\S+)", text):
        assert (image / file).exists()


@pytest.mark.parametrize("side", SCRIPTS)
def test_compose_and_unit_keep_rights_small(side):
    compose = (ROOT / "deployment" / side / "compose.yaml").read_text()
    for line in (
        "read_only: true",
        "cap_drop: [ALL]",
        "no-new-privileges:true",
        "/kit:ro" if side == "hospital" else '"../../kit:/kit"',  # the server keeps the log's end there
        'tmpfs: ["/tmp"]',
        "logging: {driver: local}",  # or the other side's lines could fill the disk
    ):
        assert line in compose, line
    unit = (ROOT / "deployment" / side / f"medfl-{side}.service").read_text()
    for line in ("User=medfl", "NoNewPrivileges=true", "ProtectSystem=strict", "Restart=on-failure"):
        assert line in unit, line
    command = shlex.split(re.search(r"(?m)^ExecStart=(.*)$", unit)[1])
    assert Path(command[1]).name == SCRIPTS[side]
    known = re.findall(r'"(--[a-z-]+)"', (ROOT / SCRIPTS[side]).read_text()) + ["--clients", "--rounds"]
    assert not [option for option in command if option.startswith("--") and option not in known]
