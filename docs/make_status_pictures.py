"""Take the pictures of both status pages: docs/status_server.png and docs/status_hospital.png.

    python docs/make_status_pictures.py

It makes phantoms, runs a federation of three hospitals of which one leaves, and looks at its pages with Chromium
(playwright is in requirements-dev.txt).
"""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from common import ROOT, MedFLError, run_script
from federation.runtime.processes import free_port
from phantoms.patients import make_phantoms

ROUNDS, LEAVES = 10, 5  # the federation's, and after which of them a hospital goes
WIDTH, HEIGHT = 1000, 900  # of the pictures in pixels, at most
HOSPITALS = {"mercy": 14, "hope": 12, "grace": 10}  # phantoms


def federation(folder: Path) -> None:
    """Run one whose pages lie in models/status of the folder afterwards."""
    address = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "run_server.py"), "--address", address, "--clients", "3"]
        + ["--rounds", str(ROUNDS), "--min-clients", "1", "--model", "mini", "--image-size", "64"]
        + ["--encoder", "random", "--val-fraction", "0.3", "--local-epochs", "4"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    running = {}
    for seed, (label, patients) in enumerate(HOSPITALS.items()):
        make_phantoms(folder / label, patients=patients, slices=10, size=64, seed=seed)
        command = [sys.executable, str(ROOT / "run_client.py"), "--own-data", str(folder / label)]
        running[label] = subprocess.Popen(
            [*command, "--name", label, "--server", address], cwd=folder, stdout=subprocess.DEVNULL
        )
    assert server.stdout is not None  # a pipe
    for line in server.stdout:
        if re.search(rf"round {LEAVES} of", line):
            running["grace"].send_signal(signal.SIGTERM)
    if server.wait():
        raise MedFLError(f"the server ended with {server.returncode}; start it by hand to see why")
    for hospital in running.values():
        hospital.wait()


def picture(page: Path, target: Path, place: str) -> None:
    """Write what a browser shows of a page, without the name of the place where it was made."""
    with sync_playwright() as running:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        tab.goto(page.as_uri())
        tab.evaluate(
            "place => {document.body.innerHTML = document.body.innerHTML.replaceAll(place, '')}", place
        )
        tab.screenshot(path=target)
        chromium.close()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="medfl-pictures-") as made:
        began = time.monotonic()
        federation(Path(made))
        status = Path(made) / "models" / "status"
        picture(status / "index.html", ROOT / "docs" / "status_server.png", f"{made}/")
        picture(status / "mercy.html", ROOT / "docs" / "status_hospital.png", f"{made}/")
    print(f"wrote docs/status_server.png and docs/status_hospital.png in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run_script(main)
