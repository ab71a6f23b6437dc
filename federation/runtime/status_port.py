"""The status page, shown to browsers of this machine."""

import functools
import http.server
import threading
from pathlib import Path

from common import MedFLError
from federation.protocol.log import say


class _Pages(http.server.SimpleHTTPRequestHandler):
    """Files of one folder, for callers that name this machine: a page elsewhere can't read them by a name that
    it lets point here."""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            self.send_error(403)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def serve_status(folder: Path, port: int) -> int:
    """Show `folder` at 127.0.0.1:PORT for as long as this process lives; the port. Raises MedFLError where
    somebody listens there."""
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
