// A reader's corrections of a proposed mask: what was painted and erased stays when the threshold moves.

export const STEPS = 20; // that can be undone
const UNTOUCHED = -1;

export class Edits {
  /** proposal: Uint8Array of 0 and 1, what the model proposes at the threshold that is set. */
  constructor(proposal) {
    this.touched = new Int8Array(proposal.length).fill(UNTOUCHED); // else what the reader made of a voxel, 0 or 1
    this.done = [];
    this.undone = [];
    this.steps = 0; // how often the mask was changed
    this.propose(proposal);
  }

  /** Take another proposal; voxels that the reader touched stay as they are. */
  propose(proposal) {
    this.proposal = proposal;
    this.mask = proposal.slice();
    for (let k = 0; k < this.mask.length; k++) if (this.touched[k] !== UNTOUCHED) this.mask[k] = this.touched[k];
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

  /** Take the last step back. Returns whether there was one. */
  undo() {
    const step = this.done.pop();
    if (!step) return false;
    this.undone.push(step);
    this.#set(step.at, step.before);
    return true;
  }

  /** Take the last step that was undone again. Returns whether there was one. */
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
  }

  /** How many voxels differ from the proposal. */
  get changed() {
    let differ = 0;
    for (let k = 0; k < this.mask.length; k++) differ += this.mask[k] !== this.proposal[k];
    return differ;
  }
}

/** The mask that a model proposes: 1 where the probability reaches the threshold. */
export function maskOf(probability, threshold) {
  const limit = Math.fround(threshold); // as inference.to_mask compares
  return Uint8Array.from(probability, (value) => (value >= limit ? 1 : 0));
}

/** Two masks as labels: 1 only in the first, 2 only in the second, 3 in both. */
export function compared(mask, other) {
  return mask.map((value, k) => (value ? 1 : 0) + (other[k] ? 2 : 0));
}

/** The marked slices next to `slice` that have a gap between them, [lower, upper], or null: an empty slice lies within its own gap. */
export function gapAround(mask, area, slice) {
  const marked = (k) => mask.subarray(k * area, (k + 1) * area).some((value) => value > 0);
  const count = mask.length / area;
  let low = slice, high = slice;
  while (low >= 0 && !marked(low)) low--;
  while (high < count && !marked(high)) high++;
  return low < 0 || high >= count || high - low < 2 ? null : [low, high];
}
