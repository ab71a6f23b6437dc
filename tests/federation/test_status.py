"""Who is not at the terminal: the status page, the webhook and the command, TensorBoard and MLflow, and the
end of a run: test scores, the model for everybody."""

import http.client
import http.server
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest
from running import ROOT
from scripted import VERSIONS, Grid, Worker, facts, make_fast

from checkpoint import describe, load_checkpoint, save_checkpoint
from common import MedFLError
from federation.protocol import page
from federation.protocol.agreement import to_json
from federation.protocol.answers import Tested as HospitalScore
from federation.protocol.messages import read
from federation.protocol.settings import FederationSettings
from federation.runtime.status_port import serve_status
from federation.server.app import run
from federation.server.ending import pooled
from federation.server.events import Journal, Messenger
from runs.tracking import mlflow_address
from training import TrainingSettings
from transunet import TransUNet

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "](javascript:alert(1))", "a & b"]


class Keeps(Worker):
    """A hospital with data of its own that keeps what it was sent at the end."""

    def __init__(self, label, scores, **other):
        super().__init__(label, scores)
        self.introduction, self.models = facts(label, **other), {}

    def answer(self, incoming):
        about = read(incoming.content)
        if about.get("query") == "model":
            self.models[about["which"]] = about
        return super().answer(incoming)


@pytest.fixture
def done(monkeypatch, tmp_path):
    """A run of two hospitals and an observer through the server's app: its folder, its hospitals and the lines
    that were told."""

    def play(**job):
        make_fast(monkeypatch)
        training, federation = TrainingSettings(image_size=32), FederationSettings(rounds=2, round_timeout=20)
        start = tmp_path / "start.pth"
        model = TransUNet("tiny", 32, "batch")
        save_checkpoint(start, model.state_dict(), describe(model))
        grid, out = Grid(), tmp_path / "out"
        hospitals = [
            Keeps("mercy", [0.2, 0.4, 0.5]),
            Keeps("hope", [0.3, 0.5, 0.6]),
            Keeps("grace", [0.9, 0.1, 0.1], role="observe"),
        ]
        hospitals[1].test_dice = 0.3
        grid.nodes = dict(enumerate(hospitals, 1))
        about = {
            "started_in": str(tmp_path),
            "out": str(out),
            "resume": False,
            "start": str(start),
            "started_from": "random weights",
            "init_split": None,
            "settings": to_json(training, federation),
            "versions": VERSIONS,
            "commit": None,
            "audit": {"code": "0" * 64},
        }
        assert run(grid, about | job) == 0
        return out, hospitals

    return play


def test_the_run_is_told_scored_and_handed_over(done, tmp_path):
    heard = tmp_path / "heard"
    command = f"{sys.executable} -c \"import sys; open(r'{heard}', 'a').write(sys.stdin.read())\""
    out, hospitals = done(on_event=command, tensorboard=True)
    html = (out / "status" / "index.html").read_text(encoding="utf-8")
    for word in ("mercy", "hope", "grace", "observes", "round 2 of 2", "SHA-256", "delivered", "http-equiv"):
        assert word in html, word
    assert html.count("<td>1.000</td>") == 2  # the last training's loss stays when the last model was scored
    told = [json.loads(line) for line in heard.read_text().splitlines()]
    assert [line["event"] for line in told] == ["joined"] * 3 + ["end"]
    assert list((out / "tensorboard").glob("events*"))
    score = json.loads((out / "federated_test.json").read_text())["best"]
    assert score["patients"] == 12 and score["worst"] == "hope" and score["spread"] == pytest.approx(0.2)
    assert score["volume_dice"]["mean"] == pytest.approx((0.5 + 0.3 + 0.5) / 3)
    metadata = load_checkpoint(out / "transunet_federated_best.pth").metadata
    assert metadata["scores"]["test"] == score
    assert metadata["scores"]["val"]["patients"] == 8, "who observes has no part in choosing"
    for hospital in hospitals:
        assert hospital.models.keys() == {"best", "last"}
        assert json.loads(hospital.models["best"]["metadata"]) == metadata


def test_the_page_in_a_browser(done, browser, tmp_path):
    out, _ = done()
    tab = browser.new_page()
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    tab.goto((out / "status" / "index.html").as_uri())
    assert tab.locator("h1").inner_text() == "MedFL federation"
    assert tab.locator("td", has_text="mercy").count() and not errors
    page.write_page(
        tmp_path / "x.html", HOSTILE[0], HOSTILE[1], [(HOSTILE[2], page.table(HOSTILE, [HOSTILE]))]
    )
    tab.goto((tmp_path / "x.html").as_uri())
    assert tab.locator("script, img, a").count() == 0
    assert [tab.locator("td").nth(k).inner_text() for k in range(4)] == HOSTILE
    tab.close()


def test_a_page_elsewhere_cant_read_the_status(tmp_path):
    (tmp_path / "index.html").write_text("here")
    port = serve_status(tmp_path, 0)
    hosts = {f"127.0.0.1:{port}": 200, f"evil.example:{port}": 403}
    for method, (host, status) in itertools.product(("GET", "HEAD"), hosts.items()):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(method, "/index.html", headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()


def test_a_webhook_and_a_command_get_one_line_an_event_and_cant_stop_anything(tmp_path, capsys):
    got = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if got[-1]["event"] == "end" else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    heard = tmp_path / "heard"
    code = "import sys; open('heard', 'a').write(line := sys.stdin.read()); sys.exit('no' if 'end' in line else 0)"
    program = tmp_path / "hear"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o700)
    messenger = Messenger(f"http://127.0.0.1:{server.server_port}/", "./hear", tmp_path)
    messenger("left_out", {"hospital": "mercy", "round": 3, "why": "no answer", "before": "x"})
    messenger("round", {"round": 3})
    messenger("end", {"exit": 0})
    messenger.close()
    server.shutdown()
    assert [line["event"] for line in got] == ["left_out", "end"] and "before" not in got[0]
    said = capsys.readouterr().out
    assert got[0]["hospital"] == "mercy" and "--notify failed (HTTP 500)" in said
    # what fails here does not keep the line from who is next
    assert [json.loads(line)["event"] for line in heard.read_text().splitlines()] == ["left_out", "end"]
    assert "--on-event failed (exit code 1: no)" in said


@pytest.mark.parametrize(("url", "command"), [("ftp://x", None), (None, "/no/such/program")])
def test_who_cant_be_told_is_found_at_the_start(url, command, tmp_path):
    with pytest.raises(MedFLError):
        Messenger(url, command, tmp_path)


def test_a_listener_that_fails_ends_nothing(tmp_path, capsys):
    journal = Journal(tmp_path / "audit.jsonl")
    journal.listeners.append(lambda *_: 1 / 0)
    journal.write("round", round=1)
    journal.write("round", round=2)
    assert capsys.readouterr().out.count("ZeroDivisionError") == 1 and not journal.listeners


def score_of(dice: float | None, patients: int) -> HospitalScore:
    return HospitalScore(test_dice=dice, test_patients=patients, seconds=1.0)


def test_the_pooled_score_weighs_patients_and_draws_hospitals():
    score = pooled(
        {"a": score_of(0.8, 30), "b": score_of(0.5, 10), "c": score_of(0.6, 10), "d": score_of(None, 0)}
    )
    assert score["volume_dice"]["mean"] == pytest.approx(0.7) and score["patients"] == 50
    low, high = score["volume_dice"]["ci95"]
    assert 0.5 <= low < 0.7 < high <= 0.8 and score["worst"] == "b"
    assert pooled({"a": score_of(0.8, 3), "b": score_of(0.7, 3)})["volume_dice"]["ci95"] is None
    assert pooled({"a": score_of(None, 0)}) is None
    assert asdict(FederationSettings())["withhold_model"] is False


@pytest.mark.parametrize(
    "given, taken",
    [
        ("local", "local"),
        ("https://mlflow.example/x", "https://mlflow.example/x"),
        ("runs", "file://HERE/runs"),
        ("sqlite:///runs.db", "sqlite:///HERE/runs.db"),
        ("sqlite:////srv/runs.db", "sqlite:////srv/runs.db"),
    ],
)
def test_mlflows_files_count_from_where_the_script_was_started(given, taken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mlflow_address(given) == taken.replace("HERE", tmp_path.resolve().as_posix())


ASKED = """
import socket, sys, time
from pathlib import Path
from runs.tracking import open_trackers
def look(host, *others, **more):
    print("asked for", host, flush=True)
    raise socket.gaierror
socket.getaddrinfo = look
(one,) = open_trackers(Path(sys.argv[1]), False, "local")
one.settings({"lr": 0.1})
one.close()
from mlflow.telemetry.client import get_telemetry_client
print("telemetry is", "on" if get_telemetry_client() else "off")
"""


def test_mlflow_tells_its_makers_nothing(tmp_path):
    pytest.importorskip("mlflow")
    quiet = {
        "CI",
        "GITHUB_ACTIONS",
        "PYTEST_CURRENT_TEST",
        "MLFLOW_DISABLE_TELEMETRY",
    }  # it tells nothing there
    others = {name: value for name, value in os.environ.items() if name not in quiet}
    environment = {**others, "MLFLOW_ALLOW_FILE_STORE": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ASKED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "telemetry is off", done.stdout + done.stderr


def test_mlflow_keeps_a_run_in_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from runs.tracking import open_trackers

    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    (one,) = open_trackers(tmp_path, False, "local")
    one.settings({"lr": 0.1})
    one.scalars({"val_dice/mercy": 0.5}, 1)
    one.close()
    assert [p for p in (tmp_path / "mlruns").rglob("lr")] and list((tmp_path / "mlruns").rglob("mercy"))


class Away:
    """A tracker whose server is gone."""

    def __getattr__(self, name):
        def refuse(*_):
            raise RuntimeError("API request failed\nwith many lines")

        return refuse


def test_a_tracker_that_is_gone_ends_no_run_and_is_told_once(tmp_path, capsys):
    from runs.tracking import Aside

    tracker = Aside(Away())
    tracker.settings({"lr": 0.1})
    tracker.scalars({"val_dice": 0.5}, 1)
    tracker.picture("curves", tmp_path / "curves.png")
    tracker.model(tmp_path / "model.pth")
    tracker.close()
    told = capsys.readouterr().out
    assert told == "note: Away could not keep all (RuntimeError: API request failed); the run goes on\n"


def test_an_mlflow_server_that_is_away_is_a_sentence_before_the_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from runs import tracking

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(MedFLError, match="--mlflow can't be used .*leave the option out"):
            tracking.open_trackers(tmp_path, False, f"http://127.0.0.1:{taken.getsockname()[1]}")
