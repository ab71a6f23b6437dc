// What the network is given of a volume whose slices are no squares around a head, by the rules of scans/field_of_view.py and
// deployment/app/framing.py, which say why.

export const FRAMED = "The network was given the scan framed like its training scans";
const TALL = 190, WIDE = 1.35, AROUND = 10, HEAD = 170, SMALLEST = 100, COARSE = 4, DISTANCE = 3; // mm; WIDE: times the head
const LEAST_HEAD = 0.01, BINS = 128;

/** Where the head lies, {start, end, told}: by slice, row and column. value: of a shown pixel's index; size: [count, height, width];
    spacing: mm between slices, rows and columns; isAxial: whether the slices were acquired so. */
export function findHead(value, size, spacing, isAxial) {
  const factors = spacing.map((mm) => Math.max(1, Math.floor(COARSE / mm + 1e-6)));
  const coarse = averaged(value, size, factors), shown = foreground(coarse.values, coarse.size);
  const start = [0, 0, 0], end = [...size], told = [];
  if (!shown) return { start, end, told };
  const mm = factors.map((factor, axis) => factor * spacing[axis]);
  const crown = mm[0] * extent(shown, coarse.size, 0, 0)[1];
  if (!isAxial && size[0] * spacing[0] > TALL) {
    start[0] = Math.floor(Math.max(0, (crown - HEAD) / spacing[0]));
    end[0] = Math.ceil(Math.min(size[0], (crown + AROUND) / spacing[0]));
    told.push(`cropped to ${HEAD} mm from the crown down`);
  }
  const from = Math.floor(Math.max(0, (crown - HEAD) / mm[0]));
  const edges = [1, 2].map((axis) => extent(shown, coarse.size, axis, from).map((edge) => edge * mm[axis]));
  const side = Math.max(...edges.map(([low, high]) => high - low)) + 2 * AROUND;
  const widest = Math.max(size[1] * spacing[1], size[2] * spacing[2]);
  if (side - 2 * AROUND >= SMALLEST && widest > WIDE * side) {
    edges.forEach(([low, high], k) => {
      const middle = (low + high) / 2, axis = k + 1;
      start[axis] = Math.floor(Math.max(0, (middle - side / 2) / spacing[axis]));
      end[axis] = Math.ceil(Math.min(size[axis], (middle + side / 2) / spacing[axis]));
    });
    told.push(`cropped to the head, ${side.toFixed(0)} of ${widest.toFixed(0)} mm`);
  }
  return { start, end, told };
}

/** How the network's slices are cut out of a case's, or null where they serve as they are. value, spacing, isAxial: as findHead has them. */
export function frameOf({ count, height, width }, value, spacing, isAxial) {
  const box = findHead(value, [count, height, width], spacing, isAxial);
  const [, rows, columns] = [0, 1, 2].map((axis) => box.end[axis] - box.start[axis]), [between, down, across] = spacing;
  const side = Math.max(rows * down, columns * across);
  const moreRows = Math.max(0, Math.floor(side / down + 0.5) - rows), moreColumns = Math.max(0, Math.floor(side / across + 0.5) - columns);
  const margins = { above: moreRows >> 1, left: moreColumns >> 1, below: moreRows - (moreRows >> 1), right: moreColumns - (moreColumns >> 1) };
  const thick = isAxial ? 1 : Math.max(1, Math.floor(DISTANCE / between + 1e-6));
  const whole = box.start.every((low) => low === 0) && box.end.every((high, axis) => high === [count, height, width][axis]);
  return whole && !moreRows && !moreColumns && thick === 1 ? null : { ...box, margins, thick };
}

/** A frame of the slices with left and right exchanged. */
export function mirrorFrame({ start, end, margins, ...others }, width) {
  return { ...others, start: [start[0], start[1], width - end[2]], end: [end[0], end[1], width - start[2]],
    margins: { ...margins, left: margins.right, right: margins.left } };
}

/** Let the network see the whole slices, as those of another task than the default were in its training. */
export function unframe(opened) {
  opened.frame = null;
  opened.notes = opened.notes.filter((note) => !note.startsWith(FRAMED));
}

/** What the network is given of a case, {pixels, count, height, width}. */
export function fedOf(opened) {
  const { frame, pixels } = opened;
  if (!frame) return opened;
  const { start, end, margins, thick } = frame, [slices, rows, columns] = [0, 1, 2].map((axis) => end[axis] - start[axis]);
  const count = Math.ceil(slices / thick), height = margins.above + rows + margins.below, width = margins.left + columns + margins.right;
  const fed = new Uint8Array(count * height * width * 3);
  for (let slice = 0; slice < count; slice++) {
    const several = Math.min(thick, slices - slice * thick);
    for (let row = 0; row < rows; row++) {
      const to = 3 * ((slice * height + margins.above + row) * width + margins.left);
      for (let k = 0; k < 3 * columns; k++) {
        let sum = 0;
        for (let one = 0; one < several; one++) {
          sum += pixels[3 * (((start[0] + slice * thick + one) * opened.height + start[1] + row) * opened.width + start[2]) + k];
        }
        fed[to + k] = Math.floor(sum / several + 0.5);
      }
    }
  }
  return { pixels: fed, count, height, width, together: opened.together };
}

/** What the network says of what it was given, Float32Array, on the case's slices: 0 outside. */
export function ontoPage(opened, { height, width }, values) {
  const { frame } = opened;
  if (!frame) return values;
  const { start, end, margins, thick } = frame, page = new Float32Array(opened.count * opened.height * opened.width);
  for (let slice = start[0]; slice < end[0]; slice++) {
    const of = Math.floor((slice - start[0]) / thick);
    for (let row = start[1]; row < end[1]; row++) {
      const from = (of * height + margins.above + row - start[1]) * width + margins.left;
      page.set(values.subarray(from, from + end[2] - start[2]), (slice * opened.height + row) * opened.width + start[2]);
    }
  }
  return page;
}

/** Blocks of so many slices, rows and columns averaged; what is left over at the ends goes. */
function averaged(value, whole, factors) {
  const [, height, width] = whole, size = whole.map((n, axis) => Math.floor(n / factors[axis]));
  const values = new Float32Array(size[0] * size[1] * size[2]), voxels = factors[0] * factors[1] * factors[2];
  let at = 0;
  for (let z = 0; z < size[0]; z++) for (let y = 0; y < size[1]; y++) for (let x = 0; x < size[2]; x++) {
    let sum = 0;
    for (let k = 0; k < factors[0]; k++) for (let j = 0; j < factors[1]; j++) {
      const row = ((z * factors[0] + k) * height + y * factors[1] + j) * width + x * factors[2];
      for (let i = 0; i < factors[2]; i++) sum += value(row + i);
    }
    values[at++] = sum / voxels;
  }
  return { values, size };
}

/** The largest connected thing that is brighter than Otsu's threshold, as a Uint8Array; null where there is hardly any. */
function foreground(values, [, rows, columns]) {
  const bright = otsu(values);
  if (bright === null) return null;
  const part = new Int32Array(values.length), waiting = [];
  let most = 0, largest = 0, parts = 0;
  const visit = (k) => { if (values[k] > bright && !part[k]) waiting.push(k), part[k] = parts; };
  for (let first = 0; first < values.length; first++) {
    if (!(values[first] > bright) || part[first]) continue;
    parts++;
    let voxels = 0;
    for (visit(first); waiting.length; voxels++) {
      const k = waiting.pop(), x = k % columns, y = Math.floor(k / columns) % rows;
      if (x > 0) visit(k - 1);
      if (x < columns - 1) visit(k + 1);
      if (y > 0) visit(k - columns);
      if (y < rows - 1) visit(k + columns);
      if (k >= rows * columns) visit(k - rows * columns);
      if (k + rows * columns < values.length) visit(k + rows * columns);
    }
    if (voxels > most) [most, largest] = [voxels, parts];
  }
  return most > LEAST_HEAD * values.length ? Uint8Array.from(part, (own) => (own === largest ? 1 : 0)) : null;
}

/** Otsu's threshold between dark and bright; null where all is the same. */
function otsu(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (!(low < high)) return null;
  const counts = new Float64Array(BINS), step = (high - low) / BINS;
  for (const value of values) counts[Math.min(BINS - 1, Math.floor((value - low) / step))]++;
  const middle = (k) => low + (k + 0.5) * step;
  const sum = counts.reduce((total, n, k) => total + n * middle(k), 0);
  let best = -1, threshold = low, below = 0, part = 0;
  for (let k = 0; k < BINS - 1; k++) {
    below += counts[k], part += counts[k] * middle(k);
    const above = values.length - below;
    const apart = below && above ? below * above * (part / below - (sum - part) / above) ** 2 : 0;
    if (apart > best) [best, threshold] = [apart, low + (k + 1) * step];
  }
  return threshold;
}

/** The first place along an axis that something shown has, and that behind the last, from a slice on. */
function extent(shown, [, rows, columns], axis, from) {
  let low = Infinity, high = 0;
  for (let k = from * rows * columns; k < shown.length; k++) {
    if (!shown[k]) continue;
    const place = axis === 0 ? Math.floor(k / (rows * columns)) : axis === 1 ? Math.floor(k / columns) % rows : k % columns;
    [low, high] = [Math.min(low, place), Math.max(high, place + 1)];
  }
  return [low, high];
}
