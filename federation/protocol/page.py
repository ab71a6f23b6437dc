"""A status page: one HTML file that needs no server, no script and no other file. Every text is escaped here."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from borders import escaping
from storage.files import atomic_write

RENEW = 10  # seconds between two looks of a browser at the file
STYLE = """
:root {color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif}
body {max-width: 64rem; margin: 1.5rem auto; padding: 0 1rem}
h1 {font-size: 1.4rem; margin: 0} h2 {font-size: 1.05rem; margin: 1.6rem 0 .4rem}
p.lead {margin: .2rem 0 0; opacity: .8}
table {border-collapse: collapse; width: 100%}
th, td {text-align: left; padding: .25rem .7rem .25rem 0; vertical-align: top;
border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent)}
td {overflow-wrap: anywhere} .scroll {overflow-x: auto} svg {max-width: 100%; height: auto}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts and numbers; None is shown as a dash."""
    cells = "".join(f"<th>{_web(name)}</th>" for name in head)
    lines = ["".join(f"<td>{text(value)}</td>" for value in row) for row in rows]
    body = (
        "".join(f"<tr>{line}</tr>" for line in lines) or f'<tr><td colspan="{len(head)}">none yet</td></tr>'
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def _web(text: str) -> str:
    """A text of one line or more as HTML."""
    return "\n".join(map(escaping.web, text.split("\n")))


def text(value: object) -> str:
    """A value as HTML: escaped, numbers to three digits."""
    if value is None:
        return "–"
    return _web(f"{value:.3f}" if isinstance(value, float) else str(value))


def curve(points: Sequence[tuple[int, float]], label: str) -> str:
    """A line of values from 0 to 1 over rounds, as SVG; nothing of fewer than two."""
    if len(points) < 2:
        return ""
    first, last = points[0][0], points[-1][0]
    steps = [(40 + 540 * (n - first) / max(last - first, 1), 130 - 110 * value) for n, value in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)
    marks = "".join(
        f'<text x="0" y="{134 - 110 * y:.0f}" font-size="11" fill="currentColor">{y}</text>'
        f'<line x1="30" x2="590" y1="{130 - 110 * y:.0f}" y2="{130 - 110 * y:.0f}" stroke="currentColor" opacity=".2"/>'
        for y in (0, 0.5, 1)
    )
    return (
        f'<svg viewBox="0 0 600 150" role="img" aria-label="{_web(label)}">{marks}<polyline points="{line}" '
        f'fill="none" stroke="currentColor" stroke-width="2"/><text x="40" y="148" font-size="11" '
        f'fill="currentColor">round {first}</text><text x="530" y="148" font-size="11" fill="currentColor">round '
        f"{last}</text></svg>"
    )


def write_page(path: Path, title: str, lead: str, sections: Iterable[tuple[str, str]]) -> None:
    """Write the page, whole or not at all. sections: headings, and HTML that this module's functions made."""
    body = "".join(f"<h2>{_web(name)}</h2>{content}" for name, content in sections)
    with atomic_write(path, "w") as file:
        file.write(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{RENEW}">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_web(title)}</title><style>{STYLE}</style></head><body><h1>{_web(title)}</h1>"
            f'<p class="lead">{_web(lead)}</p>{body}</body></html>\n'
        )
