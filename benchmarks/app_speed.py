"""What a reader waits for in the app, and what its process needs in memory: a real server and a real
Chromium.

    python benchmarks/app_speed.py --checkpoint models/demo/transunet_centralized_best.pth [--uploads 50]

Times run from the upload until the picture stands in the page: one slice, and a volume of 40 slices at
256×256; then from a slider's move until its picture. Memory is the server's resident set after the first
volume and after the last of many uploads.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from benchmarks.serving import served
from common import ROOT, MedFLError, run_script
from dataset import load_dataset
from phantoms import make_phantoms

SLICES = 40
REPEATS = 5
REST = 3.0  # seconds


def open_files(page: Page, files: list[Path], count: int) -> float:
    """Seconds from choosing files to the picture; the page is left at the open case."""
    page.get_by_text("Try a sample").wait_for()
    began = time.perf_counter()
    page.locator("section[aria-label^='Slices of one patient'] input[type=file]").set_input_files(files)
    page.locator(f"img[alt*='of {count}, FLAIR']").wait_for()
    return time.perf_counter() - began


def close(page: Page) -> None:
    page.get_by_role("button", name="Close this case").click()
    page.get_by_text("Try a sample").wait_for()


def move(page: Page, label: str, key: str) -> float:
    """Seconds from a key on a slider until the picture is another one."""
    at_rest = page.locator("[data-testid=stApp][data-test-script-state=notRunning]")
    at_rest.wait_for()
    source = page.locator("img[alt*=FLAIR]").get_attribute("src")
    page.locator(f"input[aria-label='{label}']").focus()
    began = time.perf_counter()
    page.keyboard.press(key)
    page.wait_for_function(
        "before => document.querySelector('img[alt*=FLAIR]').getAttribute('src') !== before",
        arg=source,
        polling=10,
    )
    return time.perf_counter() - began


def resident(process: int) -> float:
    """The resident memory of a process in MiB, once it has come to rest: the page gives memory back a second
    after its use."""
    time.sleep(REST)
    line = next(
        line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024


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
            page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
            page.goto(address)
            times: dict[str, list[float]] = {
                "one slice": [],
                f"{len(files)} slices": [],
                "slice slider": [],
                "threshold slider": [],
            }
            open_files(page, files, len(files))  # the first loads the model
            close(page)
            first = resident(process)
            for _ in range(REPEATS):
                times["one slice"].append(open_files(page, files[20:21], 1))
                close(page)
                times[f"{len(files)} slices"].append(open_files(page, files, len(files)))
                times["threshold slider"] += [
                    move(page, "Threshold of the probability", key) for key in ("Home", "End")
                ]
                times["slice slider"] += [move(page, "Slice", key) for key in ("Home", "ArrowRight", "End")]
                close(page)
            for _ in range(arguments.uploads - 2 * REPEATS - 1):
                open_files(page, files, len(files))
                close(page)
            last = resident(process)
    for what, seconds in times.items():
        print(
            f"{what:18}{statistics.median(seconds):6.2f} s median, {max(seconds):.2f} s longest of "
            f"{len(seconds)}"
        )
    print(f"memory {first:.0f} MiB after the first upload, {last:.0f} MiB after {arguments.uploads}")


if __name__ == "__main__":
    run_script(main)
