"""Take the pictures of the page in the browser: docs/browser_desktop.png, browser_planes.png, browser_phone.png
and browser_two.png.

    python docs/make_browser_pictures.py
    python docs/make_browser_pictures.py --all FOLDER

It stages the page with the model that comes with MedFL, opens a phantom in Chromium (playwright is in
requirements-dev.txt) and photographs it. With --all it also writes seven states at three sizes into a folder, to
look through.
"""

import argparse
import shutil
import tempfile
import threading
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from checkpoint import load_checkpoint
from common import ROOT, MedFLError, run_script
from deployment.serve_browser import server
from deployment.staging import stage_browser
from runs.models import PHANTOM_MODEL

SIZES = {"desktop": (1280, 720), "large": (1920, 1080), "phone": (390, 844)}
STATES = ("empty", "axial", "planes", "3-D", "probability", "edit", "two")
IN_DOCS = {
    "browser_desktop": ("desktop", "axial"),
    "browser_planes": ("desktop", "planes"),
    "browser_phone": ("phone", "axial"),
    "browser_two": ("desktop", "two"),
}
SAMPLES = PHANTOM_MODEL.parent
PIXEL, BETWEEN = "0.9", "8"  # mm
TURNED = "() => document.getElementById('viewer').viewer.nv.setRenderAzimuthElevation(110, 15)"


def show(page: Page, state: str) -> None:
    """Bring the page, where no case is open, to one of `STATES`."""
    if state == "empty":
        return
    page.get_by_role("button", name="Phantom 1").click()
    page.locator("#figures tr").first.wait_for()
    if state in ("planes", "3-D"):  # a sample tells no sizes, and slices as thick as a pixel look flat
        page.get_by_text("Pixel size in mm").click()
        page.get_by_label("Side of a pixel").fill(PIXEL)
        page.get_by_label("Distance of slices").fill(BETWEEN)
        page.keyboard.press("Tab")
        page.locator("#figures", has_text="cm³").wait_for()
    if state == "planes":
        page.get_by_role("button", name="Three planes").click()
    elif state == "3-D":
        page.get_by_role("button", name="3-D").click()
        page.evaluate(TURNED)
    elif state == "probability":
        page.get_by_label("Overlay").select_option("probability")
    elif state == "edit":
        page.get_by_role("button", name="Edit").click()
    elif state == "two":
        page.get_by_text("Side by side").click()
        page.locator("#date").set_input_files(SAMPLES / "phantom_2.zip")
        page.locator(".place").wait_for()
        page.locator("#status", has_text="Ready.").wait_for()
    page.mouse.move(0, 0)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def take(browser: Browser, address: str, size: str, state: str, target: Path) -> None:
    """Write a picture of the page in this state, in a window of this size."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(300_000)
    page.goto(address)
    page.locator("#status", has_text="Ready.").wait_for()
    show(page, state)
    page.screenshot(path=target)
    page.close()
    print(f"wrote {target}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="also write all states at all sizes here")
    arguments = parser.parse_args()
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        raise MedFLError("there is no Chromium; install it (`apt-get install chromium`)")
    pictures = {ROOT / "docs" / f"{name}.png": which for name, which in IN_DOCS.items()}
    if arguments.all:
        arguments.all.mkdir(parents=True, exist_ok=True)
        pictures |= {
            arguments.all / f"{size}_{state}.png": (size, state) for size in SIZES for state in STATES
        }
    with tempfile.TemporaryDirectory(prefix="medfl-pictures-") as folder, sync_playwright() as running:
        stage_browser(load_checkpoint(PHANTOM_MODEL), folder=Path(folder) / "page")
        with server(Path(folder) / "page", 0) as serving:
            threading.Thread(target=serving.serve_forever, daemon=True).start()
            arguments_of_chromium = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
            browser = running.chromium.launch(executable_path=path, args=arguments_of_chromium)
            for target, (size, state) in pictures.items():
                take(browser, f"http://127.0.0.1:{serving.server_port}", size, state, target)
            browser.close()
            serving.shutdown()


if __name__ == "__main__":
    run_script(main)
