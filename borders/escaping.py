"""Escapes texts by others before they are shown: names of files, patients, hospitals, series and datasets, and
sentences that hold one. There is one function for each output: terminal, HTML, Markdown, CSV, and a picture's text.

Each function shows the text as it is but makes it harmless: no control code, no tag, no link or picture, no formula.
"""

import html
import re
import unicodedata
from typing import Any

# control codes, invisible marks and those that turn the direction, halves of a character, line separators
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINER = "\u2060"  # a zero-width character; it ends what Markdown would take for an address or a symbol
# without ` and a _ within a word: text between ` stays text, and such a _ means nothing
_MARKS = re.compile(r"([\\*\[\]<>|~$^]|(?<![^\W_])_|_(?![^\W_]))")
_BEGINS = re.compile(r"^(\s*)(?:(#|[+=-](?![\w.]))|(\d+)([.)])(?=\s|$))")  # a heading, a list, a line
# Excel takes a cell that begins with these for a formula; where ; separates cells, also each part of it. Full
# width signs count too.
_FORMULA = re.compile(r"(^|[;,|]|\\[trn])(\s*)(?=[=+\-@＝＋－＠])")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def plain(text: object) -> str:
    """A text in one line in which every character is visible: invisible ones are written as Python escapes them."""
    return "".join(_seen(character) if _hidden(character) else character for character in str(text))


def _hidden(character: str) -> bool:
    return character != _JOINER and unicodedata.category(character) in _UNSEEN


def _seen(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def terminal(text: object) -> str:
    """A text for a terminal or a log, in one line."""
    return plain(text)


def lines(text: object) -> str:
    """A text of several lines of our own for a terminal or a log. Names in it have passed `terminal`, or are of a
    kind that holds no line end."""
    return "\n".join(map(plain, str(text).split("\n")))


def stream(text: str) -> str:
    """A piece of a program's output for a terminal. Lines and tabs stay, and a progress bar may return to the start
    of its line."""
    again = "\r" if text.startswith("\r") else ""
    shown = ("\t".join(map(plain, line.split("\t"))) for line in text.removeprefix(again).split("\n"))
    return again + "\n".join(shown)


def web(text: object) -> str:
    """A text for HTML, within an element or a quoted attribute."""
    return html.escape(plain(text))


def markdown(text: object) -> str:
    """A text for Markdown, also for Streamlit's and for a table's cell. It makes no heading, list, link, picture,
    formula or symbol, and no address becomes a link."""
    escaped = _MARKS.sub(r"\\\1", plain(text).replace("&", "&amp;"))
    escaped = re.sub(r":(?=\S)", f":{_JOINER}", escaped)
    escaped = re.sub(r"(?i)www(?=\.)|@", lambda found: found[0] + _JOINER, escaped)
    return _BEGINS.sub(lambda b: f"{b[1]}\\{b[2]}" if b[2] else f"{b[1]}{b[3]}\\{b[4]}", escaped)


def cell(value: Any) -> Any:
    """A value for a cell of a CSV file. A text that a spreadsheet would run gets an apostrophe in front; numbers
    stay."""
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return value
    return _FORMULA.sub(r"\1\2'", plain(value))


def drawn(text: object) -> str:
    """A text for matplotlib, which would take text between two $ for a formula."""
    return plain(text).replace("$", r"\$")
