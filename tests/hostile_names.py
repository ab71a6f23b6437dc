"""Names that do something where they are not shown as text, and what must not come of them."""

import csv
import io
from html.parser import HTMLParser

from markdown_it import MarkdownIt

NAMES = (
    "![x](https://127.0.0.1/opened)",
    "![x](http:&#47;&#47;127.0.0.1&#47;opened)",
    "[full report](https://127.0.0.1/phish)",
    "https://127.0.0.1/x www.127.example a@b.example",
    "**No tumour**",
    "# No tumour",
    "1. No tumour",
    "- No tumour",
    "> No tumour",
    "a | b |\n| --- | --- |\n# No tumour",
    "$\\frac{$ :red[x] :material/check: `x`",
    "<img src=x onerror=alert(1)><b>x</b>",
    '" onerror="alert(1)',
    "=cmd|'/C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(1)",
    "＝1+1",
    "\t=1",
    "\r=1",
    "p;=1+1",
    "p,=1+1",
    "\x1b]0;owned\x07\x1b[31mred",
    "line\nround 9 complete",
    "\u202egnp.exe",
    "\udcff\ud800",
    "\x9b31m",
)
FORMULA = tuple("=+-@＝＋－＠\t\r")
SAFE_TAGS = {"p", "code"}


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


def tags(html: str) -> list[str]:
    parser = _Tags()
    parser.feed(html)
    return parser.found


def is_one_harmless_line(text: str) -> bool:
    """Whether a terminal shows a text and nothing else happens."""
    return text.isprintable() or text.replace("\u2060", "").isprintable()


def is_plain_markdown(text: str) -> bool:
    """Whether Markdown makes nothing of a text but a paragraph, and no address in it is one."""
    made = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    return set(tags(made)) <= SAFE_TAGS and "://" not in text and "www." not in text


def runs_in_a_spreadsheet(content: str) -> list[str]:
    """The cells of a CSV text that a spreadsheet would run, whichever sign it takes for the separator."""
    cells = [cell for row in csv.reader(io.StringIO(content)) for cell in row]
    cells += [part for line in content.splitlines() for part in line.split(";")[1:]]
    return [
        cell
        for cell in cells
        if cell.lstrip().startswith(FORMULA) and not cell.strip().lstrip("+-").replace(".", "").isdigit()
    ]
