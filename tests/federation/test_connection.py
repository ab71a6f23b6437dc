"""A hospital's connection: what is waited out and what ends it, what it asks for, and what it compares."""

import contextlib
import io
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from datetime import timedelta
from types import SimpleNamespace

import pytest
from running import run_here

from common import MedFLError
from federation.hospital.identity import ENDED, WAITING
from federation.runtime import asking, bundle, connection, expiry, processes, proxies
from federation.runtime.admissions import admit
from federation.runtime.certificates import make_authority, make_server_certificate
from federation.runtime.hospital_kit import hold_kit, make_hospital_key
from federation.runtime.processes import is_healthy, is_loopback, no_proxy


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit")
    make_authority(folder)
    make_server_certificate(folder, ["fl.example.org"], 10)
    return folder


def answering(what) -> int:
    """The port of a server that does this with each connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            near, _ = listener.accept()
            with near:
                what(near)

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def closes(near):
    pass


def resets(near):
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def says(content: bytes):
    def what(near):
        near.recv(65536)
        near.sendall(content)

    return what


def alert(number: int):
    return says(b"\x15\x03\x03\x00\x02\x02" + bytes([number]))


@pytest.mark.parametrize(
    "what", [closes, says(b""), resets, says(b"\x16\x03\x03\x00\x7a\x02\x00"), alert(80)], ids=range(5)
)
def test_a_connection_that_is_cut_is_waited_out(kit, what):
    assert is_healthy("127.0.0.1", answering(what), ca=kit / "ca.pem") is False


@pytest.mark.parametrize(
    "what", [alert(70), alert(40), alert(112), says(b"HTTP/1.1 400 Bad Request\r\n\r\n")], ids=range(4)
)
def test_an_alert_is_final(kit, what):
    with pytest.raises(MedFLError, match="does not speak TLS 1.3"):
        is_healthy("127.0.0.1", answering(what), ca=kit / "ca.pem")


@pytest.fixture
def watch(monkeypatch, tmp_path):
    made = connection.Watch("127.0.0.1:1", "127.0.0.1", 1, None, tmp_path, 0.2)
    for name in ("LOOK", "PARTING"):
        monkeypatch.setattr(connection, name, 0.01)
    monkeypatch.setattr(
        connection, "Connection", lambda *_: SimpleNamespace(broken=False, began=0.0, stop=lambda: None)
    )
    monkeypatch.setattr(connection, "is_healthy", lambda *_, **__: True)
    return made


def test_another_version_is_waited_for_and_not_for_ever(watch):
    for name in (WAITING, ENDED):
        (watch.folder / name).write_text(json.dumps({"exit": 2, "sentence": "another version"}))
    with pytest.raises(MedFLError, match="another version"):
        watch.run()
    (watch.folder / WAITING).unlink()  # the server came back with the same version, and ended
    assert watch.run() == (2, "another version")


def test_what_a_server_makes_the_connection_write_does_not_fill_the_disk(watch, monkeypatch):
    monkeypatch.setattr(processes, "MOST_LOG", 10)
    log = watch.folder / "supernode.log"
    log.write_text("a message whose name takes megabytes")
    for name in (WAITING, ENDED):  # so that it ends
        (watch.folder / name).write_text(json.dumps({"exit": 2, "sentence": "another version"}))
    with pytest.raises(MedFLError, match="another version"):
        watch.run()
    assert log.read_text() == "" and log.with_name("supernode.log.1").exists()


def test_an_answer_letter_by_letter_holds_nothing_up(watch, monkeypatch):
    """The hospital would neither notice the end nor rotate the log of its connection meanwhile."""
    over, asked = threading.Event(), []

    def drips(near):
        asked.append(near.recv(65536))
        near.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not over.wait(0.05):
            near.sendall(b"a")

    monkeypatch.setattr(connection, "is_healthy", is_healthy)
    monkeypatch.setattr(asking, "ANSWER_TIME", 0.3)
    watch.port = answering(drips)
    looks = [threading.Thread(target=watch._health, daemon=True) for _ in range(2)]
    for look in looks:
        look.start()
        look.join(20)
    late = [look.is_alive() for look in looks]
    over.set()
    assert late == [False, False] and len(asked) == 1


@pytest.mark.parametrize("question", ["tell_hospital", "ask_admission"])
def test_a_question_without_an_answer_holds_nothing_up(watch, monkeypatch, question):
    over, looks = threading.Event(), []
    monkeypatch.setattr(asking, "ANSWER_TIME", 0.1)
    monkeypatch.setattr(connection, "tell_hospital", lambda *_: None)
    monkeypatch.setattr(connection, "ask_admission", lambda *_: "admitted")
    monkeypatch.setattr(connection, question, lambda *_: over.wait(60))
    watch.kit = watch.folder

    def look():
        watch._look_at_server()
        watch.connection.broken, watch.connection.refused = True, False
        watch._look_at_children()
        looks.append(watch.restarts)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(10)
    over.set()
    assert looks == [1]


def test_no_connection_is_counted_as_broken_while_no_server_is_there(watch, monkeypatch):
    monkeypatch.setattr(connection, "is_healthy", lambda *_, **__: None)
    watch.connection, watch.was_there = SimpleNamespace(broken=True, refused=False, stop=lambda: None), True
    with pytest.raises(connection.ServerGone):
        watch.run()
    assert watch.restarts == 0


def test_a_server_that_wants_keys_says_so_at_once(monkeypatch):
    monkeypatch.setattr(connection, "speaks_tls", lambda *_: True)
    with pytest.raises(MedFLError, match="with --kit"):
        connection.require_kit("fl.example.org", 8443, None)


def test_a_name_that_only_a_proxy_knows_is_another_machine(no_proxies):
    with pytest.raises(MedFLError, match="is not known here"):
        is_loopback("fl.nowhere.invalid")
    no_proxies.setenv("https_proxy", "http://proxy.invalid:8080")
    assert not is_loopback("fl.nowhere.invalid")


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_key_is_held_by_one_process(tmp_path):
    (tmp_path / "hospital.key").write_text("x")
    held = hold_kit(tmp_path)
    assert held is not None and hold_kit(tmp_path) is None
    held.close()
    again = hold_kit(tmp_path)
    assert again is not None


def test_the_hash_is_of_what_runs_at_a_hospital(monkeypatch):
    """A comment in a file of the server only changes the bundle and not the hash."""
    sent, before = bundle.make_bundle(), bundle.hospital_code()
    assert bundle.code_in(sent) == before and bundle.code_in(b"no bundle") != before
    content = bundle._content
    for changed, same in {"federation/server/rounds.py": True, "training.py": False}.items():
        monkeypatch.setattr(
            bundle, "_content", lambda name, changed=changed: content(name) + b"# x\n" * (name == changed)
        )
        other = bundle.make_bundle.__wrapped__()
        assert other != sent and (bundle.code_in(other) == before) is same, changed


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_bundle_that_unpacks_to_more_than_it_says_takes_no_memory(kind):
    """A hospital looks into what the server sends, whatever that is."""
    name, file = bundle.hospital_files()[0], io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr(name, bytes(200 << 20))
    content = bytearray(file.getvalue())
    for place in (22, content.rindex(b"PK\1\2") + 24):
        struct.pack_into("<I", content, place, 1000)
    tracemalloc.start()
    assert bundle.code_in(bytes(content)) != bundle.hospital_code()
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("no_proxy", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_a_proxy_is_told_without_its_password_and_can_be_left_out(no_proxies, capsys):
    no_proxies.setenv("https_proxy", "http://user:secret@proxy:8080")
    proxies.tell_proxies("fl.example.org")
    said = capsys.readouterr().out
    assert "proxy:8080" in said and "secret" not in said
    no_proxies.setenv("no_proxy", "")
    no_proxies.setenv("NO_PROXY", "")
    proxies.go_direct("fl.example.org")
    assert proxies.proxy_for("fl.example.org") is None


def test_a_proxy_that_is_none_of_http_is_not_used(no_proxies, capsys):
    no_proxies.setenv("all_proxy", "socks://127.0.0.1:1080/")
    proxies.leave_out_odd()
    assert "not an HTTP proxy" in capsys.readouterr().out and "all_proxy" not in os.environ
    proxies.tell_proxies("fl.example.org")
    assert not capsys.readouterr().out


def test_what_this_machine_says_to_itself_goes_through_no_proxy(no_proxies):
    """Debian gives a machine's own name the address 127.0.1.1. Without keys weights are not encrypted, and a proxy
    would have got them."""
    no_proxies.setenv("http_proxy", "http://proxy:8080")
    no_proxies.setenv("https_proxy", "http://proxy:8080")
    no_proxies.setenv("no_proxy", "")
    no_proxies.setenv("NO_PROXY", "")
    done = run_here("run_client.py", "--server", "127.0.1.1:9", "--cid", -1)
    assert done.returncode == 2 and "numbered from 0" in done.stderr, done.stderr
    assert proxies.proxy_for("127.0.1.1") is None and proxies.proxy_for("fl.example.org")


def test_addresses_that_need_no_proxy_are_read_in_both_spellings(no_proxies):
    no_proxies.setenv("no_proxy", "fl.example.org")
    assert no_proxy()["NO_PROXY"] == no_proxy()["no_proxy"] == "fl.example.org,127.0.0.1,localhost,::1"


def test_the_server_is_looked_for_on_the_way_that_flower_takes(no_proxies, kit):
    """Through a proxy, by CONNECT, and not where the address is this machine's own."""
    asked = []

    def proxy(near):
        asked.append(near.recv(65536).split(b"\r\n")[0])
        near.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    no_proxies.setenv("https_proxy", f"http://127.0.0.1:{answering(proxy)}")
    assert is_healthy("fl.example.org", 8443, ca=kit / "ca.pem") is None
    assert asked == [b"CONNECT fl.example.org:8443 HTTP/1.1"] or asked == [
        b"CONNECT fl.example.org:8443 HTTP/1.0"
    ]
    assert is_healthy("127.0.0.1", answering(closes), ca=kit / "ca.pem") is False and len(asked) == 1


def test_certificates_and_admissions_that_end_soon_are_told(kit, tmp_path, capsys):
    told = expiry.tell_kit(kit)
    assert len(told) == 1 and told[0].startswith("the server's certificate ends on")
    make_authority(tmp_path)
    make_server_certificate(tmp_path, ["fl.example.org"], 365)
    assert expiry.tell_kit(tmp_path) == []
    for label, days in {"mercy": 5, "hope": 300}.items():
        admit(tmp_path, make_hospital_key(tmp_path / label, label), days)
    assert [text.split(" ends")[0] for text in expiry.tell_kit(tmp_path)] == ["mercy's admission"]
    assert "renew it before" in capsys.readouterr().out


def test_a_hospital_is_told_of_certificates_that_end_soon(kit, monkeypatch, capsys):
    """Of the server's, as the server shows it, and of the authority in its own kit."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(kit / "server.pem", kit / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], True) as near:
                near.recv(65536)
                near.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    expiry.tell_hospital(kit, f"127.0.0.1:{listener.getsockname()[1]}")
    said = capsys.readouterr().out
    assert said.count("ends on") == 1 and "the server's certificate ends on" in said
    assert "ask the coordinator" in said
    expiry.tell_hospital(kit, "127.0.0.1:9")  # nobody is there
    assert not capsys.readouterr().out
    monkeypatch.setattr(expiry, "SOON", timedelta(days=20_000))
    expiry.tell_hospital(kit, "127.0.0.1:9")
    assert "the authority in" in capsys.readouterr().out


def test_a_hospitals_lines_are_on_its_terminal_and_on_its_page(tmp_path):
    code = (
        "import sys; from pathlib import Path; from federation.hospital.identity import Identity\n"
        "from federation.hospital.status import shown; from federation.protocol.log import say\n"
        "folder = Path(sys.argv[1])\n"
        "who = Identity(label='mercy', cid=None, data=folder, device='cpu', medfl='1', models=folder, code='c')\n"
        "with shown(who, folder): say('round 1 <b>')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=300)
    assert "round 1 <b>" in done.stdout, done.stderr
    assert "round 1 &lt;b&gt;" in (tmp_path / "status" / "mercy.html").read_text(encoding="utf-8")
