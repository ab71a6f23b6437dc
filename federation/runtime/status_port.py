"""Serves the status page to browsers on this machine."""

import functools
import http.server
import io
import threading
from pathlib import Path
from typing import BinaryIO

from common import MedFLError
from federation.protocol.log import say


class _Pages(http.server.SimpleHTTPRequestHandler):
    """Serves the files of one folder to requests whose host is this machine. A page from elsewhere can't read them
    through a name that it points at this machine."""

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        """What GET and HEAD begin with."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


def serve_status(folder: Path, port: int) -> int:
    """Serve `folder` at 127.0.0.1:PORT for as long as this process lives; returns the port. Raises MedFLError if the
    port is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", port), functools.partial(_Pages, directory=str(folder))
        )
    except (OSError, OverflowError) as error:
        raise MedFLError(f"--status-port {port} can't be listened on ({error}); choose another") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    say(f"status: http://127.0.0.1:{server.server_port}/index.html")
    return server.server_port
