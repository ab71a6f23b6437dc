// A reader's corrections of a proposed mask: painted and erased voxels stay when the threshold moves.

export const STEPS = 20; // steps that can be undone
const UNTOUCHED = -1;

export class Edits {
  /** proposal: Uint8Array of 0 and 1, the model's proposal at the current threshold. */
  constructor(proposal) {
    this.touched = new Int8Array(proposal.length).fill(UNTOUCHED); // otherwise the reader's value of a voxel, 0 or 1
    this.done = [];
    this.undone = [];
    this.steps = 0; // number of changes of the mask
    this.propose(proposal);
  }

  /** Take another proposal; voxels that the reader touched keep their values. */
  propose(proposal) {
    this.proposal = proposal;
    this.mask = proposal.slice();
    if (this.steps) for (let k = 0; k < this.mask.length; k++) if (this.touched[k] !== UNTOUCHED) this.mask[k] = this.touched[k];
    this.#count();
  }

  /** Make a drawing, 0 where there is no tumour, the mask. Returns whether it differed. */
  commit(drawing) {
    const at = [];
    for (let k = 0; k < drawing.length; k++) if ((drawing[k] > 0) !== (this.mask[k] > 0)) at.push(k);
    if (!at.length) return false;
    const step = { at: Uint32Array.from(at), before: Int8Array.from(at, (k) => this.touched[k]),
      after: Int8Array.from(at, (k) => (drawing[k] > 0 ? 1 : 0)) };
    this.done.push(step);
    if (this.done.length > STEPS) this.done.shift();
    this.undone = [];
    this.#set(step.at, step.after);
    return true;
  }

  /** Undo the last step. Returns whether there was one. */
  undo() {
    const step = this.done.pop();
    if (!step) return false;
    this.undone.push(step);
    this.#set(step.at, step.before);
    return true;
  }

  /** Redo the last step that was undone. Returns whether there was one. */
  redo() {
    const step = this.undone.pop();
    if (!step) return false;
    this.done.push(step);
    this.#set(step.at, step.after);
    return true;
  }

  #set(at, values) {
    this.steps++;
    at.forEach((k, index) => {
      this.touched[k] = values[index];
      this.mask[k] = values[index] === UNTOUCHED ? this.proposal[k] : values[index];
    });
    this.#count();
  }

  /** `changed`: the number of voxels that differ from the proposal. */
  #count() {
    this.changed = 0;
    if (this.steps) for (let k = 0; k < this.mask.length; k++) this.changed += this.mask[k] !== this.proposal[k];
  }
}

/** The mask that a model proposes: 1 where the probability reaches the threshold. */
export function maskOf(probability, threshold) {
  const limit = Math.fround(threshold); // compares like inference.to_mask
  const mask = new Uint8Array(probability.length);
  for (let k = 0; k < mask.length; k++) if (probability[k] >= limit) mask[k] = 1;
  return mask;
}

/** A copy of values with this number where one is not 0: `Uint8Array.from` with a function takes thirty times as long over millions. */
export function marked(values, number) {
  const mask = new Uint8Array(values.length);
  for (let k = 0; k < mask.length; k++) if (values[k]) mask[k] = number;
  return mask;
}

/** The number of voxels that a mask of 0 and 1 marks in each slice. */
export function countsOf(mask, area) {
  return Array.from({ length: mask.length / area }, (_, slice) => {
    let marked = 0;
    for (let k = slice * area; k < (slice + 1) * area; k++) marked += mask[k];
    return marked;
  });
}

/** Two masks as labels: 1 is only in the first, 2 only in the second, 3 in both. */
export function compared(mask, other) {
  const labels = marked(mask, 1);
  for (let k = 0; k < labels.length; k++) if (other[k]) labels[k] += 2;
  return labels;
}

/** The marked slices next to `slice` that have a gap between them, [lower, upper], or null: an empty slice lies within its own gap. */
export function gapAround(mask, area, slice) {
  const counts = countsOf(mask, area), count = counts.length;
  let low = slice, high = slice;
  while (low >= 0 && !counts[low]) low--;
  while (high < count && !counts[high]) high++;
  return low < 0 || high >= count || high - low < 2 ? null : [low, high];
}
