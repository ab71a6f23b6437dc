"""The Streamlit page's viewer: what travels, and a reader's hands in a real Chromium."""

import base64
import gzip
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable

import numpy as np
import pytest
from pages import dragged, place, shown
from PIL import Image
from running import ROOT

from benchmarks.serving import served
from common import MedFLError
from dataset import load_dataset
from deployment.app.scan_viewer import codes_of, mask_of
from inference import to_mask

MODEL = ROOT / "deployment" / "app" / "samples" / "phantom_model.pth"
VIEWER = ROOT / "deployment" / "viewer"
IDLE = "[data-testid=stApp][data-test-script-state=notRunning]"  # the page is made, and nothing runs
VIEW = "document.querySelector('.medfl-viewer').viewer"


def test_every_threshold_gives_the_mask_of_the_probability_itself():
    thresholds = np.arange(5, 100, 5) / 100
    at = thresholds.astype(np.float32)
    beside = [np.nextafter(at, np.float32(side)) for side in (0, 1)]
    probability = np.concatenate(
        [at, *beside, np.float32([0, 1]), np.random.default_rng(0).random(10_000, np.float32)]
    )
    seen = (codes_of(probability) / 200).astype(np.float32)  # as the browser has it
    assert abs(seen - probability).max() <= 1 / 200 + 1e-6
    for threshold in thresholds:
        assert np.array_equal(to_mask(seen, threshold), to_mask(probability, threshold)), threshold


def sent(bits: bytes) -> str:
    return base64.b64encode(gzip.compress(bits)).decode()


def test_a_drawn_mask_arrives_and_anything_else_is_refused():
    mask = np.random.default_rng(0).integers(0, 2, (3, 5, 7), np.uint8) * 255
    assert np.array_equal(mask_of(sent(np.packbits(mask > 0).tobytes()), mask.shape), mask)
    for wrong in (
        "x",
        "",
        "é",
        sent(b"1"),
        sent(bytes(10_000_000)),
        base64.b64encode(b"no gzip").decode(),
        None,
        3,
    ):
        with pytest.raises(MedFLError, match="draw once more"):
            mask_of(wrong, mask.shape)


def test_the_committed_viewer_is_what_its_modules_make(tmp_path):
    node = shutil.which("node")
    if node is None or not (VIEWER / "node_modules").is_dir():
        pytest.skip("no Node.js, or no libraries of the viewer: install it, then `make browser-libraries`")
    subprocess.run([node, "build.js", tmp_path], cwd=VIEWER, check=True, timeout=120)
    for made in tmp_path.iterdir():
        committed = VIEWER / "dist" / made.name
        assert made.read_bytes() == committed.read_bytes(), (
            f"{made.name}: `npm run build` in deployment/viewer"
        )
    assert len(list(tmp_path.iterdir())) == 3


# ---- a real server and a real Chromium ----


@pytest.fixture(scope="module")
def patient(phantoms, tmp_path_factory):
    """A hospital's folder with one prepared patient, who has no masks yet."""
    out = tmp_path_factory.mktemp("prepared")
    one = load_dataset(phantoms, progress=False).patients[1]
    folder = out / "without_masks" / one.name
    folder.mkdir(parents=True)
    for image in one.images:
        shutil.copy(image, folder)
    about = {
        "version": 1,
        "spacing_mm": [5.0, 1.0, 1.0],
        "slice_positions_mm": [5.0 * k for k in range(len(one.images))],
    }
    (folder / "volume.json").write_text(json.dumps(about))
    return out, one


@pytest.fixture(scope="module")
def address(patient, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFL_DATA", str(patient[0]))
        with served(ROOT, MODEL, tmp_path_factory.mktemp("app") / "log") as (where, _):
            yield where


@pytest.fixture
def visit(browser, address):
    """A function: another reader's page. None asks another host or needs what the policy forbids."""
    made = []

    def open_page(**options):
        page = browser.new_page(viewport={"width": 1280, "height": 720}, **options)
        page.asked, page.refused = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.refused.append(str(error)))
        page.on(
            "console", lambda line: page.refused.append(line.text) if "Content Sec" in line.text else None
        )
        page.set_default_timeout(60_000)
        page.goto(address)
        page.get_by_text("Try a sample").wait_for()
        made.append(page)
        return page

    yield open_page
    for page in made:
        own = (address, "data:", "blob:", address.replace("http", "ws"))
        assert [url for url in page.asked if not url.startswith(own)] == []
        assert len({url for url in page.asked if url.startswith(f"{address}/media/")}) <= 1  # the page's icon
        assert page.refused == []
        page.close()


def side(page):
    return page.locator(".st-key-side")


def mask(page) -> np.ndarray:
    """The mask that the viewer shows, (S, H, W) bool."""
    values, shape = page.evaluate("""() => {
      const { viewer } = document.querySelector(".medfl-viewer"), { count, height, width } = viewer.opened;
      return [[...viewer.mask()], [count, height, width]];
    }""")
    return np.array(values).reshape(shape) > 0


def violations(page) -> list:
    """What axe finds on the page as it is."""
    axe = VIEWER / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.is_file():
        pytest.skip("no libraries of the viewer: `make browser-libraries`")
    # off buttons: Streamlit lays their hints outside of every landmark, while they are shown
    page.mouse.move(640, 5)
    page.locator("[data-testid=stTooltipContent]").wait_for(state="detached")
    page.locator(IDLE).wait_for()
    page.evaluate(axe.read_text())
    found = page.evaluate("axe.run()")["violations"]
    return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]


def eventually(found: Callable[[], object], wanted: object) -> None:
    """Wait until this is found."""
    until = time.monotonic() + 30
    while (last := found()) != wanted:
        assert time.monotonic() < until, last


def changed(page, number: int) -> None:
    """Wait until the page's figures count so many changed pixels."""
    side(page).get_by_text(f"{number:,} pixel{'' if number == 1 else 's'} of the proposal changed").wait_for()


@pytest.mark.slow
def test_another_date_stands_beside_the_case_and_goes_with_it(visit, patient):
    _, one = patient
    page = visit()
    page.get_by_role("button", name="Phantom 1").click()
    page.locator(".words", has_text="Slice").wait_for()
    before = mask(page)
    page.locator(IDLE).wait_for()
    side(page).get_by_text("Side by side").click()
    field = side(page).locator("section[aria-label^='Another date'] input[type=file]")
    field.set_input_files(one.images)
    page.locator(".place", has_text=f"of {len(one.images)}").wait_for()
    assert page.evaluate(f"{VIEW}.beside.opened.label").startswith("Other date")
    assert page.evaluate(f"{VIEW}.beside.nv.drawBitmap.some((value) => value > 0)"), (
        "the model's mask lies on it"
    )
    page.evaluate(f"{VIEW}.goTo(0)")
    page.locator(".place", has_text=f"slice 1 of {len(one.images)}").wait_for()
    assert np.array_equal(mask(page), before)
    page.get_by_role("button", name="Close this case").click()
    page.get_by_role("button", name="Phantom 2").click()
    page.locator(".words", has_text="Slice").wait_for()
    assert page.locator(".beside").count() == 0


@pytest.mark.slow
def test_a_stroke_reaches_the_figures_and_the_saved_truth(visit, patient):
    out, one = patient
    page = visit()
    page.locator(".st-key-open-patient button").click()
    shown(page, len(one.images))
    assert page.locator(".medfl-viewer canvas").bounding_box()["height"] > 400  # of 720
    page.mouse.move(*place(page, 30, 30))
    page.evaluate(f"{VIEW}.goTo(3)")
    side(page).get_by_text("Slice 4 (").wait_for()
    page.mouse.wheel(0, -100)
    number = page.evaluate(f"{VIEW}.slice")
    assert number in (2, 4)
    side(page).get_by_text(f"Slice {number + 1} (").wait_for()

    expected = mask(page)
    before = expected.copy()
    page.keyboard.press("e")
    page.get_by_label("Size").fill("1")
    dragged(page, place(page, 4, 10), place(page, 4, 19))
    expected[number, 4, 10:20] = True
    changed(page, int((expected != before).sum()))
    assert np.array_equal(mask(page), expected)
    assert side(page).get_by_text(f"{expected.sum():,} pixels").first.is_visible()
    page.keyboard.press("Control+z")
    changed(page, 0)
    page.keyboard.press("Control+y")
    changed(page, 10)

    page.mouse.click(*place(page, 6, 10))  # and to the close at once: the last stroke counts
    page.get_by_role("button", name="Close this case").click()
    page.get_by_role("button", name="Stay").click()
    expected[number, 6, 10] = True
    changed(page, int((expected != before).sum()))

    name = side(page).get_by_label("Your name, for the log")

    def typed() -> str:
        page.locator(IDLE).wait_for()  # while the page is made again, the field is there twice
        name.fill("Dr. Ada")
        name.press("Enter")
        page.locator(IDLE).wait_for()
        return name.input_value()

    eventually(
        typed, "Dr. Ada"
    )  # what is typed while the page is made again after "Stay" is lost with its field
    side(page).get_by_role("button", name="Save as truth").click()
    side(page).get_by_text("Saved in").wait_for()
    files = [out / one.name / f"{image.stem}_mask.tif" for image in one.images]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]) > 0, expected)
    page.get_by_label("Overlay").select_option("truth")  # which the viewer has now
    page.get_by_text("Yellow: both.").wait_for()
    assert violations(page) == []


@pytest.mark.slow
def test_what_the_page_changes_is_seen_and_readers_are_apart(visit, address, patient, picture):
    page, other = visit(color_scheme="dark"), visit()
    page.locator(".st-key-open-patient button").click()
    shown(page, len(patient[1].images))
    whole = mask(page)
    other.locator("input[type=file]").first.set_input_files(
        [{"name": f"b_{k}.png", "mimeType": "image/png", "buffer": picture(mode="RGB")} for k in (1, 2, 3)]
    )
    shown(other, 3)
    assert whole.any() and mask(other).shape == (3, 32, 32)
    assert "Orientation unknown" in other.locator(".words").inner_text()
    assert "Orientation unknown" not in page.locator(".words").inner_text()
    side(other).get_by_text("Pixel size in mm").click()
    for label, value in (("Side of a pixel (mm)", "0.5"), ("Distance of slices (mm)", "3")):
        side(other).get_by_label(label).fill(value)
        side(other).get_by_label(label).press("Enter")
    side(other).get_by_text("Volume", exact=True).wait_for()
    eventually(lambda: other.evaluate(f"{VIEW}.opened.spacing"), [0.5, 0.5, 3])
    given = np.zeros((3, 32, 32), np.uint8)
    given[1, 4:9, 6:20] = 255
    side(other).get_by_text("Correct", exact=True).click()
    side(other).locator("section[aria-label^='A corrected mask'] input[type=file]").set_input_files(
        [
            {"name": f"b_{k}_mask.png", "mimeType": "image/png", "buffer": picture(pixels)}
            for k, pixels in enumerate(given, 1)
        ]
    )
    eventually(lambda: mask(other).tolist(), (given > 0).tolist())
    other.get_by_role("button", name="Close this case").click()
    other.get_by_role("button", name="Close without saving").click()
    other.get_by_text("Try a sample").wait_for()
    assert other.locator(".medfl-viewer").count() == 0 and mask(page).shape == whole.shape

    page.get_by_label("Threshold").fill("0.3")
    lower = mask(page)
    assert lower.sum() > whole.sum()
    side(page).get_by_text(f"{lower.sum():,} pixels").first.wait_for()
    changed(page, 0)  # a threshold is no correction
    side(page).get_by_text(re.compile(r"(\d+) of \1 count")).click()
    switch = side(page).locator("[data-testid=stCheckbox] label").first
    switch.click()
    page.get_by_role("toolbar", name="Correcting").wait_for()  # which is there once pixels were changed
    left = mask(page)
    assert not (left & ~lower).any()
    changed(page, int((left != lower).sum()))
    assert violations(page) == []
    switch.click()
    changed(page, 0)
    page.get_by_role("toolbar", name="Correcting").wait_for(state="hidden")
    assert np.array_equal(mask(page), lower)

    page.get_by_role("button", name="Close this case").click()  # without a question
    page.locator(".st-key-open-patient button").click()
    shown(page, len(patient[1].images))
    assert page.locator("canvas").count() == 1 and np.array_equal(mask(page), whole)

    told = page.evaluate(
        """async (module) => {
      const said = [], parentElement = document.querySelector(".medfl-viewer").parentElement;
      const head = new TextEncoder().encode(JSON.stringify({ voxels: 1e9, masks: 1e9, parts: [] }));
      const data = new Uint8Array([head.length, 0, 0, 0, ...head]);
      (await import(module)).default({ data, parentElement, setTriggerValue: (what) => said.push(what) });
      await new Promise((done) => setTimeout(done, 50));
      return said;
    }""",
        f"{address}/_stcore/bidi-components/medfl.viewer/viewer.js",
    )
    assert told == ["wanted"]  # voxels that never came are asked for
