// The figures as the page words them.

import { fixed, plain } from "./common.js";
import { agreement, summary } from "./readout.js";

/** The lines of the table, [[name, value]], from the slices' rows; changed: whether a person drew in the mask; region: what is outlined. */
export function figureLines(opened, rows, changed, region) {
  const found = summary(opened, rows);
  const lines = [[region[0].toUpperCase() + region.slice(1), `${found.pixels.toLocaleString("en")} pixels`], [`Slices with ${region}`, `${found.slices} of ${found.count}`],
    [`Share of the ${opened.isBrain ? "head" : "image"}`, `${(100 * found.share).toFixed(1)} %`], ["Largest diameter", `${found.diameter.toFixed(1)} pixels`]];
  const [low, high] = found.bounds;
  if (found.pixels) {
    const [one, other] = found.widest.perpendicular.map((value) => value.toFixed(1));
    lines.push([`Perpendicular diameters (RANO), slice ${found.widest.slice}`, `${one} × ${other} ${opened.spacing ? "mm" : "pixels"}`]);
  }
  if (opened.spacing) lines.push(["Volume", `${found.cm3.toFixed(1)} cm³`], ["Largest diameter in mm", `${found.diameterMm.toFixed(1)} mm`]);
  if (!changed) { // what a person drew has no probability
    lines.push(["Between probability 0.9 and 0.1", opened.spacing ? `${found.boundsCm3[0].toFixed(1)} to ${found.boundsCm3[1].toFixed(1)} cm³`
      : `${low.toLocaleString("en")} to ${high.toLocaleString("en")} pixels`]);
  }
  if (found.dice !== undefined && found.dice !== null) {
    lines.push(["Dice with the truth", found.dice.toFixed(3)], ["IoU with the truth", found.iou.toFixed(3)]);
  }
  return lines;
}

/** The lines of the table of components, [[name, value]]. */
export function componentLines({ spacing }, parts) {
  const size = (voxels) => (spacing ? ((voxels * spacing[0] * spacing[1] * spacing[2]) / 1000).toFixed(2) : voxels.toLocaleString("en"));
  return parts.map(({ number, pieces, slices: [first, last], voxels, low, high, slice, diameters }) => {
    const name = pieces > 1 ? `${pieces} smaller ones` : `${number}, ${first === last ? `slice ${first}` : `slices ${first} to ${last}`}`;
    const between = low === null ? "" : ` (${size(low)} to ${size(high)})`;
    const across = diameters && `; ${diameters.map((length) => length.toFixed(1)).join(" × ")} ${spacing ? "mm" : "pixels"} in slice ${slice}`;
    return [name, `${size(voxels)}${between} ${spacing ? "cm³" : "voxels"}${across ?? ""}`];
  });
}

/** One sentence for a slice, from 0. */
export function sliceWords(rows, slice) {
  const row = rows[slice];
  const parts = [plain(row.file), `${row.pixels.toLocaleString("en")} pixels`, `${row.diameter.toFixed(1)} pixels across`];
  if (row.mean !== null) parts.push(`mean probability inside of the mask ${fixed(row.mean, 2)}`);
  const { dice, iou } = row.tally ? agreement(row.tally) : {};
  if (dice !== undefined && dice !== null) parts.push(`Dice ${fixed(dice, 3)}, IoU ${fixed(iou, 3)}`);
  return `Slice ${row.slice} of ${rows.length}: ${parts.join("; ")}. The probability is the network's own, not a ` +
    "measured chance of its being right.";
}
