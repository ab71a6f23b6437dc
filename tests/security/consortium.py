"""A consortium as people make it: the server's kit and hospitals' kits,
and a federation behind the gateway."""

import http.client
import re
import ssl
from collections.abc import Iterator
from pathlib import Path

from federations import SMALL, Scene
from running import run_here


class Consortium:
    """A server's kit and hospitals' kits in one folder, made by provision.py."""

    def __init__(self, folder):
        self.folder, self.kit = folder, folder / "server"
        self.provision("server", "--host", "fl.example.org", "--kit", self.kit)

    def provision(self, *options, fine: bool = True):
        done = run_here("provision.py", *options)
        assert not fine or done.returncode == 0, done.stderr
        return done

    def hospital(self, label: str, admitted: bool = True):
        """A hospital's kit."""
        kit = self.folder / label
        self.provision("hospital", "--name", label, "--kit", kit)
        if admitted:
            self.provision("admit", kit / "hospital.pub", "--kit", self.kit)
        (kit / "ca.pem").write_bytes((self.kit / "ca.pem").read_bytes())
        return kit


class Secured(Scene):
    """A federation of three admitted hospitals that goes on for as long as the tests do."""

    def __init__(self, folder: Path, phantoms: Path):
        super().__init__(folder)
        self.consortium = Consortium(folder)
        self.kits = {label: self.consortium.hospital(label) for label in [f"hospital-{k}" for k in range(4)]}
        self.port = int(self.address.split(":")[1])
        self.phantoms = phantoms
        self.run = self.server(
            "--kit", self.consortium.kit, "--clients", 3, "--min-clients", 1, "--rounds", 1000, *SMALL
        )
        self.run.wait_for("listening on")

    def join(self, number: int, kit: Path | None = None, *options):
        return self.hospital(
            f"hospital-{number}",
            "--cid",
            number,
            "--data-dir",
            self.phantoms,
            "--kit",
            kit or self.kits[f"hospital-{number}"],
            *options,
        )

    @property
    def ca(self) -> Path:
        return self.consortium.kit / "ca.pem"

    @property
    def rounds(self) -> int:
        return len(re.findall(r"^[-\d :]+round \d+ of", self.run.output, re.M))

    def goes_on(self) -> None:
        """Wait for a round that begins and ends after this call."""
        self.run.wait_for(r"(?m)^[-\d :]+round \d+ of \d+: ", self.rounds + 2)


def tls(scene, ca: Path | None = None, version=ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca or scene.ca)
    context.minimum_version = context.maximum_version = version
    return context


def call(
    scene, method: str, path: str, body: bytes | Iterator[bytes] = b"", headers: dict | None = None
) -> int:
    """The status that the gateway answers. The pieces of a body are sent one by one, without its size."""
    connection = http.client.HTTPSConnection("127.0.0.1", scene.port, context=tls(scene), timeout=30)
    connection.request(method, path, body, headers or {})
    status = connection.getresponse().status
    connection.close()
    return status
