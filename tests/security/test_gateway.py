"""Attacks on a federation behind its gateway, by real processes: each must fail, and the hospitals go on
training."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import threading
import time
from datetime import timedelta

import httpx
import pytest
from consortium import Consortium, Secured, call, tls
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from federations import BEST, DEADLINE, SMALL, Scene, children
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from running import run_here

from federation.runtime import gateway, processes
from federation.runtime.bundle import make_bundle
from federation.runtime.flower import Control, TaskSource
from federation.runtime.processes import Child, rotate
from federation.runtime.service import Service
from federation.server.audit import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None,
        reason="no nginx for the gateway's tests: install it",
    ),
]


TYPED = {"Content-Type": "application/protobuf"}


@pytest.fixture(scope="module")
def scene(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("secured")
    made = Secured(folder, phantoms)
    for number in (0, 1, 2):
        made.join(number)
    made.run.wait_for(r"(?m)^[-\d :]+round 1 of", 1)
    yield made
    assert made.close() == []


def test_from_outside_nobody_can_submit_register_list_or_pull(scene):
    control = Control(scene.address, scene.ca)
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    attacks = {
        "submit a run": lambda: control.submit(make_bundle()),
        "register a node": lambda: control.register(pem, "mallory"),
        "put a hospital out": lambda: control.unregister(1),
        "list runs": lambda: control._client.ListRuns(ListRunsRequest()),
    }
    for name, attack in attacks.items():
        with pytest.raises(httpx.HTTPStatusError) as refused:
            attack()
        assert refused.value.response.status_code == 403, name
    with pytest.raises(RunNotRunningException):  # what Flower makes of a 403 there
        TaskSource(scene.address, "flwr-serverapp", scene.ca).next_token()
    scene.goes_on()


@pytest.mark.parametrize(
    "path",
    [
        "/docs",
        "/openapi.json",
        "/",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "//v1/control/list-runs",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "/v1/FLEET/pull-messages",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull-messages/",
        "/health/../docs",
    ],
)
def test_no_other_path_leads_in(scene, path):
    assert all(call(scene, method, path) in (400, 403, 404) for method in ("GET", "POST"))
    assert call(scene, "GET", "/v1/fleet/pull-messages") == 403 and call(scene, "POST", "/health") == 403


def test_clear_text_and_older_tls_get_nothing(scene):
    plain = http.client.HTTPConnection("127.0.0.1", scene.port, timeout=30)
    plain.request("GET", "/health")
    assert plain.getresponse().status == 400
    with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", scene.port), timeout=30) as raw:
        tls(scene, version=ssl.TLSVersion.TLSv1_2).wrap_socket(raw, server_hostname="localhost")
    assert call(scene, "GET", "/health") == 200


def test_without_a_key_that_is_admitted_nobody_joins(scene):
    stranger = scene.consortium.folder / "stranger"
    scene.consortium.provision("hospital", "--name", "hospital-2", "--kit", stranger)
    (stranger / "ca.pem").write_bytes(scene.ca.read_bytes())
    script = scene.join(2, stranger)
    assert script.end() == 2 and "does not admit this hospital's key" in script.output
    checked = scene.join(2, stranger, "--check")
    assert checked.end() == 2 and "does not admit this hospital's key" in checked.output
    admitted = scene.join(0, None, "--check")
    assert admitted.end() == 0 and "admits this key" in admitted.output, admitted.output
    none = scene.hospital("keyless", "--cid", 2, "--data-dir", scene.phantoms, "--wait", 3)
    assert none.end() in (2, 3) and "joined as" not in none.output
    scene.goes_on()


def test_one_hospital_cant_pose_as_another(scene):
    """Its own kit says who it is; one that changes that is found by its key."""
    script = scene.hospital(
        "liar",
        "--own-data",
        scene.phantoms / "kaggle_3m",
        "--name",
        "hospital-0",
        "--kit",
        scene.kits["hospital-1"],
    )
    assert script.end() == 2 and "give the kit of that name" in script.output
    forged = scene.folder / "forged"
    shutil.copytree(scene.kits["hospital-3"], forged)
    line = (forged / "hospital.pub").read_text()
    (forged / "hospital.pub").write_text(line.replace("hospital-3", "hospital-0"))
    script = scene.join(0, forged)
    assert script.end() == 2 and "refused: this key is hospital-3's" in script.output, script.output
    assert "hospital-0 refused: identity" in scene.run.output
    lines = (scene.out / "audit.jsonl").read_text().splitlines()
    refused = [line for line in map(json.loads, lines) if line["event"] == "refused"]
    assert ("hospital-3", "identity") in {(line["hospital"], line["why"]) for line in refused}
    scene.goes_on()


def test_a_server_of_another_authority_is_not_spoken_to(scene, tmp_path):
    other = Consortium(tmp_path)
    kit = tmp_path / "mine"
    shutil.copytree(scene.kits["hospital-2"], kit)
    (kit / "ca.pem").write_bytes((other.kit / "ca.pem").read_bytes())
    for options in ((), ("--check",)):
        script = scene.join(2, kit, *options)
        assert (
            script.end() == 2
            and "is not the one of this kit" in script.output
            and scene.address in script.output
        )


def fleet(scene, label: str):
    """Flower's client for hospitals with that hospital's key, and its request to be let in."""
    private = serialization.load_ssh_private_key((scene.kits[label] / "hospital.key").read_bytes(), None)
    client = FleetHttpClient.from_server_address(
        scene.address,
        False,
        scene.ca.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            node_auth_http_interceptor.NodeAuthHttpInterceptor(private, private.public_key()),
        ],
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return client, ActivateNodeRequest(public_key=public, heartbeat_interval=30)


def test_a_request_that_is_replayed_after_its_window_is_refused(scene, monkeypatch):
    """The window is Flower's, five minutes; within it a replay needs what TLS hides."""
    now = node_auth_http_interceptor.now
    client, request = fleet(scene, "hospital-0")
    for age in (310, -10, 86_400):
        monkeypatch.setattr(node_auth_http_interceptor, "now", lambda age=age: now() - timedelta(seconds=age))
        with pytest.raises(httpx.HTTPStatusError) as refused:
            client.ActivateNode(request)
        assert refused.value.response.status_code == 401, age
        monkeypatch.undo()


def test_a_hospital_sends_no_message_in_the_servers_name(scene):
    client, request = fleet(scene, "hospital-3")
    node = client.ActivateNode(request).node_id
    about = Metadata(message_id="a" * 64, src_node_id=1, dst_node_id=node, message_type="query")
    with pytest.raises(httpx.HTTPStatusError) as refused:
        client.PushMessages(
            PushMessagesRequest(node=Node(node_id=node), messages_list=[Message(metadata=about)])
        )
    assert refused.value.response.status_code == 403
    client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    scene.goes_on()


def test_an_oversized_body_is_refused(scene):
    connection = http.client.HTTPSConnection("127.0.0.1", scene.port, context=tls(scene), timeout=30)
    connection.putrequest("POST", "/v1/fleet/push-object")
    connection.putheader("Content-Length", str(10 << 30))
    connection.endheaders()
    assert connection.getresponse().status == 413  # before a byte of it was sent
    connection.close()
    connection = http.client.HTTPSConnection("127.0.0.1", scene.port, context=tls(scene), timeout=30)

    def chunks():
        for _ in range(40):
            yield b"x" * (1 << 20)

    try:
        connection.request(
            "POST", "/v1/fleet/push-object", chunks(), {"Transfer-Encoding": "chunked"}, encode_chunked=True
        )
        assert connection.getresponse().status in (401, 413, 415)
    except (BrokenPipeError, ConnectionResetError):  # it hung up in the middle
        pass
    scene.goes_on()


@pytest.mark.parametrize("chunked", [False, True])
def test_only_an_object_is_large(scene, chunked):
    """Flower takes a call apart, into 28 times the memory, before it asks for the key."""

    def answered(path: str) -> int:
        piece = b"\x12\x00" * (1 << 19)  # each pair is an entry of a list
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it hung up in the middle
            return call(scene, "POST", path, iter([piece]) if chunked else piece, TYPED)
        return 413

    calls = "activate-node pull-messages push-messages get-run get-fab pull-object confirm-message-received"
    assert {answered(f"/v1/fleet/{name}") for name in calls.split()} == {413}
    assert answered("/v1/fleet/push-object") in (400, 401)


def test_200_connections_held_open_stop_nobody(scene):
    held = []
    for number in range(200):
        raw = socket.create_connection(("127.0.0.1", scene.port), timeout=30, source_address=("127.0.0.2", 0))
        if number % 2:  # half of them say nothing at all, half begin a request and never end it
            raw = tls(scene).wrap_socket(raw, server_hostname="localhost")
            raw.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        held.append(raw)
    assert call(scene, "GET", "/health") == 200
    scene.goes_on()
    until = time.monotonic() + 60
    for raw in held:  # and they are let go
        raw.settimeout(max(until - time.monotonic(), 0.1))
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while raw.recv(4096):
                pass
        raw.close()
    assert time.monotonic() < until


def test_each_connection_of_a_worker_finds_its_two_files():
    """The usual limit of 1024 files ended 2,500 connections that one address had left half open."""
    text = gateway.TEMPLATE.read_text(encoding="utf-8")
    files, connections = (
        int(re.search(rf"{name} (\d+);", text)[1]) for name in ("worker_rlimit_nofile", "worker_connections")
    )
    assert files >= 2 * connections


def test_too_many_calls_are_slowed_down(scene):
    """From one address; others are not touched. A busy machine may answer so slowly that the calls are not too
    many yet: they go on until one is refused."""
    statuses = []
    until = time.monotonic() + DEADLINE

    def hammer():
        plain = socket.create_connection(
            ("127.0.0.1", scene.port), timeout=30, source_address=("127.0.0.3", 0)
        )
        raw = tls(scene).wrap_socket(plain, server_hostname="localhost")
        while b"429" not in statuses and time.monotonic() < until:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 600)
            answer = b""
            while answer.count(b"HTTP/1.1 ") < 600 and (more := raw.recv(1 << 20)):
                answer += more
            statuses.extend(re.findall(rb"HTTP/1.1 (\d+)", answer))
        raw.close()

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {b"200", b"429"}
    assert call(scene, "GET", "/health") == 200


def test_refused_calls_fill_no_log(scene):
    connection = http.client.HTTPSConnection("127.0.0.1", scene.port, context=tls(scene), timeout=30)
    statuses = []
    while statuses.count(429) < 100:
        connection.request("GET", f"/health?{'a' * 1_000}")
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    connection.close()
    (log,) = scene.folder.glob("medfl-server-*/start-*/nginx.log")
    assert "a" * 1_000 not in log.read_text()


class Running(Child):
    """A program that has written this log, and ends after some looks."""

    def __init__(self, log, looks=100):
        self.program, self.log, self.looks = log.stem, log, iter([None] * looks + [0])

    @property
    def exit_code(self):
        return next(self.looks)


def test_no_log_of_the_servers_programs_grows_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MOST_LOG", 10)
    service = Service("127.0.0.1", 1, None, True, {"out": tmp_path}, tmp_path)
    logs = [service.gateway_log, *(tmp_path / f"{name}.log" for name in ("superlink", "nginx", "app"))]
    for log in logs:
        log.write_text("a stranger's call")
    app = Running(logs[3], looks=1)
    service.children = [Running(logs[1]), Running(logs[2]), app]
    service._wait_for(app, None)
    for log in logs:
        assert log.read_text() == "" and log.with_name(f"{log.name}.1").read_text() == "a stranger's call"


def test_the_access_log_holds_no_secret(scene):
    log = (scene.out / "gateway.log").read_text()
    assert "/v1/fleet/pull-messages" in log
    keys = [(kit / "hospital.pub").read_text().split()[1] for kit in scene.kits.values()]
    assert not [word for word in ("signature", "public-key", "Bearer", *keys) if word in log]
    for script in scene.scripts:
        assert "PRIVATE KEY" not in script.output


def audited(scene) -> list[dict]:
    """What the audit log holds."""
    return [json.loads(line) for line in (scene.out / "audit.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_killed_hospital_comes_back_with_the_same_key(scene):
    """The server may hold the dead connection for about a minute; then the hospital says so once, and waits. Where it
    starts slowly, the server has dropped that connection before (test_lingering.py has the sentence)."""
    hospital = next(script for script in scene.scripts if script.name == "hospital-2")
    hospital.kill()
    again = scene.join(2)
    again.wait_for(r"(?m)^[-\d :]+round \d+ of")
    scene.goes_on()
    last = [event for event in audited(scene) if event["event"] == "round"][-1]
    assert "hospital-2" in last["hospitals"] and again.output.count("still holds a connection") <= 1


def test_a_revocation_takes_effect_by_the_next_round_and_the_log_tells(scene):
    hospital = next(script for script in scene.scripts if script.name == "hospital-1")
    scene.consortium.provision("revoke", "hospital-1", "--kit", scene.consortium.kit)
    scene.run.wait_for("hospital-1 is removed")
    assert hospital.end() == 2 and "does not admit this hospital's key" in hospital.output
    hospital_left = scene.rounds
    scene.run.wait_for(
        r"(?m)^[-\d :]+round \d+ of \d+: ", hospital_left + 3
    )  # the one under way, and two whole ones
    events = audited(scene)
    assert verify(scene.out / "audit.jsonl")[0] >= len(events)
    gone = next(
        k for k, event in enumerate(events) if event["event"] == "left" and event["hospital"] == "hospital-1"
    )
    assert events[gone]["why"] == "its key is revoked or its admission has ended"
    before, after = (
        [event["hospitals"] for event in part if event["event"] == "round"]
        for part in (events[:gone], events[gone:])
    )
    # what it had sent before may still count in the round that was under way
    assert (
        "hospital-1" in before[0]
        and len(after) > 1
        and not any("hospital-1" in hospitals for hospitals in after[1:])
    )
    names = [path.name for path in (scene.phantoms / "kaggle_3m").iterdir()]
    text = (scene.out / "audit.jsonl").read_text()
    assert (
        not [name for name in names if name in text]
        and str(scene.folder) not in text
        and (scene.out / BEST).name in text
    )


def gateway_of(scene) -> list[int]:
    """The process ids of the scene's nginx."""
    return [int(command.split()[0]) for command in children(scene.folder) if "nginx" in command]


def test_a_long_log_of_calls_is_put_aside_while_the_gateway_writes(scene, monkeypatch):
    log = scene.out / "gateway.log"
    before = log.read_text()
    rotate(log)
    assert not log.with_name("gateway.log.1").exists()  # it is not long
    monkeypatch.setattr(processes, "MOST_LOG", len(before) - 1)
    rotate(log)
    assert log.with_name("gateway.log.1").read_text().startswith(before)
    scene.goes_on()
    assert "/v1/fleet/pull-messages" in log.read_text() and "\0" not in log.read_text()


def test_a_gateway_that_dies_is_started_again(scene):
    os.kill(min(gateway_of(scene)), signal.SIGKILL)  # its first process, as the out-of-memory killer would
    scene.run.wait_for("the gateway ended")
    scene.run.wait_for("starting again after the last complete round")
    scene.goes_on()


def test_a_killed_server_takes_its_gateway_along(consortium, tmp_path):
    scene = Scene(tmp_path)
    server = scene.server("--kit", consortium.kit, *SMALL)
    server.wait_for("listening on")
    assert gateway_of(scene)
    server.kill()
    assert scene.close() == []


@pytest.mark.parametrize(
    ("script", "options", "sentence"),
    [
        ("run_server.py", ("--address", "0.0.0.0:8443"), "provision.py server"),
        ("run_server.py", ("--address", "0.0.0.0:8443", "--kit", "nowhere"), "there is no nowhere"),
        (
            "run_server.py",
            ("--address", "0.0.0.0:8443", "--kit", "KIT", "--own-gateway"),
            "must not be reached from other machines",
        ),
        ("run_server.py", ("--own-gateway",), "give them with --kit"),
        ("run_client.py", ("--cid", "0", "--server", "192.0.2.1:8443"), "provision.py hospital"),
        ("run_client.py", ("--cid", "0", "--kit", "nowhere"), "there is no nowhere"),
    ],
    ids=str,
)
def test_beyond_this_machine_keys_are_needed(consortium, phantoms, script, options, sentence):
    options = [consortium.kit if option == "KIT" else option for option in options]
    data = ("--data-dir", phantoms) if script == "run_client.py" else ("--out", consortium.folder / "out")
    done = run_here(script, *options, *data)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_no_nginx_is_told(consortium, monkeypatch):
    from common import MedFLError
    from federation.runtime import gateway

    monkeypatch.setattr(gateway.shutil, "which", lambda *_, **__: None)
    with pytest.raises(MedFLError, match="nginx is missing"):
        gateway.find_nginx()


def test_an_own_gateway_may_stand_before_it(consortium, phantoms, tmp_path):
    """Then Flower's port itself, on loopback, speaks TLS and asks for keys."""
    kit = consortium.hospital("hospital-0")
    scene = Scene(tmp_path / "scene")
    scene.folder.mkdir()
    server = scene.server("--kit", consortium.kit, "--own-gateway", "--clients", 1, "--rounds", 1, *SMALL)
    hospital = scene.hospital("hospital-0", "--cid", 0, "--data-dir", phantoms, "--kit", kit)
    assert server.end() == 0 and hospital.end() == 0, server.output
    assert not (scene.out / "gateway.log").exists() and scene.close() == []
