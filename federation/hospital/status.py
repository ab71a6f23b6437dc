"""A hospital's own status page: the lines of its terminal, and how far it is."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from common import MedFLError, utc_now
from federation.hospital.identity import Identity
from federation.protocol import page
from federation.protocol.log import terminal
from storage.files import write_json

KEPT = 50  # lines


class _Lines(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def shown(identity: Identity, folder: Path) -> Iterator[None]:
    """What is said within the block goes onto the hospital's page, `status/LABEL.html` among its own files. A
    page that can't be written ends nothing.

    folder: where the lines so far are kept.
    """
    heard, log = _Lines(), terminal()  # which shows the lines as well
    log.addHandler(heard)
    try:
        yield
    finally:
        log.removeHandler(heard)
        if heard.lines:
            with contextlib.suppress(MedFLError, OSError, ValueError):
                _renew(identity, folder / "status.json", heard.lines)


def _renew(identity: Identity, kept: Path, lines: list[str]) -> None:
    former = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    now = utc_now().replace("T", " ")[:19]
    events = [*former, *([now, line] for line in lines)][-KEPT:]
    write_json(kept, events)
    page.write_page(
        identity.models / "status" / f"{identity.label}.html",
        f"MedFL: {identity.label}",
        f"{events[-1][1]} ({now} UTC)",
        [("This hospital's terminal", page.table(("time (UTC)", "line"), reversed(events)))],
    )
