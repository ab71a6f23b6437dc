"""The page's server in a real Chromium: hostile names and large uploads, what the browser may ask for, and
what is left once a case or its page is closed."""

import asyncio
import io
import json
import re
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hostile_names import NAMES
from pages import shown
from PIL import Image
from running import ROOT
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.serving import served
from checkpoint import describe, save_checkpoint
from deployment.app import guard
from transunet import TransUNet

HOSTILE = [name.replace("/", "&#47;").replace("\\", "").encode("utf-8", "replace").decode() for name in NAMES]


def png(shade: int = 40) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 60, 40)).save(file, "PNG")
    return file.getvalue()


def zipped(names: list[str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(f"scan/{name}", png(number))
    return file.getvalue()


def test_large_uploads_stay_in_memory():
    """Starlette's parser, as Streamlit uses it, once the guard stands before it."""
    guard.keep_uploads_in_memory()
    body = (
        b"--b\r\nContent-Disposition: form-data; name=f; filename=a.nii\r\n\r\n"
        + bytes(3 << 20)
        + b"\r\n--b--\r\n"
    )
    scope = {
        "type": "http",
        "method": "PUT",
        "headers": [(b"content-type", b"multipart/form-data; boundary=b")],
    }

    async def parse() -> bool:
        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        form = await Request(scope, receive).form()
        return form["f"].file._rolled

    assert asyncio.run(parse()) is False


def test_the_policy_names_no_other_address_and_allows_no_foreign_script():
    policy = dict(part.split(" ", 1) for part in guard.content_policy().split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'self'( 'sha256-[\w+/=]+')+", policy["script-src"])
    assert "http" not in " ".join(policy.values())


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    torch.manual_seed(0)
    network = TransUNet("tiny", 32)
    about = describe(
        network, origin={"kind": "centralised"}, data={"name": NAMES[0], "train": {"patients": 3}}
    )
    save_checkpoint(folder / "m_best.pth", network.state_dict(), json.loads(json.dumps(about)))
    with served(ROOT, folder / "m_best.pth", folder / "streamlit.log") as (where, _):
        yield where


@pytest.fixture
def page(browser, address):
    made = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    made.asked, made.refused = [], []
    made.on("request", lambda request: made.asked.append(request.url))
    made.on(
        "console", lambda line: made.refused.append(line.text) if "Content Security" in line.text else None
    )
    made.set_default_timeout(60_000)
    made.answer = made.goto(address)
    made.locator("input[type=file]").first.wait_for(state="attached")
    yield made
    made.close()


def choose(page, name: str, content: bytes) -> None:
    page.locator("input[type=file]").first.set_input_files(
        [{"name": name, "mimeType": "application/octet-stream", "buffer": content}]
    )


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_names_call_nobody_and_are_shown_as_text(page, address):
    patient = HOSTILE[1]
    choose(page, "slices.zip", zipped([f"{patient}_{number}.png" for number in (1, 2)]))
    page.get_by_role("button", name="Close this case").wait_for()
    shown(page, 2)
    assert page.get_by_role("heading", name="![x](http:").count() == 1
    page.get_by_role("button", name="Close this case").click()
    page.get_by_text("Try a sample").wait_for()
    for hostile in HOSTILE[:4]:
        page.goto(address)
        page.locator("input[type=file]").first.wait_for(state="attached")
        choose(page, "two.zip", zipped([f"{hostile}_1.png", "b_1.png"]))
        page.get_by_text("these are slices of 2 patients").wait_for()
        alert = page.get_by_test_id("stAlertContentError")
        assert alert.locator("a, img, h1, h2, strong, li").count() == 0
    own = (address, "data:", "blob:", address.replace("http", "ws"))
    assert [url for url in page.asked if not url.startswith(own)] == []
    assert page.refused == [], "Streamlit needs what the policy forbids"
    assert page.answer.headers["content-security-policy"] == guard.content_policy()


@pytest.mark.slow
def test_the_policy_stops_what_the_page_would_send(page):
    send = "fetch('http://127.0.0.1:9/x').then(() => 'sent', () => 'refused')"
    assert page.evaluate(send) == "refused"
    assert any("connect-src" in line for line in page.refused)


@pytest.mark.slow
def test_addresses_end_with_the_case(page, address):
    before = len(page.asked)
    choose(page, "one.zip", zipped(["c_1.png", "c_2.png"]))
    shown(page, 2)
    assert not [url for url in page.asked[before:] if url.startswith(f"{address}/media/")]
    with page.expect_download() as download:
        page.get_by_role("button", name="Figures (CSV)").click()
    download.value.path()
    media = [url for url in page.asked if "/media/" in url and url.endswith(".csv")]
    assert media and status(media[0]) == 200
    page.get_by_role("button", name="Close this case").click()
    page.get_by_text("Try a sample").wait_for()
    until = time.monotonic() + 20
    while status(media[0]) != 404 and time.monotonic() < until:
        page.wait_for_timeout(100)
    assert status(media[0]) == 404


@pytest.mark.slow
def test_too_many_files_are_refused_before_they_are_sent(page):
    told = []
    page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.accept()))
    page.evaluate("""() => {
      const list = new DataTransfer();
      for (let k = 0; k < 1001; k++) list.items.add(new File(["x"], `a_${k}.png`));
      const field = document.querySelector("input[type=file]");
      field.files = list.files;
      field.dispatchEvent(new Event("change", {bubbles: true}));
    }""")
    assert told == ["1001 files are more than the 1000 of one case; upload one patient at a time."]
    assert not [url for url in page.asked if "upload_file" in url]


@pytest.mark.slow
def test_an_open_case_is_not_left_without_a_question(page):
    """A reload asks, and a file that is dropped beside the fields does not take the page's place."""
    drop = """where => !document.querySelector(where).dispatchEvent(
        new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: new DataTransfer()}))"""
    assert page.evaluate(drop, "h1") is True and page.evaluate(drop, "body") is True
    asked = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    choose(page, "one.zip", zipped(["c_1.png", "c_2.png"]))
    shown(page, 2)
    page.locator(".medfl-viewer canvas").click()  # a browser asks only those who did something
    with page.expect_event("dialog"):
        page.evaluate("setTimeout(() => location.reload())")
    assert asked == ["beforeunload"] and page.locator(".words", has_text="of 2:").is_visible()
    page.get_by_role("button", name="Close this case").click()
    page.get_by_text("Try a sample").wait_for()
    page.reload()
    page.get_by_text("Try a sample").wait_for()
    assert asked == ["beforeunload"] and page.refused == []


@pytest.mark.parametrize("below", ["", "tools/medfl"])
def test_the_pages_own_script_is_there_below_somebodys_path(monkeypatch, below):
    monkeypatch.setattr(guard, "get_option", lambda name: below)
    place = f"/{below}" if below else ""

    async def streamlit_page(scope, receive, send):
        await Response(b"<head></head>", media_type="text/html")(scope, receive, send)

    def answer(path: str) -> bytes:
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        # in a thread of its own: Playwright's tests may have left a loop in this one
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, guard.Guard(streamlit_page)(scope, None, send)).result()
        return b"".join(message.get("body", b"") for message in sent)

    assert f'src=".{guard.KEEP}"'.encode() in answer(f"{place}/")
    assert b"beforeunload" in answer(place + guard.KEEP)
