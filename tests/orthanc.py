"""Debian's Orthanc with its DICOMweb plugin, started on loopback for tests, benchmarks and the demonstration."""

import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import requests

from common import MedFLError

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
USER, PASSWORD = "reader", "quite-secret-48151623"
AET, OURS = "ORTHANC", "MEDFL"  # the archive's name among DIMSE's peers, and our own
DEADLINE = 60  # s, for a start


def executable() -> str | None:
    """Orthanc's program, or None where it or its plugin is not installed."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin"
    return shutil.which("Orthanc", path=path) if PLUGIN.exists() else None


def need_orthanc() -> None:
    """Raises MedFLError where there is none."""
    if executable() is None:
        raise MedFLError(
            "there is no Orthanc with DICOMweb here; install Debian's orthanc and orthanc-dicomweb"
        )


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Orthanc:
    """An Orthanc whose files lie in a folder; it may be stopped and started again. settings: more entries of
    its configuration."""

    folder: Path
    settings: dict = field(default_factory=dict)
    http: int = field(default_factory=free_port)
    dicom: int = field(default_factory=free_port)
    ours: int = field(default_factory=free_port)  # where C-MOVE sends to
    process: subprocess.Popen | None = None

    @property
    def root(self) -> str:
        """The address of Orthanc's own interface and viewer."""
        scheme = "https" if self.settings.get("SslEnabled") else "http"
        return f"{scheme}://127.0.0.1:{self.http}"

    @property
    def url(self) -> str:
        """The address of DICOMweb."""
        return f"{self.root}/dicom-web"

    @property
    def dimse(self) -> str:
        """The address for DIMSE, as `--dimse` takes it."""
        return f"{AET}@127.0.0.1:{self.dicom}"

    def start(self, wait: bool = True) -> "Orthanc":
        """Start it. wait: until it answers; a RuntimeError where it does not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = {
            "Name": "Phantoms",
            "StorageDirectory": str(self.folder / "files"),
            "IndexDirectory": str(self.folder / "index"),
            "Plugins": [str(PLUGIN)],
            "HttpPort": self.http,
            "HttpServerEnabled": True,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "DicomServerEnabled": True,
            "DicomAet": AET,
            "DicomPort": self.dicom,
            "DicomModalities": {
                OURS: {"AET": OURS, "Host": "127.0.0.1", "Port": self.ours, "AllowGet": True}
            },
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            **self.settings,
        }
        (self.folder / "orthanc.json").write_text(json.dumps(configuration), encoding="utf-8")
        program = executable()
        assert program is not None, "Orthanc is not installed"
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [program, str(self.folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT
            )
        if wait:
            self._wait()
        return self

    def _wait(self) -> None:
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            if self.process is None or self.process.poll() is not None:
                break
            try:
                with socket.create_connection(("127.0.0.1", self.http), timeout=1):
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(
            f"Orthanc did not start: {(self.folder / 'log').read_text(errors='replace')[-2000:]}"
        )

    def stop(self) -> None:
        """End it; what it stored stays."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    def kill(self) -> None:
        """End it at once, for nobody needs what it stored."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self.process = None

    close = kill

    def add(self, *paths: Path) -> None:
        """Store DICOM files, or all of folders."""
        files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        with requests.Session() as session:
            for file in filter(Path.is_file, files):
                self.request("POST", "/instances", session, data=file.read_bytes())

    def request(
        self, method: str, path: str, session: requests.Session | None = None, **more
    ) -> requests.Response:
        """A request of Orthanc's own interface, answered without an error."""
        with session or requests.Session() as opened:
            answer = opened.request(
                method, f"{self.root}{path}", auth=(USER, PASSWORD), timeout=60, verify=False, **more
            )
        answer.raise_for_status()
        return answer

    def instances(self, modality: str | None = None) -> list[dict]:
        """The tags by keyword of all instances, or those of a modality."""
        query = {"Level": "Instance", "Expand": False, "Query": {"Modality": modality} if modality else {}}
        found = self.request("POST", "/tools/find", json=query).json()
        return [
            self.request("GET", f"/instances/{one}/simplified-tags").json() | {"ID": one} for one in found
        ]

    def write_login(self, folder: Path, password: str = PASSWORD) -> Path:
        """A file with user and password, as `--login` takes it."""
        path = folder / "login.toml"
        path.touch(0o600)
        path.write_text(f'user = "{USER}"\npassword = "{password}"\n', encoding="utf-8")
        return path
