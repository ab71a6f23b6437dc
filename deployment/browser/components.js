// The connected parts of a mask in three dimensions, by the rules of evaluation/components.py.

import { perpendicularDiameters } from "./readout.js";

const LISTED = 20; // that are measured each; smaller ones together are the last
const LOW = Math.fround(0.1), HIGH = Math.fround(0.9); // probabilities, as numpy compares them
const COLUMNS = ["component", "pieces", "first_slice", "last_slice", "voxels", "volume_cm3", "volume_low_cm3", "volume_high_cm3", "diameter_mm",
  "perpendicular_mm", "diameter_px", "perpendicular_px", "diameter_slice"];

/** The components of a mask (count × height × width, above 0 is tumour), the largest first: [{number, pieces, slices: [first, last] from 1, voxels,
    low, high: the bounds of the interval, slice, diameters}]; low and high are null without a probability, as where a person drew, and the last
    two where small ones are taken together. */
export function findComponents(opened, mask, probability) {
  const { count, height, width, spacing } = opened;
  const seen = (at) => mask[at] > 0 || (probability !== null && probability[at] >= LOW);
  const box = boxOf(seen, count, height, width);
  if (!box) return [];
  const [deep, tall, wide] = box.size, voxels = deep * tall * wide;
  const inside = new Uint8Array(voxels), likely = new Uint8Array(voxels), sure = new Uint8Array(voxels);
  for (let z = 0, k = 0; z < deep; z++) for (let y = 0; y < tall; y++) {
    let at = ((box.start[0] + z) * height + box.start[1] + y) * width + box.start[2];
    for (let x = 0; x < wide; x++, k++, at++) {
      inside[k] = mask[at] > 0 ? 1 : 0;
      likely[k] = seen(at) ? 1 : 0;
      sure[k] = probability && probability[at] >= HIGH ? 1 : 0;
    }
  }
  const pieces = numbered(inside, box.size); // `inside` holds numbers from here on
  const parts = pieces.map((several, k) => ({ number: k + 1, pieces: several, voxels: 0, low: probability && 0, high: null, slices: [Infinity, 0] }));
  for (let k = 0; k < voxels; k++) {
    if (!inside[k]) continue;
    const part = parts[inside[k] - 1], slice = box.start[0] + Math.floor(k / (tall * wide)) + 1;
    part.voxels++;
    if (sure[k]) part.low++;
    if (slice < part.slices[0]) part.slices[0] = slice;
    if (slice > part.slices[1]) part.slices[1] = slice;
  }
  if (probability) reach(inside, likely, parts.length, box.size, spacing).slice(1).forEach((most, k) => (parts[k].high = most));
  return parts.map((part) => ({ ...part, ...widest(part, inside, box, spacing) }));
}

/** Where the voxels that count lie: {start, size}, by slices, rows and columns; null if none does. */
function boxOf(counts, ...shape) {
  const low = [Infinity, Infinity, Infinity], high = [-1, -1, -1];
  for (let z = 0, k = 0; z < shape[0]; z++) for (let y = 0; y < shape[1]; y++) for (let x = 0; x < shape[2]; x++, k++) {
    if (!counts(k)) continue;
    if (z < low[0]) low[0] = z;
    if (z > high[0]) high[0] = z;
    if (y < low[1]) low[1] = y;
    if (y > high[1]) high[1] = y;
    if (x < low[2]) low[2] = x;
    if (x > high[2]) high[2] = x;
  }
  return high[0] < 0 ? null : { start: low, size: high.map((place, axis) => place - low[axis] + 1) };
}

/** The regions of voxels that touch, also at a corner: {labels: from 1, in the order of their first voxels, sizes}. */
function regionsOf(marked, [deep, tall, wide]) {
  const labels = new Uint32Array(marked.length), sizes = [0], waiting = [];
  for (let seed = 0; seed < marked.length; seed++) {
    if (!marked[seed] || labels[seed]) continue;
    const label = sizes.push(0) - 1;
    labels[seed] = label;
    waiting.push(seed);
    while (waiting.length) {
      const k = waiting.pop(), z = Math.floor(k / (tall * wide)), y = Math.floor(k / wide) % tall, x = k % wide;
      sizes[label]++;
      for (let nz = Math.max(z - 1, 0); nz <= Math.min(z + 1, deep - 1); nz++)
        for (let ny = Math.max(y - 1, 0); ny <= Math.min(y + 1, tall - 1); ny++)
          for (let nx = Math.max(x - 1, 0); nx <= Math.min(x + 1, wide - 1); nx++) {
            const next = (nz * tall + ny) * wide + nx;
            if (!marked[next] || labels[next]) continue;
            labels[next] = label;
            waiting.push(next);
          }
    }
  }
  return { labels, sizes };
}

/** Turn marks into the numbers of their components, in place. Returns how many pieces each number has. */
function numbered(marked, shape) {
  const { labels, sizes } = regionsOf(marked, shape);
  const order = sizes.map((_, label) => label).slice(1).sort((one, other) => sizes[other] - sizes[one] || one - other);
  const numbers = new Uint8Array(sizes.length), pieces = [];
  order.forEach((label, rank) => {
    numbers[label] = Math.min(rank, LISTED) + 1;
    pieces[numbers[label] - 1] = (pieces[numbers[label] - 1] ?? 0) + 1;
  });
  labels.forEach((label, k) => (marked[k] = numbers[label]));
  return pieces;
}

/** How many likely voxels belong to each component, to none of them first: those that are connected with it, and where several are, those
    that are nearest to it. */
function reach(inside, likely, count, shape, spacing) {
  const { labels, sizes } = regionsOf(likely, shape), owners = sizes.map(() => new Set()), found = new Array(count + 1).fill(0);
  inside.forEach((number, k) => number && owners[labels[k]].add(number)); // every marked voxel is likely
  for (let region = 1; region < sizes.length; region++) {
    if (owners[region].size < 2) found[[...owners[region]][0] ?? 0] += sizes[region];
  }
  const [between, rows, columns] = spacing ? [spacing[2], spacing[0], spacing[1]] : [1, 1, 1];
  owners.forEach((numbers, region) => {
    if (numbers.size < 2) return;
    const own = inside.map((number, k) => (labels[k] === region ? number : 0));
    nearest(own, shape, [between, rows, columns]);
    labels.forEach((label, k) => label === region && found[own[k]]++);
  });
  return found;
}

/** Give each voxel the number of the nearest one that has a number, in place (Felzenszwalb and Huttenlocher 2012, doi:10.4086/toc.2012.v008a019:
    squared distances along one axis after the other). */
function nearest(numbers, [deep, tall, wide], steps) {
  const far = new Float64Array(numbers.length);
  numbers.forEach((number, k) => (far[k] = number ? 0 : Infinity));
  const lines = [[deep, tall * wide, steps[0]], [tall, wide, steps[1]], [wide, 1, steps[2]]];
  for (const [length, stride, step] of lines) {
    for (let from = 0; from < numbers.length; from++) {
      if (Math.floor(from / stride) % length === 0) alongLine(numbers, far, from, length, stride, step);
    }
  }
}

function alongLine(numbers, far, from, length, stride, step) {
  const at = [], starts = []; // the parabolas of the lower envelope, and where each begins
  for (let q = 0; q < length; q++) {
    const height = far[from + q * stride];
    if (height === Infinity) continue;
    let start = -Infinity;
    while (at.length) {
      const p = at.at(-1);
      start = ((height + (q * step) ** 2) - (far[from + p * stride] + (p * step) ** 2)) / (2 * step * step * (q - p));
      if (start > starts.at(-1)) break;
      at.pop();
      starts.pop();
    }
    starts.push(at.length ? start : -Infinity);
    at.push(q);
  }
  if (!at.length) return;
  const now = at.map((q) => [far[from + q * stride], numbers[from + q * stride]]);
  for (let p = 0, k = 0; p < length; p++) {
    while (k + 1 < at.length && starts[k + 1] < p) k++;
    far[from + p * stride] = now[k][0] + ((p - at[k]) * step) ** 2;
    numbers[from + p * stride] = now[k][1];
  }
}

/** {slice, diameters} of the slice in which a component's two perpendicular diameters have the largest product. */
function widest({ number, pieces, slices }, inside, { start, size: [, tall, wide] }, spacing) {
  let best = { slice: null, diameters: null };
  if (pieces > 1) return best;
  for (let slice = slices[0]; slice <= slices[1]; slice++) {
    const from = (slice - 1 - start[0]) * tall * wide;
    const mine = inside.slice(from, from + tall * wide).map((value) => (value === number ? 1 : 0));
    if (!mine.includes(1)) continue;
    const diameters = perpendicularDiameters(mine, tall, wide, spacing), [one, other] = best.diameters ?? [-1, 0];
    const product = diameters[0] * diameters[1], most = one * other;
    if (product > most || (product === most && diameters[0] > one)) best = { slice, diameters };
  }
  return best;
}

/** The components as CSV, with the app's columns: a line of empty cells where there is none. */
export function componentsText(opened, parts) {
  const voxel = opened.spacing && (opened.spacing[0] * opened.spacing[1] * opened.spacing[2]) / 1000; // cm³
  const cm3 = (voxels) => (voxel === null || voxels === null ? null : voxels * voxel);
  const lines = parts.map(({ number, pieces, slices, voxels, low, high, slice, diameters }) => {
    const [longest, across] = diameters ?? [null, null], measured = voxel === null ? [null, null, longest, across] : [longest, across, null, null];
    return [number, pieces, ...slices, voxels, cm3(voxels), cm3(low), cm3(high), ...measured, slice].map((value) => value ?? "").join(",");
  });
  return [COLUMNS.join(","), ...(lines.length ? lines : [",".repeat(COLUMNS.length - 1)]), ""].join("\n");
}
