"""The page in the browser, as the tests handle it."""

import io
import zipfile

import numpy as np
from PIL import Image

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
EQUAL = 0.9999  # share of the mask pixels that must be predict.py's


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


def choose(page, files, field: str = "#files") -> None:
    page.locator(field).set_input_files(
        [{"name": name, "mimeType": "application/octet-stream", "buffer": content} for name, content in files]
        if isinstance(files[0], tuple)
        else files
    )


def shown(page, count: int) -> None:
    """Wait until a case of so many slices is on the page, with its outline, and nothing moves the picture any more."""
    page.locator(".words", has_text=f"of {count}:").wait_for()
    page.locator("#cancel").wait_for(state="hidden")


def at_slice(page, number: int, count: int) -> None:
    """Wait until this slice, from 1, is shown."""
    page.locator(".words", has_text=f"Slice {number} of {count}:").wait_for()


def place(page, row: int, column: int) -> tuple[float, float]:
    """Where on the screen a pixel of the slice that is shown lies."""
    return tuple(
        page.evaluate(
            """async ([row, column]) => {
      const { nv, opened, slice, tools } = document.querySelector(".medfl-viewer").viewer, { canvas } = tools;
      const frame = () => new Promise(requestAnimationFrame);
      await frame(); // a bar that has come takes room from the picture
      while (Math.abs(canvas.height - canvas.clientHeight * nv.uiData.dpr) > 1) await frame();
      const voxel = [opened.width - 1 - column, opened.height - 1 - row, slice];
      const [x, y] = nv.frac2canvasPos(nv.vox2frac(voxel)).map((at) => at / nv.uiData.dpr);
      const { left, top } = tools.canvas.getBoundingClientRect();
      return [left + x, top + y];
    }""",
            [row, column],
        )
    )


def dragged(page, start: tuple[float, float], end: tuple[float, float], button: str = "left") -> None:
    """Drag over the picture, in eight steps."""
    page.mouse.move(*start)
    page.mouse.down(button=button)
    page.mouse.move(*end, steps=8)
    page.mouse.up(button=button)


def seen(page) -> np.ndarray:
    """The picture that the viewer shows, (h, w, 3) uint8."""
    content = page.locator(".medfl-viewer canvas").screenshot()
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def fetched(page, button: str) -> tuple[str, bytes]:
    """Name and content of the file that a download button gives."""
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    return download.value.suggested_filename, download.value.path().read_bytes()


def assert_equal_masks(found: list[np.ndarray], expected: list[np.ndarray], what: str) -> None:
    same = np.mean([one == other for one, other in zip(found, expected)])
    print(
        f"{what}: {100 * same:.4f} % of the mask pixels are predict.py's, tumour in "
        f"{np.mean(np.array(expected) > 0):.1%}"
    )
    assert len(found) == len(expected) and same >= EQUAL and np.any(expected)


def masks_of(content: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {
            name: np.asarray(Image.open(io.BytesIO(archive.read(name))))
            for name in archive.namelist()
            if name.endswith("png")
        }
