"""The files that a person checks before training: a contact sheet per study, a page of all studies, and the report
on every series."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from borders.escaping import web
from radiology.series import Refused
from radiology.studies import Study
from scans.orientation import EDGES
from storage.files import atomic_write, write_csv

TILE, ACROSS = 128, 10  # pixels of a slice's side, and slices in a row
OUTLINE, MARK = (255, 150, 0), (255, 255, 255)
SUFFIX = "_contact_sheet.png"  # scans.naming.is_image ignores these
COLUMNS = (
    "pseudonym",
    "patient_id",
    "study",
    "number",
    "description",
    "modality",
    "slices",
    "rows",
    "columns",
    "between_mm",
    "row_mm",
    "column_mm",
    "used_as",
    "why",
)
STYLE = (
    "body{font:16px/1.5 "
    "sans-serif;max-width:1340px;margin:auto;padding:1em}img{max-width:100%;background:#000}"
    "article{border-top:1px solid #999;padding:1em 0}li{color:#a30}"
)


def contact_sheet(volume: np.ndarray, mask: np.ndarray | None) -> Image.Image:
    """Ten slices from neck to crown: pre-contrast, FLAIR, post-contrast, and all three as colours with the
    mask's outline.

    volume: (S, H, W, 3) uint8. mask: (S, H, W) uint8, or None. Edges that are not aligned appear as coloured
    fringes.
    """
    chosen = np.unique(np.linspace(0, len(volume) - 1, ACROSS).round().astype(int))
    if mask is not None and mask.any() and not mask[chosen].any():  # the tumour must be visible
        largest = int(np.count_nonzero(mask, axis=(1, 2)).argmax())
        chosen[np.abs(chosen - largest).argmin()] = largest
    sheet = Image.new("RGB", (TILE * len(chosen), TILE * 4))
    for column, index in enumerate(chosen):
        rows = [np.repeat(volume[index, :, :, channel, None], 3, axis=-1) for channel in range(3)]
        rows.append(_outlined(volume[index], None if mask is None else mask[index] > 0))
        for row, pixels in enumerate(rows):
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BOX)
            pen, font = ImageDraw.Draw(tile), ImageFont.load_default(10)
            pen.text((2, TILE // 2), EDGES["left"], MARK, font, "lm")
            pen.text((TILE - 2, TILE // 2), EDGES["right"], MARK, font, "rm")
            sheet.paste(tile, (column * TILE, row * TILE))
    return sheet


def _outlined(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """A slice (H, W, 3) with the border of a mask (H, W) two pixels wide, so that it stays visible after shrinking."""
    if mask is None:
        return pixels
    around = np.pad(mask, 2)
    inner = np.all(
        [
            around[2 + dy : around.shape[0] - 2 + dy, 2 + dx : around.shape[1] - 2 + dx]
            for dy, dx in ((-2, 0), (2, 0), (0, -2), (0, 2))
        ],
        axis=0,
    )
    return np.where((mask & ~inner)[..., None], np.array(OUTLINE, np.uint8), pixels)


def write_page(entries: list[dict], path: Path) -> None:
    """Write the page of all studies. entries: name, sheet (path relative to the page), slices, mask (bool), part,
    notes."""
    articles = [
        f'<article><h2 id="{web(e["name"])}">{web(e["name"])}</h2><p>{e["slices"]} slices, '
        f"{'with a mask' if e['mask'] else 'no mask'}, {web(e['part'])}</p>"
        + (f"<ul>{''.join(f'<li>{web(note)}</li>' for note in e['notes'])}</ul>" if e["notes"] else "")
        + f'<img loading="lazy" alt="contact sheet" src="{web(e["sheet"])}"></article>'
        for e in entries
    ]
    doubtful = [f'<a href="#{web(e["name"])}">{web(e["name"])}</a>' for e in entries if e["notes"]]
    with atomic_write(path, "w") as file:
        file.write(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Prepared '
            f"studies</title><style>{STYLE}</style>"
            f"<h1>{len(entries)} prepared studies</h1><p>Rows from the top: pre-contrast, FLAIR, "
            f"post-contrast, and all three "
            "as colours with the mask's outline; slices from neck to crown, the patient's left on the "
            "right. Look for text "
            "in the pictures, coloured fringes (sequences that are not aligned), a wrong "
            "sequence, a mask in "
            f"the wrong place.</p><p>Look closely at: "
            f"{', '.join(doubtful) or 'none'}.</p>{''.join(articles)}</html>\n"
        )


def write_report(
    studies: Iterable[tuple[str, Study]], refused: list[Refused], failures: dict[str, str], path: Path
) -> None:
    """Write the report, readable only by its owner: a line per series with its use and the reason, and a line per
    refused file.

    studies: with their pseudonyms. failures: why a chosen series could not be used, by its uid.
    """
    rows = [row for name, study in studies for row in report_rows(name, study, failures)]
    write_rows([*rows, *(["", "", "", "", str(one.path), *[""] * 8, one.why] for one in refused)], path)


def report_rows(name: str, study: Study, failures: dict[str, str]) -> list[list]:
    """A study's lines in the report."""
    rows = []
    for series, used_as, why in ((line.series, line.used_as, line.why) for line in study.lines):
        if series.uid in failures:
            used_as, why = "", failures[series.uid]
        rows.append(
            [
                name,
                study.patient_id,
                study.uid,
                series.number,
                series.description,
                series.modality,
                series.slices,
                series.rows,
                series.columns,
                *(f"{v:.4g}" for v in series.spacing),
                used_as,
                why,
            ]
        )
    return rows


def write_rows(rows: list[list], path: Path) -> None:
    """Write the report's lines."""
    write_csv(path, [COLUMNS, *rows], private=True)
