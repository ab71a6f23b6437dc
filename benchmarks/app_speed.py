"""How long a reader waits in the app, and the memory that its process needs, with a real server and a real
Chromium.

    python benchmarks/app_speed.py --checkpoint models/demo/transunet_centralized_best.pth [--uploads 50]

Times run from the upload until the viewer shows the case: one slice, and a volume of 40 slices at 256×256; then from a
key until the next slice is shown, and from a move of the threshold, or the end of a stroke, until the figures are
new. Memory is the resident set of the server, and of the browser's processes, after the first volume and after the last
of many uploads.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.serving import served
from common import ROOT, MedFLError, run_script
from dataset import load_dataset
from phantoms.patients import make_phantoms

SLICES = 40
REPEATS = 5
REST = 3.0  # seconds
WORDS, FIGURES = ".medfl-viewer .words", ".st-key-side table"
# WebGL on the processor
CHROMIUM = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def open_files(page: Page, files: list[Path], count: int) -> float:
    """Seconds from choosing files to the picture; the page is left at the open case."""
    page.get_by_text("Try a sample").wait_for()
    began = time.perf_counter()
    page.locator("section[aria-label^='Slices of one patient'] input[type=file]").set_input_files(files)
    page.locator(".medfl-viewer .words", has_text=f"of {count}:").wait_for()
    return time.perf_counter() - began


def close(page: Page) -> None:
    page.get_by_role("button", name="Close this case").click()
    page.get_by_text("Try a sample").wait_for()


def until_new(page: Page, where: str, act: Callable[[], None]) -> float:
    """Seconds from a reader's action until a text has changed."""
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()
    text = page.locator(where).inner_text()
    began = time.perf_counter()
    act()
    while page.locator(where).inner_text() == text:
        pass
    return time.perf_counter() - began


def stroke(page: Page) -> None:
    """Draw a line in the middle of the picture, or erase it if there is one."""
    box = page.locator(".medfl-viewer canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=8)
    page.mouse.up()


def resident(processes: list[int]) -> float:
    """The resident memory of processes in MiB, once they are idle: the page frees memory a second after its use."""
    time.sleep(REST)
    lines = [
        next(
            line for line in Path(f"/proc/{one}/status").read_text().splitlines() if line.startswith("VmRSS")
        )
        for one in processes
    ]
    return sum(int(line.split()[1]) for line in lines) / 1024


def of_browser(browser: Browser) -> list[int]:
    """The ids of the browser's processes."""
    return [
        one["id"]
        for one in browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model, a .pth file")
    parser.add_argument(
        "--uploads", type=int, default=50, help="uploads over which memory is watched (default 50)"
    )
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise MedFLError("there is no Chromium; install it (`apt-get install chromium`)")
    with tempfile.TemporaryDirectory(prefix="medfl-benchmark-") as folder:
        make_phantoms(Path(folder) / "phantoms", patients=3, slices=SLICES + 8, size=256, seed=1)
        patient = max(load_dataset(Path(folder) / "phantoms").patients, key=lambda p: len(p.images))
        files = list(patient.images[:SLICES])
        with (
            served(ROOT, arguments.checkpoint.resolve(), Path(folder) / "log") as (address, process),
            sync_playwright() as playwright,
        ):
            browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
            page = browser.new_page()
            page.set_default_timeout(120_000)  # a busy machine
            page.goto(address)
            times: dict[str, list[float]] = {
                "one slice": [],
                f"{len(files)} slices": [],
                "next slice": [],
                "threshold": [],
                "stroke": [],
            }
            open_files(page, files, len(files))  # the first loads the model
            close(page)
            first = resident([process]), resident(of_browser(browser))
            for _ in range(REPEATS):
                times["one slice"].append(open_files(page, files[20:21], 1))
                close(page)
                times[f"{len(files)} slices"].append(open_files(page, files, len(files)))
                for value in ("0.05", "0.95"):
                    fill = partial(page.get_by_label("Threshold").fill, value)
                    times["threshold"].append(until_new(page, FIGURES, fill))
                page.locator(".medfl-viewer canvas").focus()
                for key in ("Home", "ArrowRight", "End"):
                    times["next slice"].append(until_new(page, WORDS, partial(page.keyboard.press, key)))
                page.keyboard.press("e")
                times["stroke"].append(until_new(page, FIGURES, partial(stroke, page)))
                until_new(page, FIGURES, partial(page.keyboard.press, "Control+z"))  # closing would ask
                close(page)
            for _ in range(arguments.uploads - 2 * REPEATS - 1):
                open_files(page, files, len(files))
                close(page)
            last = resident([process]), resident(of_browser(browser))
    for what, seconds in times.items():
        print(
            f"{what:18}{statistics.median(seconds):6.2f} s median, {max(seconds):.2f} s longest of "
            f"{len(seconds)}"
        )
    for who, one, other in zip(("server", "browser"), first, last):
        print(f"{who}: {one:.0f} MiB after the first upload, {other:.0f} MiB after {arguments.uploads}")


if __name__ == "__main__":
    run_script(main)
