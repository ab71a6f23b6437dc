"""The viewer under a reader's hands in a real Chromium: wheel, drags, keys, pen, touch; masks pixel by pixel."""

import gzip
import io
import json
import zipfile

import nibabel
import numpy as np
import pytest
from pages import at_slice, choose, dragged, fetched, masks_of, opened, place, seen, shown
from PIL import Image
from running import ROOT

pytestmark = pytest.mark.slow
SPACING = (2.0, 1.0, 4.0)  # mm between columns, rows and slices
SHAPE = (48, 40, 9)  # columns, rows, slices


def scan() -> bytes:
    """A NIfTI of a bright bar at the patient's left, in front, and a patch of another grey at the right."""
    values = np.full(SHAPE, 40, np.uint8)  # from left to right of the patient: x grows to the right
    values[4:12, 26:34, 2:7] = 220
    values[30:40, 8:16, 3:6] = 120
    return nibabel.Nifti1Image(values, np.diag([*SPACING, 1.0])).to_bytes()


@pytest.fixture(scope="module")
def page(browser, address):
    made = opened(browser, address, (1280, 720))
    made.get_by_text("Ready.").wait_for()
    choose(made, [("flair.nii", scan())])
    shown(made, SHAPE[2])
    yield made
    assert made.failures == []
    made.close()


@pytest.fixture(autouse=True)
def _fresh(page):
    """Each test finds the case as it was opened, at slice 5."""
    page.evaluate(
        """async () => {
      const { viewer } = document.getElementById("viewer"), { opened } = viewer;
      opened.spacing = [1, 2, 4];
      await viewer.show(opened, new Float32Array(opened.count * opened.height * opened.width), 0.5);
      viewer.goTo(4);
    }"""
    )
    at_slice(page, 5, SHAPE[2])
    page.locator("h2#name").focus()


def mask(page) -> np.ndarray:
    """The mask that the page gives, (slices, rows, columns) of 0 and 255."""
    found = masks_of(fetched(page, "All masks (ZIP)")[1])
    return np.stack([found[f"flair_{k + 1}_mask.png"] for k in range(SHAPE[2])])


def test_two_pictures_move_together_and_one_by_itself(page):
    """Masks of another model beside the case, then a scan of another date with other slices."""
    marked = np.zeros(SHAPE, np.uint8)
    marked[4:12, 26:34, 4] = 1
    page.get_by_text("Side by side").click()
    choose(
        page, [("other_mask.nii", nibabel.Nifti1Image(marked, np.diag([*SPACING, 1.0])).to_bytes())], "#masks"
    )
    page.locator(".place", has_text="Other masks: slice 5 of 9").wait_for()
    beside = page.locator(".beside canvas")

    def orange() -> int:
        picture = np.asarray(Image.open(io.BytesIO(beside.screenshot())).convert("RGB")).astype(int)
        return int(((picture[..., 0] > 180) & (picture[..., 2] < 60)).sum())

    assert orange() > 50, "the other model's outline"
    page.keyboard.press("o")
    page.get_by_text("Overlay hidden").wait_for()
    page.wait_for_function("document.querySelector('.medfl-viewer').viewer.beside.nv.drawRimOpacity === -1")
    assert orange() == 0
    page.keyboard.press("o")
    page.keyboard.press("ArrowRight")
    page.locator(".place", has_text="slice 6 of 9").wait_for()
    assert orange() == 0, "it is marked in slice 5 alone"
    other = np.full((48, 40, 18), 40, np.uint8)
    other[4:12, 26:34, 9:14] = 220
    choose(
        page, [("later.nii", nibabel.Nifti1Image(other, np.diag([2.0, 1.0, 2.0, 1.0])).to_bytes())], "#date"
    )
    page.locator(".place", has_text="Other date, later: slice 12 of 18").wait_for()  # 4 mm above the middle
    beside.hover(force=True)
    page.mouse.wheel(0, -100)
    page.locator(".place", has_text="slice 14 of 18").wait_for()
    at_slice(page, 7, SHAPE[2])
    page.get_by_label("Window").select_option("hard")
    page.get_by_role("button", name="Up").dblclick()
    page.locator(".place", has_text="slice 16 of 18").wait_for()
    assert page.get_by_label("Window").input_value() == "hard", (
        "two presses are no double click on the picture"
    )
    box = page.get_by_role("button", name="Down").bounding_box()
    session = page.context.new_cdp_session(page)
    finger = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    for slice_ in (15, 14, 13):
        session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [finger]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        page.locator(".place", has_text=f"slice {slice_} of 18").wait_for()
    at_slice(page, 7, SHAPE[2])
    page.keyboard.press("ArrowLeft")
    page.locator(".place", has_text="slice 11 of 18").wait_for()
    assert not mask(page).any(), "what lies beside the case changes nothing of it"
    page.get_by_role("button", name="Take away").click()
    assert page.locator(".beside").count() == 0 and page.locator(".medfl-viewer canvas").count() == 1


def test_the_probability_lies_where_it_was_computed(page):
    row, column = 9, 30
    page.evaluate(
        """async ([row, column]) => {
      const { viewer } = document.getElementById("viewer"), { opened } = viewer, { count, height, width } = opened;
      const probability = new Float32Array(count * height * width);
      for (let y = row - 3; y <= row + 3; y++) {
        const at = (4 * height + y) * width + column;
        probability.fill(1, at - 3, at + 4);
      }
      await viewer.show(opened, probability, 0.5);
      await viewer.set({ overlay: "probability", opacity: 1 });
    }""",
        [row, column],
    )
    at_slice(page, 5, SHAPE[2])
    box = page.locator(".medfl-viewer canvas").bounding_box()

    def yellow(row: int, column: int) -> int:
        x, y = place(page, row, column)
        red, _, blue = seen(page)[int(y - box["y"]), int(x - box["x"])].astype(int)
        return red - blue

    assert yellow(row, column) > 100
    assert abs(yellow(SHAPE[1] - 1 - row, SHAPE[0] - 1 - column)) < 40, "the probability is turned by 180°"


def test_wheel_drag_zoom_and_reset(page):
    middle = place(page, 20, 24)
    page.mouse.move(*middle)
    page.mouse.wheel(0, 100)
    number = page.evaluate("document.getElementById('viewer').viewer.slice + 1")
    assert number in (4, 6)
    at_slice(page, number, SHAPE[2])
    page.mouse.wheel(0, -100)
    at_slice(page, 5, SHAPE[2])
    before = seen(page)
    dragged(page, middle, (middle[0] - 40, middle[1] + 25))
    assert page.get_by_label("Window").input_value() == "by hand"
    assert "width 255" not in page.locator(".words").inner_text()
    windowed = seen(page)
    assert not np.array_equal(before, windowed)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    apart = place(page, 0, 0)[0] - middle[0]
    page.mouse.dblclick(*middle)
    assert page.get_by_label("Window").input_value() == "full range"
    assert abs(place(page, 0, 0)[0] - middle[0]) < abs(apart)  # and not enlarged any more
    page.mouse.move(0, 0)
    assert np.array_equal(seen(page), before)
    where = place(page, 20, 24)
    page.keyboard.down("Shift")
    dragged(page, middle, (middle[0] + 60, middle[1]))
    page.keyboard.up("Shift")
    assert place(page, 20, 24)[0] - where[0] == pytest.approx(60, abs=12)
    page.keyboard.press("r")


def test_sides_and_proportions_are_the_patients(page):
    def bright(picture):
        return np.argwhere(np.all(abs(picture.astype(int) - 220) < 5, axis=2))[:, 1].mean() / picture.shape[1]

    canvas = page.locator(".medfl-viewer canvas").bounding_box()
    assert "left is on the right" in page.locator(".medfl-viewer canvas").get_attribute("aria-label")
    row, column = 40 - 1 - 30, 48 - 1 - 8  # of the bar's middle: the patient's left is on the right
    assert place(page, row, column)[0] > canvas["x"] + canvas["width"] / 2
    one, across, down = place(page, 10, 10), place(page, 10, 20), place(page, 20, 10)
    assert (across[0] - one[0]) / (down[1] - one[1]) == pytest.approx(2, rel=0.02)  # 2 mm wide, 1 mm tall
    radiological = bright(seen(page))
    page.get_by_role("button", name="Radiological").click()
    assert "right is on the right" in page.locator(".medfl-viewer canvas").get_attribute("aria-label")
    assert radiological > 0.5 > bright(seen(page))
    page.get_by_role("button", name="Neurological").click()
    page.get_by_role("button", name="Three planes").click()
    tiles = page.evaluate(
        """() => document.getElementById("viewer").viewer.nv.screenSlices.map(
          ({ axCorSag, leftTopWidthHeight: [, , width, height] }) => [axCorSag, width / height])"""
    )
    wide, high, deep = SHAPE[0] * SPACING[0], SHAPE[1] * SPACING[1], SHAPE[2] * SPACING[2]
    ratios = dict(tiles)  # of the axial, the coronal and the sagittal plane
    assert [ratios[k] for k in range(3)] == pytest.approx([wide / high, wide / deep, high / deep], rel=0.01)


def test_crosshairs_link_the_planes_and_the_tumour_stands_in_three_dimensions(page):
    page.get_by_role("button", name="Three planes").click()
    coronal = page.evaluate(
        """() => {
      const { nv, tools } = document.getElementById("viewer").viewer;
      const [x, y, w, h] = nv.screenSlices.find(({ axCorSag }) => axCorSag === 1).leftTopWidthHeight;
      const { left, top } = tools.canvas.getBoundingClientRect();
      return [left + (x + w / 2) / nv.uiData.dpr, top + (y + h / 18) / nv.uiData.dpr];
    }"""
    )
    page.mouse.click(*coronal)  # the uppermost slice in the coronal plane
    at_slice(page, SHAPE[2], SHAPE[2])
    page.evaluate("document.getElementById('viewer').viewer.goTo(4)")
    page.get_by_role("button", name="Axial").click()
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Size").fill("20")
    page.mouse.click(*place(page, 20, 24))
    page.get_by_role("button", name="3-D").click()
    page.wait_for_function("document.getElementById('viewer').viewer.nv.opts.sliceType === 4")
    picture = seen(page).astype(int)
    orange = (picture[..., 0] > picture[..., 2] + 60) & (picture[..., 0] > 80)
    assert orange.sum() > 100


def test_a_stroke_is_a_mask_and_can_be_undone(page):
    page.keyboard.press("e")
    page.get_by_label("Size").fill("1")
    dragged(page, place(page, 12, 20), place(page, 12, 29))
    page.get_by_text("10 pixels changed").wait_for()
    expected = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.uint8)
    expected[4, 12, 20:30] = 255
    assert np.array_equal(mask(page), expected)
    page.get_by_role("button", name="Eraser").click()
    dragged(page, place(page, 12, 25), place(page, 12, 29))
    half = expected.copy()
    half[4, 12, 25:30] = 0
    assert np.array_equal(mask(page), half)
    page.get_by_role("button", name="Undo").click()
    assert np.array_equal(mask(page), expected)
    page.keyboard.press("Control+z")
    assert not mask(page).any()
    page.keyboard.press("Control+y")
    page.get_by_role("button", name="Redo").click()
    assert np.array_equal(mask(page), half)
    assert page.locator("#figures tr", has_text="Tumour").first.inner_text().endswith("5 pixels")
    page.get_by_label("Threshold").fill("0.3")  # moves the proposal, and leaves what the reader made
    assert np.array_equal(mask(page), half)
    name, content = fetched(page, "Mask (NIfTI)")
    voxels = np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)
    assert np.array_equal(np.moveaxis(voxels, (0, 1, 2), (2, 1, 0))[:, ::-1, ::-1] * 255, half)
    page.get_by_label("Overlay").select_option("changes")
    page.get_by_text("added by you").wait_for()
    assert np.array_equal(mask(page), half)


def test_twenty_steps_go_back_and_no_more(page):
    page.keyboard.press("e")
    page.get_by_label("Size").fill("1")
    for k in range(22):
        page.mouse.click(*place(page, 5 + k, 10))
    page.get_by_text("22 pixels changed").wait_for()
    for _ in range(25):
        page.keyboard.press("Control+z")
    page.get_by_text("2 pixels changed", exact=True).wait_for()


def test_growing_filling_between_and_parts(page):
    page.keyboard.press("e")
    page.get_by_role("button", name="Grow").click()
    expected = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.uint8)
    bar = np.s_[40 - 34 : 40 - 26, 48 - 12 : 48 - 4]
    for number in (4, 6):
        page.evaluate(f"document.getElementById('viewer').viewer.goTo({number})")
        page.mouse.click(*place(page, 9, 40))
        expected[number][bar] = 255
        page.get_by_text(f"{(expected > 0).sum()} pixels changed").wait_for()
    assert np.array_equal(mask(page), expected)
    page.evaluate("document.getElementById('viewer').viewer.goTo(5)")
    page.get_by_role("button", name="Fill between slices").click()
    found = mask(page)
    assert np.array_equal(found[[4, 6]], expected[[4, 6]]) and not found[[0, 1, 2, 3, 7, 8]].any()
    agree = 2 * (found[5] & expected[4]).astype(bool).sum() / ((found[5] > 0).sum() + 64)
    assert agree > 0.8
    page.evaluate("document.getElementById('viewer').viewer.goTo(4)")
    page.mouse.click(*place(page, 40 - 12, 48 - 35))
    page.get_by_text("Parts").click()
    parts = page.locator(".parts input")
    parts.nth(1).wait_for()
    assert parts.count() == 2 and "cm³" in page.locator(".parts").inner_text()
    parts.nth(1).uncheck()
    assert np.array_equal(mask(page), found)
    page.locator(".parts input").nth(1).check()
    assert (mask(page)[4] > 0).sum() == 64 + 80


def test_axe_finds_nothing_in_light_and_dark(page, browser, address):
    axe = (ROOT / "deployment" / "viewer" / "node_modules" / "axe-core" / "axe.min.js").read_text()

    def violations(where):
        where.evaluate(axe)
        found = where.evaluate("axe.run()")["violations"]
        return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]

    page.keyboard.press("e")
    assert violations(page) == []
    page.keyboard.press("?")
    assert violations(page) == []
    page.keyboard.press("Escape")
    empty = opened(browser, address)
    empty.get_by_text("Ready.").wait_for()
    for scheme in ("light", "dark"):
        empty.emulate_media(color_scheme=scheme)
        assert violations(empty) == [], scheme
    empty.close()


def test_a_distance_is_measured_in_mm(page):
    page.keyboard.press("m")
    dragged(page, place(page, 12, 10), place(page, 12, 30))
    (told,) = page.evaluate(
        """() => document.getElementById("viewer").viewer.nv.document.completedMeasurements.map(
          ({ distance }) => distance)"""
    )
    assert told == pytest.approx(20 * SPACING[0], abs=SPACING[0])
    page.keyboard.press("Escape")


def test_unsaved_corrections_are_asked_for(page):
    page.keyboard.press("e")
    page.mouse.click(*place(page, 12, 20))
    asked = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.get_by_role("button", name="Close this case").click()
    assert len(asked) == 1 and "not downloaded" in asked[0] and page.locator("#case").is_visible()
    content = fetched(page, "All masks (ZIP)")[1]
    found = masks_of(content)
    assert found["flair_5_mask.png"].any() and not found["proposal/flair_5_mask.png"].any()
    told = json.loads(zipfile.ZipFile(io.BytesIO(content)).read("correction.json"))
    assert told["changed_pixels"] == np.sum([found[f"flair_{k}_mask.png"] > 0 for k in range(1, 10)])
    assert len(told["model_sha256"]) == 64


def test_keys_are_shown_and_a_finger_turns_slices(page):
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keys and hands").wait_for()
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    session = page.context.new_cdp_session(page)
    x, y = place(page, 20, 24)

    def touch(kind, *points):
        given = [{"x": a, "y": b, "id": k} for k, (a, b) in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": given})

    touch("touchStart", (x, y))
    for step in range(1, 4):
        touch("touchMove", (x, y - 10 * step))
    touch("touchEnd")
    at_slice(page, 7, SHAPE[2])
    before = place(page, 20, 26)[0] - place(page, 20, 22)[0]
    touch("touchStart", (x - 20, y), (x + 20, y))
    touch("touchMove", (x - 60, y), (x + 60, y))
    touch("touchEnd")
    after = place(page, 20, 26)[0] - place(page, 20, 22)[0]
    assert after / before == pytest.approx(3, rel=0.2)
