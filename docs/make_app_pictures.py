"""Take the pictures of the Streamlit page: docs/app_desktop.png and docs/app_phone.png.

    python docs/make_app_pictures.py

It opens a sample on the page with Chromium (playwright is in requirements-dev.txt).
"""

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, sync_playwright

from benchmarks.serving import served
from common import ROOT, MedFLError, run_script

MODEL = ROOT / "deployment" / "app" / "samples" / "phantom_model.pth"
DESKTOP: ViewportSize = {"width": 1280, "height": 720}
PHONE: ViewportSize = {"width": 390, "height": 844}
REST = 1_000  # ms in which the page comes to rest


def open_sample(page: Page) -> None:
    """Open the first phantom and wait until the viewer and the figures show it."""
    page.get_by_role("button", name="Phantom 1").click()
    page.locator(".medfl-viewer .words", has_text="Slice").wait_for()
    page.get_by_text("All slices").wait_for()
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()


def take(page: Page, name: str) -> None:
    page.wait_for_timeout(REST)
    page.screenshot(path=ROOT / "docs" / name)
    print(f"wrote docs/{name}")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise MedFLError("there is no Chromium; install it (`apt-get install chromium`)")
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with (
        tempfile.TemporaryDirectory(prefix="medfl-pictures-") as folder,
        served(ROOT, MODEL, Path(folder) / "log") as (address, _),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        for size, name in ((DESKTOP, "app_desktop.png"), (PHONE, "app_phone.png")):
            page = browser.new_page(viewport=size, color_scheme="dark")
            page.goto(address)
            open_sample(page)
            if size == PHONE:
                page.get_by_label("Overlay").select_option("truth")
            else:
                page.keyboard.press("e")
            take(page, name)
            page.close()


if __name__ == "__main__":
    run_script(main)
