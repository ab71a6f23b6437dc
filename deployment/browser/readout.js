// The figures beside the picture, by the rules of evaluation/metrics.py and deployment/app/readout.py.

import { cell } from "./common.js";

const FLAIR = 1; // channel
const LOW = 0.1, HIGH = 0.9; // probabilities: what reaches the second counts at least, what reaches the first at most

/** For each slice: how many pixels the mask has (count × height × width, above 0 is tumour), the longest line within one part of them in pixels and in mm (null
    without a spacing), the mean probability there (null if there is none), and with a truth Dice and IoU. */
export function sliceRows(opened, probability, mask) {
  const { count, height, width, truth, spacing } = opened;
  const area = height * width;
  const inside = new Uint8Array(area);
  const rows = [];
  for (let slice = 0; slice < count; slice++) {
    let pixels = 0, sum = 0;
    const tally = { both: 0, false: 0, missed: 0 }, bounds = [0, 0];
    for (let k = 0, at = slice * area; k < area; k++, at++) {
      const marked = mask[at] > 0;
      inside[k] = marked ? 1 : 0;
      if (marked && probability[at] >= HIGH) bounds[0]++;
      if (marked || probability[at] >= LOW) bounds[1]++;
      if (marked) {
        pixels++;
        sum += probability[at];
      }
      if (truth && (marked || truth[at])) tally[marked ? (truth[at] ? "both" : "false") : "missed"]++;
    }
    const perpendicular = pixels ? perpendicularDiameters(inside.slice(), height, width, spacing) : [0, 0];
    const [diameter, diameterMm] = pixels ? largestDiameters(inside, height, width, spacing) : [0, 0];
    rows.push({ slice: slice + 1, file: opened.slices[slice], pixels, share: pixels / area, diameter,
      mean: pixels ? sum / pixels : null, squareMm: spacing ? pixels * spacing[0] * spacing[1] : null,
      diameterMm: spacing ? diameterMm : null, tally: truth ? tally : null,
      bounds, perpendicular });
  }
  return rows;
}

const product = ({ perpendicular: [one, other] }) => one * other;

/** The case's figures from its slices' rows. */
export function summary(opened, rows) {
  const total = (value) => rows.reduce((sum, row) => sum + value(row), 0);
  const most = (value) => rows.reduce((top, row) => Math.max(top, value(row)), 0);
  const pixels = total((row) => row.pixels);
  const widest = rows.reduce((best, row) => (product(row) > product(best) ? row : best));
  const figures = { pixels, bounds: [total((row) => row.bounds[0]), total((row) => row.bounds[1])], widest, slices: rows.filter((row) => row.pixels).length, count: rows.length,
    share: pixels / Math.max(headPixels(opened), 1), diameter: most((row) => row.diameter) };
  if (opened.spacing) {
    const voxel = (opened.spacing[0] * opened.spacing[1] * opened.spacing[2]) / 1000; // cm³
    figures.cm3 = pixels * voxel;
    figures.boundsCm3 = figures.bounds.map((voxels) => voxels * voxel);
    figures.diameterMm = most((row) => row.diameterMm);
  }
  if (opened.truth && (opened.together || rows.length === 1)) {
    const tally = { both: total((row) => row.tally.both), false: total((row) => row.tally.false), missed: total((row) => row.tally.missed) };
    Object.assign(figures, agreement(tally));
  }
  return figures;
}

/** Dice and IoU, null where neither mask has a pixel. */
export function agreement({ both, false: wrong, missed }) {
  const either = both + wrong + missed;
  return either ? { dice: (2 * both) / (either + both), iou: both / either } : { dice: null, iou: null };
}

/** The number of pixels brighter than the mean of FLAIR, roughly the head. Counted once for a case. */
function headPixels(opened) {
  if (opened.headPixels === undefined) {
    const histogram = new Float64Array(256);
    for (let k = FLAIR; k < opened.pixels.length; k += 3) histogram[opened.pixels[k]]++;
    const all = opened.pixels.length / 3;
    const mean = histogram.reduce((sum, number, value) => sum + number * value, 0) / all;
    opened.headPixels = histogram.reduce((sum, number, value) => sum + (value > mean ? number : 0), 0);
  }
  return opened.headPixels;
}

/** The longest straight line between two pixels' centres of one connected part, in pixels and, with a spacing, in mm. Pixels that
    touch at a corner are connected. `inside` is used up. */
export function largestDiameters(inside, height, width, spacing) {
  let longest = 0, longestMm = 0;
  for (let seed = 0; seed < inside.length; seed++) {
    if (inside[seed] !== 1) continue;
    const corners = hull(partFrom(inside, seed, height, width));
    longest = Math.max(longest, farthest(corners, 1, 1));
    if (spacing) longestMm = Math.max(longestMm, farthest(corners, spacing[0], spacing[1]));
  }
  return [longest, longestMm];
}

/** The two largest perpendicular diameters, as RANO measures a tumour in a slice (Wen et al. 2010, doi:10.1200/JCO.2009.26.3541): the
    longest line of a part, and the longest that crosses its direction at a right angle, to the width of a pixel; of the part with the
    largest product. In mm with a spacing, else in pixels. `inside` is used up. */
export function perpendicularDiameters(inside, height, width, spacing) {
  const [tall, wide] = spacing ?? [1, 1];
  let most = [0, 0];
  for (let seed = 0; seed < inside.length; seed++) {
    if (inside[seed] !== 1) continue;
    const pixels = [], [one, other] = ends(hull(partFrom(inside, seed, height, width, pixels)), tall, wide);
    const longest = apart(one, other, tall, wide);
    if (!longest) continue;
    const along = [((other[0] - one[0]) * tall) / longest, ((other[1] - one[1]) * wide) / longest];
    const points = pixels.map((k) => [Math.floor(k / width) * tall, (k % width) * wide])
      .map(([y, x]) => [y * along[0] + x * along[1], x * along[0] - y * along[1]]);
    const pair = [longest, widest(points, Math.min(tall, wide))];
    if (pair[0] * pair[1] > most[0] * most[1] || most[0] === 0) most = pair;
  }
  return most;
}

/** How far points [along, across] reach across, the most within a strip of this width; strips overlap by half. */
function widest(points, width) {
  const first = points.reduce((least, [along]) => Math.min(least, along), Infinity);
  let most = 0;
  for (const offset of [0, 0.5]) {
    const strips = new Map();
    for (const [along, across] of points) {
      const strip = Math.floor((along - first) / width + offset), seen = strips.get(strip) ?? [Infinity, -Infinity];
      strips.set(strip, [Math.min(seen[0], across), Math.max(seen[1], across)]);
    }
    for (const [low, high] of strips.values()) most = Math.max(most, high - low);
  }
  return most;
}

/** The first and the last pixel of each row of the part that holds `seed`, [y, x], by rows; its pixels become 2, and go to `pixels`. */
function partFrom(inside, seed, height, width, pixels = []) {
  const ends = new Map();
  const waiting = [seed];
  inside[seed] = 2;
  while (waiting.length) {
    const at = waiting.pop();
    pixels.push(at);
    const y = Math.floor(at / width), x = at % width;
    const end = ends.get(y);
    if (!end) ends.set(y, [x, x]);
    else if (x < end[0]) end[0] = x;
    else if (x > end[1]) end[1] = x;
    for (let ny = Math.max(y - 1, 0); ny <= Math.min(y + 1, height - 1); ny++) {
      for (let nx = Math.max(x - 1, 0); nx <= Math.min(x + 1, width - 1); nx++) {
        const next = ny * width + nx;
        if (inside[next] === 1) {
          inside[next] = 2;
          waiting.push(next);
        }
      }
    }
  }
  return [...ends].sort((a, b) => a[0] - b[0]).flatMap(([y, [left, right]]) => [[y, left], [y, right]]);
}

/** The corners of the convex hull of points sorted by y, then x (Andrew's monotone chain). */
function hull(points) {
  const half = (sorted) => {
    const chain = [];
    for (const p of sorted) {
      while (chain.length > 1) {
        const [o, a] = chain.slice(-2);
        if ((a[0] - o[0]) * (p[1] - o[1]) - (a[1] - o[1]) * (p[0] - o[0]) > 0) break;
        chain.pop();
      }
      chain.push(p);
    }
    return chain;
  };
  return [...half(points), ...half(points.toReversed())];
}

const apart = ([y, x], [v, u], tall, wide) => Math.hypot((y - v) * tall, (x - u) * wide);
const farthest = (points, tall, wide) => apart(...ends(points, tall, wide), tall, wide);

/** The two of the points that are farthest apart. */
function ends(points, tall, wide) {
  let found = [points[0], points[0]];
  for (const one of points) for (const other of points) if (apart(one, other, tall, wide) > apart(...found, tall, wide)) found = [one, other];
  return found;
}

/** The slices' rows as CSV, with the columns of the app's. */
export function csvText(rows) {
  const columns = { slice: (r) => r.slice, file: (r) => cell(r.file), tumour_pixels: (r) => r.pixels, share_of_slice: (r) => r.share,
    largest_diameter_px: (r) => r.diameter, mean_probability: (r) => r.mean };
  if (rows[0].squareMm !== null) Object.assign(columns, { tumour_mm2: (r) => r.squareMm, largest_diameter_mm: (r) => r.diameterMm });
  if (rows[0].tally) Object.assign(columns, { dice: (r) => agreement(r.tally).dice, iou: (r) => agreement(r.tally).iou });
  const lines = rows.map((row) => Object.values(columns).map((value) => value(row) ?? "").join(","));
  return [Object.keys(columns).join(","), ...lines, ""].join("\n");
}
