"""The page in a real Chromium: cases in, masks out and equal to predict.py's, nothing sent, bad input, keys, two widths."""

import functools
import gzip
import http.server
import io
import re
import shutil
import threading
import zipfile

import nibabel
import numpy as np
import pytest
from PIL import Image

from checkpoint import load_checkpoint
from dataset import load_dataset
from running import run_script
from uploads import BROKEN, picture

pytest.importorskip("playwright", reason="the browser tests need playwright")
from playwright.sync_api import expect, sync_playwright  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium for the browser tests: install it")]
BEST = "transunet_centralized_best.pth"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
EQUAL = 0.9999  # share of the mask pixels that must be predict.py's


@pytest.fixture(scope="module")
def staged(node, trained, tmp_path_factory):
    from staging import stage_browser

    folder = tmp_path_factory.mktemp("browser") / "staged"
    stage_browser(load_checkpoint(trained / BEST), folder=folder)
    return folder


@pytest.fixture(scope="module")
def serve():
    """A function that serves a folder, with the Space's headers or without, and gives the address."""
    from serve_browser import Page, server

    running = []

    def start(folder, isolated=True) -> str:
        if isolated:
            one = server(folder, 0)
        else:
            one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Page, directory=str(folder), more={}))
        running.append(one)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{one.server_port}"

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="module")
def address(staged, serve) -> str:
    return serve(staged)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, where: str, size=WIDTHS["desktop"], before: str | None = None):
    """A page at this address, with what it asked for and the errors that it logged."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, accept_downloads=True)
    page.asked, page.failures = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.set_default_timeout(60_000)
    if before:
        page.add_init_script(before)
    page.goto(where)
    return page


@pytest.fixture(params=WIDTHS)
def page(request, address, browser):
    made = opened(browser, address, WIDTHS[request.param])
    made.get_by_text("Ready.").wait_for()
    yield made
    assert made.failures == []
    made.close()


@pytest.fixture(scope="module")
def patient(phantoms, trained, tmp_path_factory):
    """A patient's slices and masks, and the folder of masks that predict.py writes for the slices."""
    one = load_dataset(phantoms, progress=False).patients[0]
    out = tmp_path_factory.mktemp("predicted")
    assert run_script("predict.py", *one.images, "--checkpoint", trained / BEST, "--out", out).returncode == 0
    return one, out


def choose(page, files, field: str = "#files") -> None:
    page.locator(field).set_input_files([{"name": name, "mimeType": "application/octet-stream", "buffer": content}
                                         for name, content in files] if isinstance(files[0], tuple) else files)


def shown(page, count: int) -> None:
    """Wait until a case of so many slices is on the page."""
    page.locator("#caption", has_text=f"of {count} (").wait_for()


def fetched(page, button: str) -> tuple[str, bytes]:
    """Name and content of the file that a download button gives."""
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    return download.value.suggested_filename, download.value.path().read_bytes()


def assert_equal_masks(found: list[np.ndarray], expected: list[np.ndarray], what: str) -> None:
    same = np.mean([one == other for one, other in zip(found, expected)])
    print(f"{what}: {100 * same:.4f} % of the mask pixels are predict.py's, tumour in {np.mean(np.array(expected) > 0):.1%}")
    assert len(found) == len(expected) and same >= EQUAL and np.any(expected)


def masks_of(content: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist() if name.endswith("png")}


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
    page.locator("#slice").focus()
    page.keyboard.press("Home")
    page.get_by_text(f"Slice 1 of {count} (").wait_for()
    page.keyboard.press("ArrowRight")
    page.get_by_text(f"Slice 2 of {count} (").wait_for()
    page.locator("#chart g").nth(3).click(force=True)  # the chart is a way to jump
    page.get_by_text(f"Slice 4 of {count} (").wait_for()
    name, content = fetched(page, "Mask of this slice (PNG)")
    assert name == f"{one.images[3].stem}_mask.png" and np.array_equal(np.asarray(Image.open(io.BytesIO(content))), found[name])
    before = page.locator("#figures").inner_text()
    page.locator("#threshold").fill("0.05")
    expect(page.locator("#figures")).not_to_have_text(before)
    pictures = {}
    for overlay in ("outline", "fill", "probability"):
        page.get_by_text(overlay, exact=True).click()
        pictures[overlay] = page.locator("#picture").evaluate("canvas => canvas.toDataURL()")
    page.get_by_text("outline", exact=True).click()
    page.keyboard.press("o")
    page.get_by_text("Overlay hidden").wait_for()
    pictures["hidden"] = page.locator("#picture").evaluate("canvas => canvas.toDataURL()")
    page.keyboard.press("o")
    for view in ("pre", "post", "composite"):
        page.get_by_text(view, exact=True).click()
        pictures[view] = page.locator("#picture").evaluate("canvas => canvas.toDataURL()")
    page.get_by_text("Window and level").click()
    page.locator("#level").fill("60")
    pictures["level"] = page.locator("#picture").evaluate("canvas => canvas.toDataURL()")
    assert len(set(pictures.values())) == len(pictures), "a control changes nothing"
    page.get_by_text("Pixel size in mm").click()
    page.get_by_label("Side of a pixel").fill("0.5")
    page.get_by_label("Distance of slices").fill("4")
    page.keyboard.press("Tab")
    page.get_by_text("cm³").nth(1).wait_for()
    name, content = fetched(page, "Figures (CSV)")
    lines = content.decode().splitlines()
    assert len(lines) == count + 1 and "tumour_mm2" in lines[0]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    notice = page.locator(".notice").bounding_box()
    page.locator("#where").scroll_into_view_if_needed()
    notice = page.locator(".notice").bounding_box()
    assert 0 <= notice["y"] < page.viewport_size["height"] and "not a medical device" in page.locator(".notice").inner_text()
    page.get_by_role("button", name="Close this case").click()
    page.get_by_text("Try a sample").wait_for()


def test_a_zip_a_nifti_and_a_folder_give_the_same_masks(browser, address, patient, trained, tmp_path):
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
    page.get_by_text("truth", exact=True).click()
    page.get_by_text("Yellow: both.").wait_for()
    page.get_by_role("button", name="Close this case").click()

    page.locator("#folder").set_input_files(one.images[0].parent)
    shown(page, len(expected))
    found = masks_of(fetched(page, "All masks (ZIP)")[1])
    assert_equal_masks([found[f"{path.stem}_mask.png"] for path in one.images], expected, "folder")
    page.get_by_role("button", name="Close this case").click()

    volume = np.stack([np.asarray(Image.open(path)) for path in one.images])  # as NIfTI: x, y, z with the front at the end of y
    values = np.moveaxis(volume[:, ::-1], (0, 1, 2), (2, 1, 0))
    scan = nibabel.Nifti1Image(np.ascontiguousarray(values), np.diag([1, 1, 3, 1.0]))
    choose(page, [("brain.nii.gz", gzip.compress(scan.to_bytes()))])
    shown(page, len(expected))
    page.locator("#figures", has_text="cm³").wait_for()
    name, content = fetched(page, "Mask (NIfTI)")
    mask = np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)
    assert name == "brain_mask.nii.gz" and mask.shape == values.shape[:3]
    assert_equal_masks(list(np.moveaxis(mask * 255, (2, 1, 0), (0, 1, 2))[:, ::-1]), expected, "NIfTI")
    page.get_by_role("button", name="Close this case").click()

    choose(page, [one.images[3]])  # alone, as predict.py reads it alone
    shown(page, 1)
    assert run_script("predict.py", one.images[3], "--checkpoint", trained / BEST, "--out", tmp_path).returncode == 0
    _, content = fetched(page, "Mask of this slice (PNG)")
    alone = np.asarray(Image.open(tmp_path / f"{one.images[3].stem}_mask.png"))
    assert np.mean(np.asarray(Image.open(io.BytesIO(content))) == alone) >= EQUAL
    page.get_by_text("A lone slice is normalised by itself").wait_for()
    choose(page, [one.masks[3]], "#truth")
    page.locator("#figures", has_text="Dice with the truth").wait_for()
    assert page.failures == []
    page.close()


def test_jpeg_pixels_are_pillows(browser, address):
    """A browser's own decoder reads them, so only a real browser can show it."""
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    from sklearn.datasets import load_sample_image

    for colours in (load_sample_image("china.jpg")[:200, :240], load_sample_image("china.jpg")[:200, :240, 0]):
        content = picture(np.ascontiguousarray(colours), "JPEG", quality=90)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
        found = page.evaluate("""async bytes => {
          const { readSlice } = await import("./slices.js");
          return Array.from((await readSlice("a.jpg", Uint8Array.from(bytes))).pixels);
        }""", list(content))
        assert np.abs(np.array(found).reshape(expected.shape) - expected).max() <= 2
    cmyk, cut = picture(Image.new("CMYK", (40, 40)), "JPEG"), picture(load_sample_image("china.jpg"), "JPEG")[:9000]
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
    loaded = len(page.asked)
    elsewhere = f"http://127.0.0.1:{listener.server_port}/scan"
    send = f"fetch('{elsewhere}').then(() => 'sent', () => 'refused')"
    assert page.evaluate(send) == "refused", "the page may send"
    assert page.workers[0].evaluate(send) == "refused", "the network's worker may send"
    page.evaluate(f"new Promise(done => Object.assign(new Image(), {{ onload: done, onerror: done, src: '{elsewhere}' }}))")
    assert hits == []
    loaded = len(page.asked)
    page.context.set_offline(True)
    one, _ = patient
    choose(page, list(one.images + one.masks))
    shown(page, len(one.images))
    for button in ("All masks (ZIP)", "Mask of this slice (PNG)", "Figures (CSV)"):
        fetched(page, button)
    page.locator("#threshold").fill("0.3")
    page.get_by_role("button", name="Close this case").click()
    page.get_by_role("button", name="Phantom 2").click()
    page.get_by_role("alert").get_by_text("can't be loaded; check the connection").wait_for()
    asked = [url for url in page.asked[loaded:] if not url.startswith("blob:")]
    assert asked == [f"{address}/samples/phantom_2.zip"], asked
    listener.shutdown()
    page.close()


def test_the_page_outlives_every_bad_upload(browser, address, patient):
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    before = ""
    for name, files in BROKEN.items():
        if name == "too many":
            continue  # below, by a list that Chromium makes by itself: each name would travel as a file
        choose(page, files)
        alert = page.get_by_role("alert").locator("p")
        expect(alert).not_to_have_text(before) if before else alert.wait_for()
        before = alert.inner_text()
        assert before.count("\n") == 0 and before.endswith("."), name
        page.evaluate("document.getElementById('messages').replaceChildren()")
        before = ""
    page.evaluate("""() => {
      const list = new DataTransfer();
      for (let k = 0; k < 2000; k++) list.items.add(new File([], `a_${k}.png`));
      const field = document.getElementById("files");
      field.files = list.files;
      field.dispatchEvent(new Event("change"));
    }""")
    page.get_by_role("alert").get_by_text("2000 files are more than").wait_for()
    choose(page, list(patient[0].images))
    shown(page, len(patient[0].images))
    assert page.failures == [] and page.get_by_role("alert").inner_text() == ""
    choose(page, [("a_1_mask.png", picture(np.zeros((20, 20), np.uint8)))], "#truth")
    page.get_by_role("alert").get_by_text("no mask has the name of a slice").wait_for()
    page.close()


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda content: content[:len(content) // 2], "cut off"), (lambda content: b"version https://git-lfs.github.com", "cut off"),
    (lambda content: b"", "not one that this page can use"), (None, "can't be loaded")], ids=["cut", "pointer", "empty", "missing"])
def test_a_model_file_that_is_none_is_told(browser, staged, serve, tmp_path, change, sentence):
    shutil.copytree(staged, tmp_path / "page")
    model = tmp_path / "page" / "model.onnx"
    if change:
        model.write_bytes(change(model.read_bytes()))
    else:
        model.unlink()
    page = opened(browser, serve(tmp_path / "page"))
    page.get_by_role("alert").get_by_text(sentence).wait_for()
    assert page.failures == [] and page.locator("#open").is_hidden()
    page.close()


def test_threads_where_the_page_is_isolated_and_a_browser_that_is_too_old(browser, staged, serve, address, patient):
    page = opened(browser, address)
    page.get_by_text(re.compile(r"Ready\. The network runs on (\d+ threads|one thread)\.")).wait_for()
    assert page.evaluate("crossOriginIsolated")
    page.close()
    page = opened(browser, serve(staged, isolated=False))
    page.get_by_text("one thread: this address does not isolate the page").wait_for()
    choose(page, list(patient[0].images))
    shown(page, len(patient[0].images))
    page.close()
    page = opened(browser, address, before="WebAssembly.validate = () => false")
    page.get_by_role("alert").get_by_text("no WebAssembly with SIMD").wait_for()
    page.close()


def test_a_segmentation_can_be_cancelled(browser, address, patient):
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    # pressed the moment it is there: the small network of the tests is soon done
    page.evaluate("""() => new MutationObserver(() => {
      const button = document.getElementById("cancel");
      if (!button.hidden) button.click();
    }).observe(document.getElementById("cancel"), { attributes: true })""")
    choose(page, [(f"a_{k}.png", picture(np.full((256, 256), k, np.uint8))) for k in range(1, 60)])
    page.get_by_text("Cancelled.").wait_for()
    page.get_by_text("Try a sample").wait_for()
    page.close()


def test_drops_of_folders_are_taken(browser, address, patient):
    """A drop can't be made by hand in a test; its handler is given what Chromium would give it."""
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    pictures = [[path.name, list(path.read_bytes())] for path in patient[0].images]
    page.evaluate("""pictures => {
      const file = ([name, bytes]) => ({ isFile: true, fullPath: `/anna/${name}`,
        file: give => give(new File([Uint8Array.from(bytes)], name)) });
      const batches = [pictures.slice(0, 3).map(file), pictures.slice(3).map(file), []];
      const folder = { isFile: false, createReader: () => ({ readEntries: give => give(batches.shift()) }) };
      const event = new Event("drop");
      event.dataTransfer = { items: [{ webkitGetAsEntry: () => folder }] };
      document.getElementById("drop").dispatchEvent(event);
    }""", pictures)
    shown(page, len(pictures))
    page.close()
