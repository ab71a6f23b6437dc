"""What the browser's tests share: node, the page's libraries, and the app's modules, which the page is held against."""

import shutil
import sys

import pytest

from running import ROOT

PAGE = ROOT / "deployment" / "browser"
sys.path[:0] = [str(ROOT / "deployment"), str(ROOT / "deployment" / "app")]


@pytest.fixture(scope="session")
def node() -> str:
    """The path of Node.js; skipped aloud where it or the page's libraries are missing."""
    path = shutil.which("node")
    if path is None or not (PAGE / "node_modules").is_dir():
        pytest.skip("no Node.js, or no libraries of the page: install it, then `make browser-libraries`")
    return path
