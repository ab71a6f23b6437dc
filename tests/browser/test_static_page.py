"""The page in a real Chromium: cases in, masks out and equal to predict.py's, keys, two widths, and nothing
sent."""

import csv
import gzip
import http.server
import io
import json
import shutil
import threading
import zipfile

import nibabel
import numpy as np
import onnx
import pytest
from dicom_phantoms import phantom, write_series
from pages import WIDTHS, assert_equal_masks, at_slice, choose, fetched, masks_of, opened, seen, shown
from PIL import Image
from running import run_script
from uploads import picture

from checkpoint import load_checkpoint
from common import __version__, git_commit
from runs.models import PHANTOM_MODEL
from tasks import named_task

pytestmark = pytest.mark.slow


@pytest.fixture(params=WIDTHS)
def page(request, address, browser):
    made = opened(browser, address, WIDTHS[request.param])
    made.get_by_text("Ready.").wait_for()
    yield made
    assert made.failures == []
    made.close()


def test_slices_give_predicts_masks_and_the_controls_work(page, patient):
    one, predicted = patient
    count = len(one.images)
    choose(page, list(one.images))
    shown(page, count)
    expected = {path.name: np.asarray(Image.open(path)) for path in sorted(predicted.glob("*_mask.png"))}
    name, content = fetched(page, "All masks (ZIP)")
    found = masks_of(content)
    assert name == f"{one.name}_masks.zip" and found.keys() == expected.keys()
    assert_equal_masks([found[key] for key in expected], list(expected.values()), "TIFF slices")
    slider = page.get_by_role("slider", name="Slice")
    slider.focus()
    page.keyboard.press("Home")
    at_slice(page, 1, count)
    page.keyboard.press("ArrowRight")
    at_slice(page, 2, count)
    page.locator(".strip i").nth(3).click()  # the chart is a way to jump
    at_slice(page, 4, count)
    name, content = fetched(page, "Mask of this slice (PNG)")
    assert name == f"{one.images[3].stem}_mask.png" and np.array_equal(
        np.asarray(Image.open(io.BytesIO(content))), found[name]
    )
    before = page.locator("#figures").inner_text()
    page.get_by_label("Threshold").fill("0.05")
    page.locator("#figures").get_by_text(before).wait_for(state="detached")
    page.get_by_label("Threshold").fill("0.5")
    pictures = {}
    for overlay in ("outline", "fill", "probability"):
        page.get_by_label("Overlay").select_option(overlay)
        pictures[overlay] = seen(page).tobytes()
    page.get_by_label("Overlay").select_option("outline")
    page.locator(".legend", has_text="Orange line").wait_for()
    page.keyboard.press("Escape")
    page.locator("h2#name").focus()
    page.keyboard.press("o")
    page.get_by_text("Overlay hidden").wait_for()
    pictures["hidden"] = seen(page).tobytes()
    page.keyboard.press("o")
    for key, view in ("1", "pre"), ("3", "post"), ("4", "composite"):
        page.keyboard.press(key)
        assert page.get_by_label("Channel").input_value() == view
        pictures[view] = seen(page).tobytes()
    page.keyboard.press("2")
    page.get_by_label("Window").select_option("bright")
    pictures["window"] = seen(page).tobytes()
    assert len(set(pictures.values())) == len(pictures), "a control changes nothing"
    page.get_by_text("Pixel size in mm").click()
    page.get_by_label("Side of a pixel").fill("0.5")
    page.get_by_label("Distance of slices").fill("4")
    page.keyboard.press("Tab")
    page.get_by_text("cm³").nth(1).wait_for()
    name, content = fetched(page, "Figures (CSV)")
    lines = content.decode().splitlines()
    assert len(lines) == count + 1 and "tumour_mm2" in lines[0]
    page.get_by_text("Components", exact=True).click()
    largest = page.locator("#component-rows tr").first
    largest.get_by_text("cm³").wait_for()
    name, content = fetched(page, "Components (CSV)")
    lines = list(csv.DictReader(io.StringIO(content.decode())))
    assert lines and f"{float(lines[0]['volume_cm3']):.2f}" in largest.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "the page is wider than the screen"
    )
    notice = page.locator(".notice").bounding_box()
    page.locator("#where").scroll_into_view_if_needed()
    notice = page.locator(".notice").bounding_box()
    assert (
        0 <= notice["y"] < page.viewport_size["height"]
        and "not a medical device" in page.locator(".notice").inner_text()
    )
    page.get_by_role("button", name="Close this case").click()
    page.get_by_text("Try a sample").wait_for()


def test_a_zip_a_nifti_and_a_folder_give_the_same_masks(browser, address, patient, tmp_path):
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    one, predicted = patient
    expected = [np.asarray(Image.open(predicted / f"{path.stem}_mask.png")) for path in one.images]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in one.images + one.masks:
            archive.write(path, f"{one.name}/{path.name}")
    choose(page, [("patient.zip", content.getvalue())])
    shown(page, len(expected))
    found = masks_of(fetched(page, "All masks (ZIP)")[1])
    assert_equal_masks([found[f"{path.stem}_mask.png"] for path in one.images], expected, "ZIP")
    page.locator("#figures", has_text="Dice with the truth").wait_for()
    page.get_by_label("Overlay").select_option("truth")
    page.get_by_text("Yellow: both.").wait_for()
    page.get_by_role("button", name="Close this case").click()

    page.locator("#folder").set_input_files(one.images[0].parent)
    shown(page, len(expected))
    found = masks_of(fetched(page, "All masks (ZIP)")[1])
    assert_equal_masks([found[f"{path.stem}_mask.png"] for path in one.images], expected, "folder")
    page.get_by_role("button", name="Close this case").click()

    volume = np.stack(
        [np.asarray(Image.open(path)) for path in one.images]
    )  # as NIfTI: x, y, z with the right at the end of x, the front at the end of y
    values = np.moveaxis(volume[:, ::-1, ::-1], (0, 1, 2), (2, 1, 0))
    scan = nibabel.Nifti1Image(np.ascontiguousarray(values), np.diag([1, 1, 3, 1.0]))
    choose(page, [("brain.nii.gz", gzip.compress(scan.to_bytes()))])
    shown(page, len(expected))
    page.locator("#figures", has_text="cm³").wait_for()
    name, content = fetched(page, "Mask (NIfTI)")
    mask = np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)
    assert name == "brain_mask.nii.gz" and mask.shape == values.shape[:3]
    assert_equal_masks(list(np.moveaxis(mask * 255, (2, 1, 0), (0, 1, 2))[:, ::-1, ::-1]), expected, "NIfTI")
    page.get_by_role("button", name="Close this case").click()

    choose(page, [one.images[3]])  # alone, as predict.py reads it alone
    shown(page, 1)
    assert (
        run_script("predict.py", one.images[3], "--checkpoint", PHANTOM_MODEL, "--out", tmp_path).returncode
        == 0
    )
    _, content = fetched(page, "Mask of this slice (PNG)")
    alone = np.asarray(Image.open(tmp_path / f"{one.images[3].stem}_mask.png"))
    assert_equal_masks([np.asarray(Image.open(io.BytesIO(content)))], [alone], "a lone slice")
    page.get_by_text("A lone slice is normalised by itself").wait_for()
    choose(page, [one.masks[3]], "#truth")
    page.locator("#figures", has_text="Dice with the truth").wait_for()
    assert page.failures == []
    page.close()


def test_a_dicom_series_is_opened_and_nothing_is_sent(browser, address, tmp_path):
    paths = write_series(tmp_path / "series", phantom(0, slices=6, size=64)[0][1], SeriesDescription="FLAIR")
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    page.locator("#folder").set_input_files(tmp_path / "series")
    shown(page, 6)
    page.get_by_text("FLAIR stands in for the other channels").wait_for()
    page.locator("#figures", has_text="cm³").wait_for()
    name, content = fetched(page, "Mask (NIfTI)")
    mask = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
    assert name == "DICOM series_mask.nii.gz" and mask.shape == (64, 64, 6)
    assert mask.header.get_zooms() == pytest.approx((3.6, 3.6, 6.0))
    page.get_by_role("button", name="Close this case").click()
    choose(page, [(path.name, path.read_bytes()) for path in paths[:2] + paths[3:]])
    page.get_by_role("alert").get_by_text("the DICOM series is incomplete").wait_for()
    assert all(url.startswith((address, "blob:", "data:")) for url in page.asked), page.asked
    assert page.failures == []
    page.close()


def test_on_a_graphics_card_the_masks_are_the_same(launch, address, patient):
    """Chromium imitates a card on the processor; the page, which would not use such a one, is told otherwise."""
    chromium = launch(
        "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"
    )
    real = "Object.defineProperty(GPUAdapterInfo.prototype, 'isFallbackAdapter', { get: () => false })"
    page = opened(chromium, address, before=real)
    page.get_by_text("Ready. The network runs on the graphics card.").wait_for()
    one, predicted = patient
    choose(page, list(one.images))
    shown(page, len(one.images))
    page.get_by_text("runs on the graphics card").wait_for()
    found = masks_of(fetched(page, "All masks (ZIP)")[1])
    expected = [np.asarray(Image.open(predicted / f"{path.stem}_mask.png")) for path in one.images]
    assert_equal_masks([found[f"{path.stem}_mask.png"] for path in one.images], expected, "WebGPU")
    assert page.failures == []
    chromium.close()


def test_the_page_names_what_another_task_outlines(browser, staged, serve, patient, tmp_path):
    shutil.copytree(staged, tmp_path / "page")
    path = tmp_path / "page" / "model.onnx"
    exported = onnx.load(path)
    entry = next(one for one in exported.metadata_props if one.key == "metadata")
    task = {**named_task("hippocampus").model_dump(mode="json"), "region": "<b>hippocampus</b>"}
    entry.value = json.dumps({**json.loads(entry.value), "task": task})
    onnx.save(exported, path)
    page = opened(browser, serve(tmp_path / "page"))
    page.get_by_text("Ready.").wait_for()
    assert page.get_by_role("heading", level=1).inner_text() == "MedFL: <b>hippocampus</b> segmentation"
    assert page.locator("#intro").inner_text().startswith("Open slices (T1) as in MSD hippocampus MRI.")
    choose(page, list(patient[0].images))
    shown(page, len(patient[0].images))
    assert "Slices with <b>hippocampus</b>" in page.locator("#figures").inner_text()
    assert page.get_by_label("Channel", exact=True).is_hidden()  # one fills all three
    assert page.get_by_role("img").first.get_attribute("aria-label").startswith("axial view, T1, slice")
    assert page.failures == []
    page.close()


def test_the_page_says_which_version_it_is(page):
    checkpoint = load_checkpoint(PHANTOM_MODEL)
    said = page.locator("#version").inner_text()
    commit = git_commit() or "unknown"
    assert said == f"MedFL {__version__}, commit {commit[:12]}; model {checkpoint.sha256()[:12]} (SHA-256)"


def test_the_next_visit_needs_no_network(browser, staged, patient):
    from deployment.serve_browser import server

    running = server(staged, 0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"http://127.0.0.1:{running.server_port}")
    page.locator("body[data-kept]").wait_for()
    running.shutdown()
    running.server_close()
    page.reload()
    page.get_by_text("Ready.").wait_for()
    choose(page, list(patient[0].images))
    shown(page, len(patient[0].images))
    kept = page.evaluate("caches.open('medfl-page').then(async kept => (await kept.keys()).map(k => k.url))")
    assert kept and not [url for url in kept if any(path.name in url for path in patient[0].images)]
    context.close()


def test_jpeg_pixels_are_pillows(browser, address):
    """A browser's own decoder reads them, so only a real browser can show it."""
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    from sklearn.datasets import load_sample_image

    for colours in (
        load_sample_image("china.jpg")[:200, :240],
        load_sample_image("china.jpg")[:200, :240, 0],
    ):
        content = picture(np.ascontiguousarray(colours), "JPEG", quality=90)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
        found = page.evaluate(
            """async bytes => {
          const { readSlice } = await import("./slices.js");
          return Array.from((await readSlice("a.jpg", Uint8Array.from(bytes))).pixels);
        }""",
            list(content),
        )
        assert np.abs(np.array(found).reshape(expected.shape) - expected).max() <= 2
    cmyk, cut = (
        picture(Image.new("CMYK", (40, 40)), "JPEG"),
        picture(load_sample_image("china.jpg"), "JPEG")[:9000],
    )
    for content, sentence in ((cmyk, "4 colour channels"), (cut, "can't be read as a picture")):
        choose(page, [("a_1.jpg", content)])
        page.get_by_role("alert").get_by_text(sentence).wait_for()
    page.close()


def test_nothing_leaves_and_it_works_without_a_network(browser, address, patient, serve, tmp_path):
    hits = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *_):
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    page.get_by_role("button", name="Phantom 1").click()
    page.get_by_role("button", name="Close this case").click()
    assert all(url.startswith((address, "blob:", "data:")) for url in page.asked), page.asked
    page.locator("body[data-kept]").wait_for()  # for the next visit; after that nothing is asked for
    elsewhere = f"http://127.0.0.1:{listener.server_port}/scan"
    send = f"fetch('{elsewhere}').then(() => 'sent', () => 'refused')"
    assert page.evaluate(send) == "refused", "the page may send"
    assert page.workers[0].evaluate(send) == "refused", "the network's worker may send"
    page.evaluate(
        f"new Promise(done => Object.assign(new Image(), "
        f"{{ onload: done, onerror: done, src: '{elsewhere}' }}))"
    )
    assert hits == []
    loaded = len(page.asked)
    page.context.set_offline(True)
    one, _ = patient
    choose(page, list(one.images + one.masks))
    shown(page, len(one.images))
    for button in ("All masks (ZIP)", "Mask of this slice (PNG)", "Figures (CSV)"):
        fetched(page, button)
    page.get_by_label("Threshold").fill("0.3")
    page.get_by_role("button", name="Close this case").click()
    page.get_by_role("button", name="Phantom 2").click()
    page.get_by_role("alert").get_by_text("can't be loaded; check the connection").wait_for()
    asked = [url for url in page.asked[loaded:] if not url.startswith("blob:")]
    assert asked == [f"{address}/samples/phantom_2.zip"], asked
    listener.shutdown()
    page.close()
