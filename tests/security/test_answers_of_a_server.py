"""A server with the right certificate that answers a hospital's calls with something else: a redirect to a machine of
the hospital's network, a small answer that unpacks to gigabytes, or one without end."""

import contextlib
import gzip
import importlib
import io
import sys
import threading
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.object_store import object_store_factory
from flwr.supercore.run import Run
from flwr.supernode import cli, fleet_http_connection

from borders import limits
from federation.runtime.flower import (
    CLIENT_APP,
    MOST_ANSWER,
    PYPROJECT,
    SERVER_APP,
    ask_admission,
    careful_client,
    transport,
)
from federation.runtime.hospital_kit import make_hospital_key
from federation.runtime.processes import is_healthy
from federation.runtime.programs import run_supernode

PIECE = 2**20


class Server:
    """A server that answers each call with `answer`; asked: the paths of the calls."""

    def __init__(self, answer):
        self.asked: list[str] = []
        mine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.do_GET()

            def do_GET(self) -> None:
                mine.asked.append(self.path)
                with contextlib.suppress(OSError):  # the hospital hangs up
                    answer(self)

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"127.0.0.1:{self.server.server_port}"


def fine(handler) -> None:
    handler.send_response(200)
    handler.end_headers()


def pull(server: Server):
    with careful_client().from_server_address(server.address, **transport(None), interceptors=[]) as client:
        return client.PullMessages(PullMessagesRequest())


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_hospital_follows_no_redirect(code):
    inside = Server(fine)

    def elsewhere(handler) -> None:
        handler.send_response(code)
        handler.send_header("Location", f"http://{inside.address}/tools/shutdown")
        handler.end_headers()

    server = Server(elsewhere)
    with pytest.raises(httpx.HTTPStatusError):
        pull(server)
    host, port = server.address.split(":")
    assert is_healthy(host, int(port)) is None
    assert len(server.asked) == 2 and inside.asked == []


def test_a_compressed_answer_is_not_unpacked():
    def packed(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        handler.wfile.write(gzip.compress(bytes(PIECE)))

    with pytest.raises(httpx.DecodingError, match="compressed"):
        pull(Server(packed))


@pytest.mark.parametrize("status", [200, 400])
def test_an_answer_without_end_is_cut(status, tmp_path, monkeypatch):
    sent = []

    def endless(handler) -> None:
        handler.send_response(status)
        handler.end_headers()
        while len(sent) < 10 * MOST_ANSWER // PIECE:
            handler.wfile.write(bytes(PIECE))
            sent.append(PIECE)

    with pytest.raises(httpx.DecodingError, match="takes more than"):
        pull(Server(endless))
    assert sum(sent) < 3 * MOST_ANSWER  # some of it lies in the sockets
    make_hospital_key(tmp_path, "mercy")
    monkeypatch.setattr("federation.runtime.flower.transport", lambda _: transport(None))
    assert ask_admission(Server(endless).address, tmp_path / "ca.pem", tmp_path / "hospital.key") == ""


def test_an_answer_within_the_bounds_is_read():
    assert not pull(Server(fine)).messages_list


class Began(BaseException):
    pass


@pytest.fixture
def loop(monkeypatch):
    """Flower's loop of a hospital, as MedFL's program runs it."""

    def began() -> None:
        raise Began

    loop = importlib.import_module("flwr.supernode.start_client_internal")
    changed = [(loop, name) for name in ("time", "get_fused_config_from_fab", "pull_objects")]
    changed += [(object_store_factory, "InMemoryObjectStore"), (fleet_http_connection, "FleetHttpClient")]
    for where, name in (*changed, (sys, "argv")):
        monkeypatch.setattr(where, name, getattr(where, name))  # put back afterwards
    monkeypatch.setattr(cli, "flower_supernode", began)
    with pytest.raises(Began):
        run_supernode(3.0, [])
    return loop


def test_the_program_of_a_hospital_asks_with_this_client(loop):
    assert fleet_http_connection.FleetHttpClient.__name__ == "CarefulClient"


def test_the_program_of_a_hospital_writes_no_tree_out_in_full(loop):
    """Each object of this message names the next one twice, and 20 of them make a million."""
    root = tree = ObjectTree(object_id=f"{0:064x}")
    for number in range(1, 20):
        tree.children.add(object_id=f"{number:064x}")
        tree = tree.children.add(object_id=f"{number:064x}")
    store = object_store_factory.ObjectStoreFactory().store()
    with pytest.raises(ValueError, match="named twice"):
        store.preregister(1, root)


def test_the_program_of_a_hospital_stops_fetching_at_the_bound(loop, monkeypatch):
    monkeypatch.setattr(limits, "BUDGET", PIECE)
    with pytest.raises(Began):
        run_supernode(3.0, [])
    asked = []

    def piece(name: str) -> bytes:
        asked.append(name)
        return bytes(PIECE)

    few, many = ["a"], [str(number) for number in range(100)]
    assert loop.pull_objects(few, pull_object_fn=piece) == {"a": bytes(PIECE)}
    with pytest.raises(ValueError, match="takes more than"):
        loop.pull_objects(many, pull_object_fn=piece)
    assert len(asked) < 20


def test_the_program_of_a_hospital_unpacks_nothing_of_a_bundle(loop):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        pyproject = PYPROJECT.format(version="1.0.0", server=SERVER_APP, client=CLIENT_APP).encode()
        archive.writestr("pyproject.toml", pyproject + b"#" * 20 * PIECE)
    assert len(packed.getvalue()) < PIECE
    tracemalloc.start()
    configuration = loop.get_fused_config_from_fab(packed.getvalue(), Run.create_empty(1))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert configuration == {} and most < PIECE
