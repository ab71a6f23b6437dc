"""What the browser's tests share: node, the staged page and its server, and the app's modules, which the page
is held against."""

import json
import shutil
import subprocess
import threading

import pytest
from running import ROOT, run_script

from dataset import load_dataset
from runs.models import PHANTOM_MODEL

PAGE = ROOT / "deployment" / "browser"
VIEWER = ROOT / "deployment" / "viewer" / "dist" / "viewer.js"


@pytest.fixture(scope="session")
def node() -> str:
    """The path of Node.js; skipped aloud where it or the page's libraries are missing."""
    path = shutil.which("node")
    if path is None or not (PAGE / "node_modules").is_dir() or not VIEWER.is_file():
        pytest.skip("no Node.js, or no libraries of the page: install it, then `make browser-libraries`")
    return path


@pytest.fixture(scope="module")
def ask(node, tmp_path_factory):
    """A function: what the page's modules make of cases, each (files, further keys)."""

    def asked(*given: tuple[list, dict]) -> list[dict]:
        folder = tmp_path_factory.mktemp("asked")
        written = 0

        def store(files):
            nonlocal written
            listed = []
            for name, content in files:
                path = folder / f"file{written}"
                path.write_bytes(content)
                listed.append({"name": name, "path": str(path)})
                written += 1
            return listed

        cases = []
        for number, (files, more) in enumerate(given):
            more = {key: store(value) if key == "masks" else value for key, value in more.items()}
            cases.append({"files": store(files), "out": str(folder / f"out{number}"), **more})
        (folder / "in.json").write_text(json.dumps(cases))
        done = subprocess.run(
            [node, str(ROOT / "tests" / "browser" / "dump.mjs"), str(folder / "in.json")],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return [{**answer, "out": case["out"]} for answer, case in zip(json.loads(done.stdout), cases)]

    return asked


@pytest.fixture(scope="session")
def staged(node, home, tmp_path_factory):
    from checkpoint import load_checkpoint
    from deployment.staging import stage_browser

    folder = tmp_path_factory.mktemp("browser") / "staged"
    stage_browser(load_checkpoint(PHANTOM_MODEL), folder=folder)
    return folder


@pytest.fixture(scope="module")
def serve():
    """A function that serves a folder, with the Space's headers or without, and gives the address."""
    from deployment.serve_browser import server

    running = []

    def start(folder, isolated=True) -> str:
        one = server(folder, 0, isolated)
        running.append(one)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{one.server_port}"

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="module")
def address(staged, serve) -> str:
    return serve(staged)


@pytest.fixture(scope="module")
def patient(phantoms, tmp_path_factory):
    """A patient's slices and masks, and the folder of masks that predict.py writes for the slices."""
    one = load_dataset(phantoms, progress=False).patients[0]
    out = tmp_path_factory.mktemp("predicted")
    assert run_script("predict.py", *one.images, "--checkpoint", PHANTOM_MODEL, "--out", out).returncode == 0
    return one, out
