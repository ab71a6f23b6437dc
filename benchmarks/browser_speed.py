"""How long a reader waits in the page that runs in the browser, and the memory that it needs, with a real Chromium
on this machine.

    python benchmarks/browser_speed.py --checkpoint models/demo/transunet_centralized_best.pth

Times run from choosing files until the page shows the scan, and until it shows the outline: for one slice, and for
40 slices of 256×256, with threads and on one thread (the page is then served without the headers that isolate it).
Further times run from a slider's move until the next frame, and from frame to frame while a stroke is drawn and until
its figures are there. The viewer draws on the processor (SwiftShader), as if there were no graphics card. Memory is
the most that the page's process ever held, after 200 slices. Sizes are those of the staged folder.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from checkpoint import load_checkpoint
from common import MedFLError, run_script
from dataset import load_dataset
from deployment.serve_browser import server
from deployment.staging import stage_browser
from phantoms.patients import make_phantoms

SLICES, MANY = 40, 200
REPEATS = 3
NUMBERS = list(range(1, 20))
THRESHOLDS = [number / 20 for number in NUMBERS]
# moves a slider to each of its values in turn; milliseconds from each move until the frame after it was drawn
MOVE = """async ([name, values]) => {
  const { tools } = document.getElementById("viewer").viewer, slider = tools[name], times = [];
  for (const value of values) {
    const began = performance.now();
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - began);
  }
  return times;
}"""
# notes when each frame is drawn, until `watched`
WATCH = """() => {
  window.frames_at = [];
  const frame = (now) => frames_at.push(now) && !window.watched && requestAnimationFrame(frame);
  window.watched = false;
  requestAnimationFrame(frame);
}"""


def open_files(page: Page, files: list[Path]) -> dict[str, float]:
    """Seconds from choosing files to the scan, and to its outline; the case stays open."""
    began = time.perf_counter()
    page.locator("#files").set_input_files(files)
    seconds = {}
    for what, words in (("scan", f"of {len(files)}"), ("outline", f"of {len(files)}:")):
        page.locator(".words", has_text=words).wait_for()
        seconds[what] = time.perf_counter() - began
    return seconds


def stroke(page: Page) -> list[float]:
    """Draw a line in the middle of the picture. Seconds from frame to frame."""
    box = page.locator("#viewer canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.keyboard.press("e")
    page.mouse.move(x, y)
    page.evaluate(WATCH)
    page.mouse.down()
    page.mouse.move(x + 60, y + 30, steps=30)
    page.mouse.up()
    page.get_by_text("pixels of the model's proposal").wait_for()  # the figures are there
    at = page.evaluate("(window.watched = true) && frames_at")
    page.keyboard.press("Control+z")  # closing would ask
    page.keyboard.press("Escape")
    return [(later - earlier) / 1000 for earlier, later in itertools.pairwise(at)]


def peak() -> float:
    """MiB: the largest resident memory that any page's process of Chromium ever had."""
    largest = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if "--type=renderer" not in (status.parent / "cmdline").read_text():
                continue
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        except OSError:  # the process has ended meanwhile
            continue
        largest = max(largest, int(line.split()[1]))
    return largest / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model, a .pth file")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise MedFLError("there is no Chromium; install it (`apt-get install chromium`)")
    checkpoint = load_checkpoint(arguments.checkpoint)
    with tempfile.TemporaryDirectory(prefix="medfl-benchmark-") as name, sync_playwright() as playwright:
        folder = Path(name)
        for half, words in ((False, "single precision"), (True, "half precision")):
            files, difference = stage_browser(checkpoint, half, folder / "staged")
            size = sum(path.stat().st_size for path in files) / 1e6
            print(
                f"{words:18}{size:6.1f} MB in all; {difference.probability:.1e} largest difference of a "
                f"probability, {difference.pixels} of {difference.of:,} mask pixels",
                flush=True,
            )
        make_phantoms(folder / "phantoms", patients=3, slices=SLICES + 8, size=256, seed=1)
        patient = max(load_dataset(folder / "phantoms").patients, key=lambda p: len(p.images))
        files = list(patient.images[:SLICES])
        many = [folder / f"many_{k}.tif" for k in range(MANY)]
        for k, path in enumerate(many):
            shutil.copyfile(files[k % len(files)], path)
        times: dict[str, list[float]] = {}
        for way in ("threads", "one thread"):
            running = server(folder / "staged", 0, isolated=way == "threads")
            threading.Thread(target=running.serve_forever, daemon=True).start()
            browser = playwright.chromium.launch_persistent_context(
                folder / f"profile-{way[0]}",
                executable_path=chromium,
                args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"],
            )
            page = browser.new_page()
            page.set_default_timeout(300_000)
            page.goto(f"http://127.0.0.1:{running.server_port}")
            page.get_by_text("Ready.").wait_for()
            print(f"{way:18}{page.locator('#status').inner_text()}", flush=True)
            for _ in range(REPEATS):
                for chosen in (files[20:21], files):
                    for what, taken in open_files(page, chosen).items():
                        times.setdefault(f"{what} of {len(chosen)} slices, {way}", []).append(taken)
                    if len(chosen) == 1:
                        page.get_by_role("button", name="Close this case").click()
                for slider, values in (("slider", NUMBERS), ("threshold", THRESHOLDS)):
                    times.setdefault(f"{'slice' if slider == 'slider' else slider} slider", []).extend(
                        ms / 1000 for ms in page.evaluate(MOVE, [slider, values])
                    )
                times.setdefault("frame of a stroke", []).extend(stroke(page))
                page.get_by_role("button", name="Close this case").click()
            if way == "one thread":
                for what, taken in open_files(page, many).items():
                    times[f"{what} of {MANY} slices, {way}"] = [taken]
                for slider, values in (("slider", NUMBERS), ("threshold", THRESHOLDS)):
                    times[f"{'slice' if slider == 'slider' else slider} slider, {MANY} slices"] = [
                        ms / 1000 for ms in page.evaluate(MOVE, [slider, values])
                    ]
                times[f"frame of a stroke, {MANY} slices"] = stroke(page)
                print(
                    f"memory            {peak():6.0f} MiB at most in the page's process, {MANY} slices",
                    flush=True,
                )
            browser.close()
            running.shutdown()
    for what, seconds in times.items():
        print(
            f"{what:34}{statistics.median(seconds):7.3f} s median, {max(seconds):.3f} s longest of "
            f"{len(seconds)}"
        )


if __name__ == "__main__":
    run_script(main)
