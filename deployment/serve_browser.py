"""Serve the page that runs in the browser from this computer, with the same headers as its Space.

    python deployment/serve_browser.py
    python deployment/serve_browser.py --checkpoint models/demo/transunet_centralized_best.pth --port 8600

Without --checkpoint it uses the newest model in models/, or the one that was trained on phantoms.
"""

import argparse
import functools
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from checkpoint import load_checkpoint
from common import ROOT, MedFLError, run_script
from deployment.export_onnx import told
from deployment.staging import BROWSER, stage_browser
from runs.models import find_checkpoints


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="the model, a .pth file (default: the newest *_best.pth in models/, else the one trained on "
        "phantoms)",
    )
    parser.add_argument(
        "--single", action="store_true", help="store the weights in single precision: twice the size"
    )
    parser.add_argument("--port", type=int, default=8600, help="port on 127.0.0.1 (default 8600)")
    return parser.parse_args()


def headers(readme: Path) -> dict[str, str]:
    """The `custom_headers` in the front matter of a Space's README."""
    lines = readme.read_text(encoding="utf-8").split("---")[1].splitlines()
    start = lines.index("custom_headers:") + 1
    pairs = (line.strip().split(": ", 1) for line in lines[start:] if line.startswith("  "))
    return dict(pairs)


class Page(SimpleHTTPRequestHandler):
    """Serves the files of one folder, each with the Space's headers."""

    extensions_map = {
        ".html": "text/html",
        ".css": "text/css",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".svg": "image/svg+xml",
        ".md": "text/markdown",
        ".webmanifest": "application/manifest+json",
        "": "application/octet-stream",
    }

    def __init__(self, *given, more: dict[str, str], **named):
        self.more = more
        super().__init__(*given, **named)

    def end_headers(self) -> None:
        for name, value in self.more.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")  # there may be another model next time
        super().end_headers()

    def log_message(self, *_) -> None:
        """Print nothing about requests."""


def server(folder: Path, port: int, isolated: bool = True) -> ThreadingHTTPServer:
    """A server of a staged folder on 127.0.0.1, not running yet; isolated: with the Space's headers. Raises
    MedFLError if the port is taken."""
    page = functools.partial(
        Page, directory=str(folder), more=headers(folder / "README.md") if isolated else {}
    )
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), page)
    except (OSError, OverflowError) as error:
        raise MedFLError(f"port {port} can't be used; choose another --port") from error


def main() -> None:
    arguments = parse()
    checkpoint = load_checkpoint(arguments.checkpoint or find_checkpoints(ROOT / "models")[0])
    print(f"exporting {checkpoint.path}", flush=True)
    files, difference = stage_browser(checkpoint, not arguments.single)
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{told(difference)}\n{size:.1f} MB in {BROWSER.relative_to(ROOT).as_posix()}")
    with server(BROWSER, arguments.port) as running:
        print(f"open http://127.0.0.1:{running.server_port} (Ctrl-C ends it)", flush=True)
        running.serve_forever()


if __name__ == "__main__":
    run_script(main)
