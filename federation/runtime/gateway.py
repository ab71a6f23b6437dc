"""The gateway: an nginx in front of Flower's SuperLink that lets only hospitals' calls through."""

import shutil
import string
import subprocess
import time
from pathlib import Path

from common import ROOT, MedFLError
from federation.runtime.kit import CA
from federation.runtime.processes import Child, is_healthy, join_address

TEMPLATE = ROOT / "deployment" / "gateway" / "nginx.conf.template"
START_TIME = 20.0  # seconds for nginx to answer
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # "all addresses of this machine", and one of these


def find_nginx() -> str:
    """The path of nginx. Raises MedFLError if there is none."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")
    if found is None:
        raise MedFLError(
            "nginx is missing, and hospitals on other machines reach the server through it; install it (for "
            "example `apt-get install nginx-light`), or run your own with --own-gateway and deployment/gateway"
        )
    return found


def write_configuration(
    host: str, port: int, superlink_port: int, kit: Path, folder: Path, access_log: Path
) -> Path:
    """Write the gateway's configuration for this address and kit into `folder`; returns its path."""
    values = {
        "folder": folder,
        "log": folder / "nginx.log",
        "access_log": access_log,
        "superlink_port": superlink_port,
        "listen": join_address(host, port),
        "kit": kit.resolve(),
    }
    if odd := [str(value) for value in values.values() if set(str(value)) & set(" ;{}\"'$\\\n")]:
        raise MedFLError(
            f"nginx can't use the path {odd[0]}; choose --kit, --out and TMPDIR without blanks and quotes"
        )
    path = folder / "nginx.conf"
    path.write_text(
        string.Template(TEMPLATE.read_text(encoding="utf-8")).safe_substitute(values), encoding="utf-8"
    )
    return path


def start_gateway(
    host: str, port: int, superlink_port: int, kit: Path, folder: Path, access_log: Path
) -> Child:
    """Start nginx on HOST:PORT in front of the SuperLink, and wait until it answers. Raises MedFLError if it is
    missing, ends or does not answer."""
    nginx, log = find_nginx(), folder / "nginx.log"
    access_log.parent.mkdir(parents=True, exist_ok=True)
    configuration = write_configuration(host, port, superlink_port, kit, folder, access_log)
    tried = subprocess.run(
        [nginx, "-t", "-q", "-p", str(folder), "-e", str(log), "-c", str(configuration)],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        raise MedFLError(f"nginx refuses its configuration; it says: {tried.stderr.strip().splitlines()[0]}")
    child = Child(
        "gateway", [nginx, "-p", str(folder), "-e", str(log), "-c", str(configuration)], folder, log
    )
    until = time.monotonic() + START_TIME
    while not is_healthy(ANY.get(host, host), port, ca=kit / CA):
        if child.exit_code is not None or time.monotonic() > until:
            child.stop()
            raise MedFLError(
                f"nginx did not start at {join_address(host, port)}; its last lines:\n{child.last_words()}"
            )
        time.sleep(0.1)
    return child
