"""The app in a real Chromium: upload, the viewer, download, at desktop and phone width."""

import zipfile

import numpy as np
import pytest
from dicom_phantoms import phantom, write_series
from pages import at_slice, shown
from PIL import Image
from running import ROOT, run_script

from benchmarks.serving import served
from dataset import load_dataset

pytestmark = pytest.mark.slow
BEST = "transunet_centralized_best.pth"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    with served(ROOT, trained / BEST, tmp_path_factory.mktemp("app") / "streamlit.log") as (where, _):
        yield where


@pytest.fixture(params=WIDTHS)
def page(request, address, browser):
    width, height = WIDTHS[request.param]
    made = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
    asked = []
    made.on("request", lambda request: asked.append(request.url))
    made.set_default_timeout(60_000)
    made.goto(address)
    made.get_by_text("Try a sample").wait_for()
    yield made
    made.close()
    assert [
        url for url in asked if not url.startswith((address, "data:", "blob:", address.replace("http", "ws")))
    ] == []


@pytest.fixture(scope="module")
def patient(phantoms, trained, tmp_path_factory):
    """A patient's slices and the folder of masks that predict.py writes for them."""
    images = load_dataset(phantoms, progress=False).patients[0].images
    out = tmp_path_factory.mktemp("predicted")
    assert run_script("predict.py", *images, "--checkpoint", trained / BEST, "--out", out).returncode == 0
    return images, out


SLICES = (
    "section[aria-label^='Slices of one patient'] input[type=file]"  # the folder's uploader takes no files
)


def at_rest(page) -> None:
    """Wait until the page's script has run to its end: a button that is
    about to be drawn anew does nothing."""
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()


def fetched(page, button: str, folder):
    """The file that a download button gives."""
    at_rest(page)
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def same(one, other) -> bool:
    return np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_a_volume_is_segmented_and_its_masks_are_predicts(page, patient, tmp_path):
    images, predicted = patient
    page.locator(SLICES).set_input_files(images)
    shown(page, len(images))
    page.get_by_label("Slice", exact=True).focus()
    page.keyboard.press("Home")
    at_slice(page, 1, len(images))
    page.keyboard.press("ArrowRight")
    at_slice(page, 2, len(images))
    page.get_by_text("Slice 2 (").wait_for()
    name = f"{images[1].stem}_mask.png"
    assert same(fetched(page, "Mask of this slice", tmp_path), predicted / name)
    with zipfile.ZipFile(fetched(page, "All masks (ZIP)", tmp_path)) as archive:
        archive.extractall(tmp_path / "all")
    for image in images:
        assert same(tmp_path / "all" / f"{image.stem}_mask.png", predicted / f"{image.stem}_mask.png"), (
            image.name
        )
    assert fetched(page, "Report (PNG)", tmp_path).read_bytes()[1:4] == b"PNG"


def test_a_patients_folder_is_taken(page, patient):
    images, _ = patient
    page.locator("section[aria-label^='Or a patient'] input[type=file]").set_input_files(images[0].parent)
    shown(page, len(images))
    page.get_by_text("Dice with the truth").first.wait_for()  # the folder holds the masks as well
    assert page.get_by_role("heading", name=images[0].parent.name).is_visible()


def test_one_slice_keys_and_what_is_always_in_view(page, patient, tmp_path):
    images, _ = patient
    page.locator(SLICES).set_input_files(images[3])
    shown(page, 1)
    height = page.locator(".medfl-viewer canvas").bounding_box()["height"]
    assert height > page.viewport_size["height"] / 2
    page.locator(".medfl-viewer canvas").click()  # the focus leaves every field
    page.keyboard.press("o")
    page.get_by_text("Overlay hidden").wait_for()
    page.get_by_role("button", name="Report (PNG)").scroll_into_view_if_needed()
    notice = page.get_by_text("not a medical device").first.bounding_box()
    assert 0 <= notice["y"] < page.viewport_size["height"]
    box = page.locator("section.stMain, [data-testid=stMain]").first
    assert box.evaluate("e => e.scrollWidth <= e.clientWidth"), "the page is wider than the screen"
    page.get_by_role("button", name="Close this case").click()
    page.get_by_text("Try a sample").wait_for()


def test_dicom_files_need_no_ending(page, tmp_path):
    """As archives export them."""
    (_, flair, _), _ = phantom(0, slices=4, size=64)
    page.locator(SLICES).set_input_files(write_series(tmp_path, flair, SeriesDescription="AX FLAIR"))
    page.get_by_role("heading", name="DICOM series").wait_for()
    shown(page, 4)
