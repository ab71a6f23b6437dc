"""A report's figures as the table that a terminal shows."""

from pathlib import Path

from borders import escaping
from common import SMALLEST_GROUP
from evaluation.metrics import NO_INTERVAL
from storage.files import write_csv


def number(value: float | None, digits: int = 3) -> str:
    """A figure as the tables show it."""
    return "–" if value is None else f"{value:.{digits}f}"


def table_lines(figures: dict, region: str) -> list[str]:
    """A header, a line per site and a line over all patients; where a spacing is known, the same in cm³ and mm.

    figures: from `metrics.report`; region: what is outlined.
    """
    slices = f"{region} slices"
    wide = max(15, len(slices) + 2)
    lines = [
        f"{'site':8}{'patients':>9}{'Dice mean':>11}{'median':>8}{'95 % interval':>17}{'IoU':>7}{slices:>{wide}}"
        f"{'false on empty':>16}{'missed':>8}{'HD95 in the plane px':>22}{'slices of one only':>20}"
    ]
    for site, row in [*figures["sites"].items(), ("all", figures)]:
        ci95 = row["volume_dice"]["ci95"]
        interval = f"{ci95[0]:.3f} to {ci95[1]:.3f}" if ci95 else NO_INTERVAL
        lines.append(
            f"{escaping.terminal(site):8}{row['patients_scored']:>9}{number(row['volume_dice']['mean']):>11}"
            f"{number(row['volume_dice']['median']):>8}{interval:>17}{number(row['volume_iou']['mean']):>7}"
            f"{number(row['slice_dice_tumour']):>{wide}}{number(row['empty_slice_false_positive_rate']):>16}"
            f"{row['missed_patients']:>8}{number(row['hd95_in_plane_px']['mean'], 1):>22}"
            f"{row['hd95_in_plane_px']['slices_with_one_mask']:>20}"
        )
    return lines + lines_of_classes(figures) + (lines_in_mm(figures) if "volume_cm3" in figures else [])


def lines_of_classes(figures: dict) -> list[str]:
    """The volume Dice of each class over all patients; nothing for a region as a whole."""
    classes = figures.get("classes", {})
    wide = max((len(name) for name in ("class", *classes)), default=0) + 2
    lines = [f"\n{'class':{wide}}{'Dice mean':>11}{'median':>8}{'95 % interval':>17}{'patients without':>18}"]
    for name, row in classes.items():
        interval = "{:.3f} to {:.3f}".format(*row["ci95"]) if row["ci95"] else NO_INTERVAL
        lines.append(
            f"{name:{wide}}{number(row['mean']):>11}{number(row['median']):>8}{interval:>17}"
            f"{row['patients_without']:>18}"
        )
    return lines if classes else []


def lines_in_mm(figures: dict) -> list[str]:
    """Means in cm³ and mm over the patients whose spacing is known: a line per site with such patients, and a line
    over all."""
    lines = [
        f"\n{'site':8}{'with mm':>9}{'truth cm³':>11}{'predicted':>11}{'difference':>12}"
        f"{'|difference|':>14}{'HD95 mm':>9}{'undefined':>11}{'surface Dice 2 mm':>19}"
    ]
    for site, row in [*figures["sites"].items(), ("all", figures)]:
        if volume := row.get("volume_cm3"):
            lines.append(
                f"{escaping.terminal(site):8}{volume['patients']:>9}{volume['truth']:>11.2f}{volume['prediction']:>11.2f}"
                f"{volume['difference']:>+12.2f}{volume['absolute_difference']:>14.2f}"
                f"{number(row['hd95_mm']['mean'], 1):>9}{row['hd95_mm']['undefined']:>11}"
                f"{number(row['surface_dice_2mm']['mean']):>19}"
            )
    return lines


def without_mm(figures: dict) -> dict:
    """Figures of `metrics.summarise` without those that need a spacing."""
    return {
        name: value
        for name, value in figures.items()
        if name not in ("hd95_mm", "surface_dice_2mm", "volume_cm3")
    }


def write_patients(figures: dict, path: Path) -> None:
    """Write a line per patient as CSV: patient, site, slices, dice, iou, HD95 in the plane, slices with one mask,
    `metrics.FIGURES_IN_MM` where a spacing is known, and the Dice of each class where there are several."""
    patients = figures["patients"]
    write_csv(path, [list(patients[0]), *(row.values() for row in patients)])


def sites_told(figures: dict) -> dict[str, dict]:
    """The sites that a file which is handed on may tell: none of one patient or two, and not so many that those who
    are left, whose figures are all patients' less the sites', are one or two."""
    counts = {site: row["patients_scored"] for site, row in figures["sites"].items()}
    told = [site for site in sorted(counts, key=lambda site: -counts[site]) if counts[site] >= SMALLEST_GROUP]
    while told and 0 < figures["patients_scored"] - sum(counts[site] for site in told) < SMALLEST_GROUP:
        told.pop()
    return {site: figures["sites"][site] for site in sorted(told)}
