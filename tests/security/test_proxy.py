"""A hospital behind a proxy: a real, small one (tinyproxy), right or wrong, told at --check; --no-proxy."""

import shutil
import socket
import subprocess

import pytest
from federations import SMALL, Scene, children
from running import run_here

from federation.runtime.processes import free_port

pytestmark = [pytest.mark.slow]
TINYPROXY, NGINX = shutil.which("tinyproxy"), shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
if not (TINYPROXY and NGINX):
    pytest.skip(
        "no tinyproxy or no nginx: `apt-get install tinyproxy-bin nginx-light`", allow_module_level=True
    )


def own_address() -> str:
    """An address of this machine that is not loopback: no proxy is asked on the way to those."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address besides loopback")
        return probe.getsockname()[0]


class Proxy:
    """A tinyproxy that allows CONNECT to one port."""

    def __init__(self, folder, allowed: int):
        self.log, self.port = folder / f"proxy-{allowed}.log", free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        settings = folder / f"proxy-{allowed}.conf"
        settings.write_text(
            f'Port {self.port}\nListen 127.0.0.1\nConnectPort {allowed}\nLogFile "{self.log}"\nLogLevel Connect\n'
        )
        self.process = subprocess.Popen([str(TINYPROXY), "-d", "-c", str(settings)], cwd="/")
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def test_through_a_proxy(scene: Scene, consortium, phantoms, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    host = own_address()
    scene.address = f"{host}:{free_port()}"
    port = int(scene.address.split(":")[1])
    consortium.provision("server", "--host", host, "--days", 10, "--renew", "--kit", consortium.kit)
    monkeypatch.setenv(
        "https_proxy", "http://127.0.0.1:9"
    )  # the server's own gateway is reached all the same
    options = ("--clients", 1, "--rounds", 1, *SMALL)
    server = scene.server("--kit", consortium.kit, *options)
    server.wait_for("listening on")
    cid = ("--cid", 0, "--data-dir", phantoms, "--kit", consortium.hospital("hospital-0"))
    right, narrow = Proxy(scene.folder, port), Proxy(scene.folder, 443)
    try:
        for proxy in ("http://127.0.0.1:9", narrow.address):
            monkeypatch.setenv("https_proxy", proxy)
            done = run_here("run_client.py", "--server", scene.address, *cid, "--check")
            assert done.returncode == 2 and f"reached through the proxy {proxy}" in done.stdout, done.stdout
            assert f"it has to allow CONNECT to port {port}" in done.stderr and "--no-proxy" in done.stderr
        direct = scene.hospital("direct", *cid, "--check", "--no-proxy")
        assert direct.end() == 0 and "through the proxy" not in direct.output, direct.output
        monkeypatch.setenv("https_proxy", right.address)
        hospital = scene.hospital("hospital-0", *cid)
        assert hospital.end() == 0 and server.end() == 0, hospital.output + server.output
        assert f"is reached through the proxy {right.address}" in hospital.output
        assert (
            "the server's certificate ends on" in hospital.output and "ask the coordinator" in hospital.output
        )
        assert right.log.read_text().count(f"CONNECT {scene.address}") > 5
        assert not [child for child in children(scene.folder) if "supernode" in child]
    finally:
        right.stop()
        narrow.stop()
