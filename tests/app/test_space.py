"""What is pushed to a Space: the staged folder starts by itself, and each refusal of the hub gets its
sentence."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from running import ROOT, run_here

from benchmarks.serving import served
from deployment import push_to_space

pytestmark = pytest.mark.slow
BEST = "transunet_centralized_best.pth"
OF_THE_REPOSITORY = [
    ROOT,
    *(path.parent for path in ROOT.rglob("*.py") if ".venv" not in path.parts),
]  # folders of modules


def push(*options, **environment) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, str(ROOT / "deployment" / "push_to_space.py"), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**kept, **environment},
    )


@pytest.fixture(scope="module")
def staged(trained, tmp_path_factory):
    from checkpoint import load_checkpoint
    from deployment.staging import stage_space

    folder = tmp_path_factory.mktemp("space") / "staged"
    stage_space(load_checkpoint(trained / BEST), folder)
    return folder


def test_a_file_with_a_runs_state_is_not_published(tmp_path):
    """The optimiser's moments are gradients of the last scans, and a federation's state names its hospitals."""
    from checkpoint import describe, load_checkpoint, save_checkpoint
    from common import MedFLError
    from deployment.staging import stage_space
    from transunet import TransUNet

    model, last = TransUNet("mini", 32), tmp_path / "transunet_federated_last.pth"
    about = describe(model, origin={"kind": "centralised"}, scores={})
    save_checkpoint(last, model.state_dict(), about, {"moments": {}})
    with pytest.raises(MedFLError, match="publish the _best.pth"):
        stage_space(load_checkpoint(last), tmp_path / "staged")
    assert not (tmp_path / "staged").exists()


def test_the_folder_holds_the_app_and_nothing_of_a_federation(staged):
    names = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    assert {
        "README.md",
        "Dockerfile",
        "requirements.txt",
        "requirements.lock",
        "MODEL_CARD.md",
        f"models/{BEST}",
        "deployment/app/app.py",
        "deployment/viewer/dist/viewer.js",
        "deployment/viewer/dist/viewer.css",
    } <= names
    assert not [
        name
        for name in names
        if re.search(r"federation|train|dataset|batches|split|radiology|\.tif|__pycache__", name)
    ]
    head = (staged / "README.md").read_text().split("---")[1]
    assert {"sdk: docker", "app_port: 8501", "license: mit"} <= set(head.split("\n"))
    assert len(re.search("short_description: (.*)", head)[1]) <= 60
    required = (staged / "requirements.txt").read_text()
    assert "flwr" not in required
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name = re.match("[a-z]*", line)[0]
        if name and re.search(f"^{name}==", required, re.M):
            assert line.split()[0] in required, f"{name} is pinned to another version than in the repository"


def test_the_folder_starts_by_itself_and_segments(staged, tmp_path):
    """Outside of the repository, as the Dockerfile has it; a module that it lacks would come from the
    repository."""
    code = (
        "import io, sys, zipfile; from pathlib import Path; from streamlit.testing.v1 import AppTest\n"
        "page = AppTest.from_file('deployment/app/app.py', default_timeout=120).run()\n"
        "assert 'DICOM' not in page.file_uploader[0].label\n"
        "file = io.BytesIO()\n"
        "with zipfile.ZipFile(file, 'w') as archive: archive.writestr('a', bytes(128) + b'DICM')\n"
        "page.file_uploader[0].set_value([('a.zip', file.getvalue(), 'application/zip')]).run()\n"
        "assert ['published page does not accept them' in error.value for error in page.error] == [True], page.error\n"
        "page.button(key='phantom_1').click().run()\n"
        "assert not page.exception and len(page.table) == 1, page.exception\n"
        "names = ('deployment.app.card', 'transunet', 'inference', 'appearance.doubts')\n"
        "here = {n: m.__file__ for n, m in sys.modules.items() if n in names}\n"
        "assert len(here) == 4 and all(Path(f).is_relative_to(Path.cwd()) for f in here.values()), here\n"
        "files = [Path(m.__file__) for m in sys.modules.values() if getattr(m, '__file__', None)]\n"
        f"assert not [f for f in files if str(f.parent) in {[str(path) for path in OF_THE_REPOSITORY]!r}]\n"
        "assert not {'flwr', 'dataset', 'federation'} & set(sys.modules)\n"
    )
    # -S and this path keep out the repository, which `pip install -e .` puts on every path of this environment
    path = os.pathsep.join([str(staged), sysconfig.get_path("purelib")])
    environment = {name: value for name, value in os.environ.items() if name != "MEDFL_CHECKPOINT"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=staged,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with served(staged, None, tmp_path / "log") as (address, _):
        assert address  # its health check answers


def test_a_dry_run_shows_what_would_be_sent(trained):
    done = push("--repo", "someone/medfl", "--checkpoint", trained / BEST, "--dry-run")
    assert done.returncode == 0 and "nothing was sent" in done.stdout and "docker run" in done.stdout, (
        done.stderr
    )
    assert f"models/{BEST}" in done.stdout and re.search(r"\d+\.\d\d MB in \d+ files", done.stdout)


def test_the_precision_is_for_the_page_in_the_browser(trained):
    options = ("--repo", "someone/medfl", "--checkpoint", trained / BEST, "--single", "--dry-run")
    done = run_here("deployment/push_to_space.py", *options)
    assert done.returncode == 2 and "add --static" in done.stderr


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does; codes: what creating a repository, or asking who one is, gives."""

    codes: dict[str, int] = {}
    space: dict | None = None

    def answer(self, code: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if "whoami" in self.path:
            self.answer(self.codes.get("whoami", 200), {"name": "someone", "type": "user", "orgs": []})
        elif self.space:
            self.answer(200, self.space)
        else:
            self.answer(404, {"error": "Repository not found"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(self.codes.get("create", 500), {"error": "refused"})

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("codes", "space", "sentence"),
    [
        ({"whoami": 401}, None, "token is wrong"),
        ({"create": 402}, None, "may not create Docker Spaces"),
        ({"create": 403}, None, "no write access"),
        ({"create": 409}, None, "is taken"),
        ({"create": 418}, None, "refused with code 418"),
        (
            {},
            {"id": "someone/medfl", "sdk": "static", "cardData": {"title": "Else"}},
            "taken by another Space",
        ),
    ],
    ids=str,
)
def test_each_refusal_gets_a_sentence(hub, trained, home, codes, space, sentence, monkeypatch):
    Hub.codes, Hub.space = codes, space
    api = functools.partial(HfApi, endpoint=hub, token="hf_" + "a" * 34)
    monkeypatch.setattr(push_to_space, "HfApi", api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    done = run_here("deployment/push_to_space.py", "--repo", "medfl", "--checkpoint", trained / BEST)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_no_token_no_network_and_no_name(hub, trained, home):
    Hub.codes, Hub.space = {}, None
    common = ("--checkpoint", trained / BEST)
    done = push("--repo", "medfl", *common, HF_ENDPOINT=hub, HF_HOME=str(home / "hf"))
    assert done.returncode == 2 and "there is no Hugging Face token" in done.stderr, done.stderr
    token = {"HF_TOKEN": "hf_" + "a" * 34}
    done = push("--repo", "medfl", *common, HF_ENDPOINT="http://127.0.0.1:9", **token)
    assert done.returncode == 2 and "can't be reached" in done.stderr, done.stderr
    done = push("--repo", "medfl", *common, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1", **token)
    assert done.returncode == 2 and "unset HF_HUB_OFFLINE" in done.stderr, done.stderr
    done = push("--repo", "no good/name/at all", *common, HF_ENDPOINT=hub, **token)
    assert done.returncode == 2 and "not a valid name for a Space" in done.stderr, done.stderr
