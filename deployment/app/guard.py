"""Middleware between Streamlit's server and the browser: it puts a content policy on every answer, keeps
uploads in memory and within limits, and removes a case's data when its page is closed."""

import asyncio
import base64
import hashlib
import os
import re
from pathlib import Path

import streamlit
from starlette.datastructures import MutableHeaders
from starlette.formparsers import MultiPartParser
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streamlit import get_option, runtime
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.websocket_session_manager import WebsocketSessionManager

from borders.limits import BUDGET, MAX_FILES

UPLOADS, MEDIA = "/_stcore/upload_file/", "/media/"
GRACE = 30.0  # seconds in which a reader can return to the open case after a broken connection
INLINE = re.compile(r"<script>(.*?)</script>", re.DOTALL)
KEEP = "/medfl/keep.js"  # the page's own script
ASKS_FIRST = (
    """// Asks before an open case is lost, lets no dropped file take the page's place, sends no file too many.
const tooMany = (files, event) => {
  if (files.length <= MOST) return;
  event.stopImmediatePropagation();
  event.preventDefault();
  alert(`${files.length} files are more than the MOST of one case; upload one patient at a time.`);
};
addEventListener("change", (event) => {
  if (event.target.type !== "file") return;
  tooMany(event.target.files, event);
  if (event.target.files.length > MOST) event.target.value = "";
}, true);
addEventListener("drop", (event) => tooMany(event.dataTransfer?.files ?? [], event), true);
addEventListener("beforeunload", (event) => {
  if (document.querySelector(".st-key-open-case")) event.preventDefault();
});
// Streamlit names its drop zones and calls them `presentation`, which contradict each other for a screen reader
new MutationObserver(() => {
  const zones = document.querySelectorAll("[data-testid=stFileUploaderDropzone][role=presentation]");
  for (const zone of zones) zone.role = "group";
}).observe(document, { childList: true, subtree: true });
for (const kind of ["dragover", "drop"]) {
  addEventListener(kind, (event) => {
    if (!event.target.closest?.("[data-testid=stFileUploaderDropzone]")) event.preventDefault();
  });
}
"""
).replace("MOST", str(MAX_FILES))
HUB = "https://huggingface.co"  # shows a Space in a frame of its own page


def content_policy() -> str:
    """The content policy: the page may load from and send to its own address only. Styles come from
    Streamlit's script; the scripts in its page are listed by their hashes."""
    page = (Path(streamlit.__file__).parent / "static" / "index.html").read_text(encoding="utf-8")
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in INLINE.findall(page)
    ]
    return "; ".join(
        [
            "default-src 'none'",
            " ".join(["script-src 'self'", *(f"'sha256-{one}'" for one in hashes)]),
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "manifest-src 'self'",
            "worker-src 'self' blob:",
            "base-uri 'none'",
            "form-action 'none'",
            f"frame-ancestors {HUB if 'SPACE_ID' in os.environ else chr(39) + 'none' + chr(39)}",
        ]
    )


def keep_uploads_in_memory() -> None:
    """Keep uploads in memory; above 1 MB they would be written to a temporary file first. Each is limited by
    Streamlit's maxUploadSize, and all together by `Guard`."""
    MultiPartParser.spool_max_size = BUDGET


class Guard:
    """ASGI middleware around Streamlit's server."""

    def __init__(self, app: ASGIApp):
        self.app, self.policy = app, content_policy()
        self._tasks: set[asyncio.Task] = set()
        keep_uploads_in_memory()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["method"] == "PUT"
            and UPLOADS in scope["path"]
            and _is_full(scope)
        ):
            refusal = PlainTextResponse("the uploads are more than this page can hold at once", 413)
            return await refusal(scope, receive, self._with_policy(scope, send))
        below = _below()
        if scope["type"] == "http" and scope["path"] == below + KEEP:
            script = Response(ASKS_FIRST, media_type="text/javascript")
            return await script(scope, receive, self._with_policy(scope, send))
        if (
            scope["type"] == "http" and scope["path"] == f"{below}/"
        ):  # unpacked, so that the script can be added to it
            rest = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
            scope, send = {**scope, "headers": rest}, _with_script(send)
        try:
            await self.app(
                scope, receive, self._with_policy(scope, send) if scope["type"] == "http" else send
            )
        finally:
            if scope["type"] == "websocket" and runtime.exists():
                task = asyncio.create_task(_end_sessions_that_stay_away())
                self._tasks.add(task)  # a task without a reference may be garbage-collected
                task.add_done_callback(self._tasks.discard)

    def _with_policy(self, scope: Scope, send: Send) -> Send:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = self.policy
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                if MEDIA in scope["path"]:
                    headers["Cache-Control"] = "no-store"
            await send(message)

        return answer


def _below() -> str:
    """The page's base path behind a proxy: `--server.baseUrlPath`, or nothing."""
    below = str(get_option("server.baseUrlPath") or "").strip("/")
    return f"/{below}" if below else ""


def _with_script(send: Send) -> Send:
    """Add the page's own script to Streamlit's page."""
    held: list[Message] = []

    async def answer(message: Message) -> None:
        held.append(message)
        if message["type"] == "http.response.start" or message.get("more_body"):
            return
        start, body = held[0], b"".join(part.get("body", b"") for part in held[1:])
        if b"</head>" in body:
            body = body.replace(b"</head>", f'<script src=".{KEEP}"></script></head>'.encode(), 1)
            MutableHeaders(scope=start)["Content-Length"] = str(len(body))
        await send(start)
        await send({"type": "http.response.body", "body": body})

    return answer


def _is_full(scope: Scope) -> bool:
    """Whether another upload would exceed the limits: `MAX_FILES` and one more for a page, so that the page
    itself can report too many files, and half of the memory budget for all pages together."""
    manager = runtime.get_instance()._uploaded_file_mgr
    if not isinstance(manager, MemoryUploadedFileManager):
        return False
    session = scope["path"].split(UPLOADS)[1].split("/")[0]
    held = list(manager.file_storage.items())
    told = dict(scope["headers"]).get(b"content-length", b"0")
    length = int(told) if told.isdigit() else 0  # Streamlit refuses a value that is not a number
    return (
        len(dict(held).get(session, ())) > MAX_FILES
        or sum(len(file.data) for _, files in held for file in list(files.values())) + length > BUDGET // 2
    )


async def _end_sessions_that_stay_away() -> None:
    """End the sessions whose page is gone now and still gone after `GRACE`: Streamlit would keep them, with
    their case, until another session replaces them."""
    manager = runtime.get_instance()._session_mgr
    if not isinstance(manager, WebsocketSessionManager):
        return
    gone = {stored.session.id for stored in manager._session_storage.list()}
    await asyncio.sleep(GRACE)
    for stored in manager._session_storage.list():
        if stored.session.id in gone:
            manager.close_session(stored.session.id)


def forget_media() -> None:
    """Remove every address of this page's pictures and downloads."""
    if runtime.exists():
        media = runtime.get_instance().media_file_mgr
        media.clear_session_refs()
        for _ in range(2):  # the first call only marks a download
            media.remove_orphaned_files()
