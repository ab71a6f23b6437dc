"""The texts: links lead somewhere, the reference page is that of the code, the README stays short."""

import re
import subprocess
import sys

import pytest

from common import ROOT, __version__
from docs.make_reference import PAGE, page

TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deployment" / "gateway" / "README.md"])


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings have, as GitHub and mkdocs make them."""
    heads = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", head)).strip().lower().replace(" ", "-") for head in heads
    }


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(text):
    content = re.sub(r"(?ms)^```.*?^```", "", text.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", content):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (text.parent / name).resolve() if name else text
        assert target.exists(), f"{link} in {text.name}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{link} in {text.name}"


def test_the_reference_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python docs/make_reference.py"


def test_the_readme_is_what_a_visitor_reads_in_three_minutes():
    assert 6_000 <= len((ROOT / "README.md").read_bytes()) <= 9_000


def test_the_version_is_the_same_everywhere():
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tutorial" / "index.html").exists()
