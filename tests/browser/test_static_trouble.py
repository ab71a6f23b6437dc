"""The page in a real Chromium, in trouble: bad files, bad models, old browsers, servers without headers, a
change of mind."""

import re
import shutil

import numpy as np
import pytest
from pages import at_slice, choose, opened, seen, shown
from uploads import BROKEN, picture

pytestmark = pytest.mark.slow


def test_the_page_outlives_every_bad_upload(browser, address, patient):
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    for name, files in BROKEN.items():
        if name == "too many":
            continue  # below, by a list that Chromium makes by itself: each name would travel as a file
        choose(page, files)
        alert = page.get_by_role("alert").locator("p")
        alert.wait_for()
        said = alert.inner_text()
        assert said.count("\n") == 0 and said.endswith("."), name
        page.evaluate("document.getElementById('messages').replaceChildren()")
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content[: len(content) // 2], "truncated"),
        (lambda content: b"version https://git-lfs.github.com", "truncated"),
        (lambda content: b"", "not one that this page can use"),
        (None, "can't be loaded"),
    ],
    ids=["cut", "pointer", "empty", "missing"],
)
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


def test_threads_where_the_page_is_isolated_and_a_browser_that_is_too_old(
    browser, staged, serve, address, patient
):
    page = opened(browser, address)
    page.get_by_text(re.compile(r"Ready\. The network runs on (\d+ threads|one thread)\.")).wait_for()
    assert page.evaluate("crossOriginIsolated")
    page.close()
    page = opened(browser, serve(staged, isolated=False))
    page.get_by_text("one thread: this address does not isolate the page").wait_for()
    choose(page, list(patient[0].images))
    shown(page, len(patient[0].images))
    page.close()
    # a card that turns out to be none: there is no adapter for the worker
    card = "navigator.gpu.requestAdapter = async () => ({ info: { isFallbackAdapter: false } })"
    page = opened(browser, address, before=card)
    page.get_by_text(re.compile(r"Ready\. The network runs on (\d+ threads|one thread)\.")).wait_for()
    asked = {url.removeprefix(f"{address}/libs/onnxruntime/") for url in page.asked if "onnxruntime" in url}
    assert {"ort-gpu.js", "ort.js", "ort-wasm.wasm"} <= asked, asked
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
    assert page.locator("#case").is_hidden() and page.locator("#cancel").is_hidden() and page.failures == []
    page.close()


def test_the_scan_is_there_before_its_outline(browser, address, patient):
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    # what the page is like at the first picture; the small network of the tests is soon done
    page.evaluate("""() => new MutationObserver(() => {
      const { viewer } = document.getElementById("viewer"), { tools } = viewer ?? {};
      if (window.first || !tools?.words.textContent.includes("no outline yet")) return;
      viewer.useTool("pen"); // must not draw on what the model has not seen
      const $ = (id) => document.getElementById(id), { tool, slice, probability } = viewer;
      window.first = { name: $("name").textContent, inert: $("side-panel").inert, tool, slice, probability,
        volumes: viewer.nv.volumes.length, editing: tools.editing.disabled, close: $("close").hidden,
        cancel: $("cancel").hidden };
      viewer.goTo(0);
    }).observe(document.body, { childList: true, subtree: true, characterData: true })""")
    images = list(patient[0].images)
    choose(page, images)
    shown(page, len(images))
    first = page.evaluate("window.first")
    assert first == {
        "name": images[0].parent.name,
        "inert": True,
        "volumes": 1,
        "tool": "look",
        "editing": True,
        "slice": len(images) // 2,
        "probability": None,
        "close": True,
        "cancel": False,
    }
    at_slice(page, 1, len(images))  # a reader who has begun to look is left where they are
    page.get_by_text("Largest diameter").first.wait_for()
    assert not page.evaluate("document.getElementById('side-panel').inert") and page.failures == []
    page.close()


def test_drops_of_folders_are_taken(browser, address, patient):
    """A drop can't be made by hand in a test; its handler is given what Chromium would give it."""
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    pictures = [[path.name, list(path.read_bytes())] for path in patient[0].images]
    page.evaluate(
        """pictures => {
      const file = ([name, bytes]) => ({ isFile: true, fullPath: `/anna/${name}`,
        file: give => give(new File([Uint8Array.from(bytes)], name)) });
      const batches = [pictures.slice(0, 3).map(file), pictures.slice(3).map(file), []];
      const folder = { isFile: false, createReader: () => ({ readEntries: give => give(batches.shift()) }) };
      const event = new Event("drop");
      event.dataTransfer = { items: [{ webkitGetAsEntry: () => folder }] };
      document.getElementById("drop").dispatchEvent(event);
    }""",
        pictures,
    )
    shown(page, len(pictures))
    assert page.locator("#name").inner_text() == patient[0].name and page.failures == []
    page.close()


def test_an_open_case_is_not_left_in_silence_and_the_next_begins_anew(browser, address, patient):
    page = opened(browser, address)
    page.get_by_text("Ready.").wait_for()
    leaves = "!window.dispatchEvent(new Event('beforeunload', { cancelable: true }))"
    assert page.evaluate(leaves) is False
    choose(page, list(patient[0].images))
    shown(page, len(patient[0].images))
    assert page.evaluate(leaves) is True  # the browser asks
    page.get_by_text("This model learned from phantoms only").wait_for()
    drop = "!document.body.dispatchEvent(new Event('drop', { bubbles: true, cancelable: true }))"
    assert page.evaluate(drop) is True  # a drop beside the field does not open the file in the page's place
    page.get_by_label("Overlay").select_option("probability")
    pictures = []
    for opacity in ("0", "0.5", "1"):
        page.get_by_label("Opacity").fill(opacity)
        pictures.append(seen(page).tobytes())
    assert len(set(pictures)) == 3, "the anatomy is not seen under the probability"
    page.get_by_label("Window").select_option("bright")
    page.get_by_text("Pixel size in mm").click()
    page.get_by_label("Side of a pixel").fill("0.5")
    page.get_by_label("Distance of slices").fill("1000000000")
    page.keyboard.press("Tab")
    page.get_by_role("alert").get_by_text("sizes lie between").wait_for()
    assert "cm³" not in page.locator("#figures").inner_text()
    page.get_by_role("button", name="Close this case").click()
    page.get_by_role("button", name="Phantom 1").click()
    page.get_by_text("This is a phantom: painted, not measured.").wait_for()
    assert page.locator("#name").inner_text() == "phantom_1" and page.get_by_label(
        "Window"
    ).input_value() == ("full range")
    assert page.failures == []
    page.close()
