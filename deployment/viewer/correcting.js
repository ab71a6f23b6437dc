// Tools to correct the mask, apart from the pen, which is NiiVue's.

import { SLICE_TYPE } from "@niivue/niivue";

import { gapAround } from "./edits.js";

const TOUCH = 26; // neighbours: parts that touch at a corner count as one

/** The pen was lifted. NiiVue's line from point to point omits its newest point, so the last one is drawn here. */
export function endStroke(viewer) {
  const { nv } = viewer;
  if (!Number.isNaN(nv.drawPenLocation[0])) nv.drawPt(...nv.drawPenLocation, nv.opts.penValue);
  if (!viewer.compares) viewer.commit();
}

/** Paint the pixels of this slice that are connected with the crosshair's pixel and as bright, within the tolerance. */
export function grow(viewer) {
  const { nv, tolerance } = viewer;
  const at = Array.from(nv.frac2vox(nv.scene.crosshairPos)), value = nv.volumes[0].getValue(...at);
  nv.drawPenAxCorSag = SLICE_TYPE.AXIAL;
  nv.drawFloodFill(at, 1, Infinity, value - tolerance, value + tolerance, 6, Infinity, true, nv.drawBitmap);
  nv.drawPenAxCorSag = -1;
  viewer.commit();
}

/** Fill the slices without a mask around this one from those above and below. Returns whether there was such a gap. */
export function fillBetween(viewer) {
  const gap = gapAround(viewer.edits.mask, viewer.area, viewer.slice);
  if (!gap) return false;
  if (viewer.compares) viewer.set({ overlay: "fill" });
  viewer.nv.interpolateMaskSlices(...gap, { sliceType: SLICE_TYPE.AXIAL, useIntensityGuided: false });
  viewer.commit();
  return true;
}

/** The connected parts of the mask, the largest first, then those that were switched off: [{voxels: Uint32Array, on}]. */
export function parts(viewer) {
  const { count, height, width } = viewer.opened, { mask } = viewer.edits;
  const [number, labels] = viewer.nv.bwlabel(new Uint32Array(mask), Uint32Array.of(width, height, count), TOUCH, true);
  const voxels = Array.from({ length: number }, () => []);
  for (let k = 0; k < labels.length; k++) if (labels[k]) voxels[labels[k] - 1].push(k);
  const on = voxels.sort((a, b) => b.length - a.length).map((part) => ({ voxels: Uint32Array.from(part), on: true }));
  viewer.removed = viewer.removed.filter((part) => !mask[part.voxels[0]]);
  return [...on, ...viewer.removed];
}

/** Take a part out of the mask, or put it back. */
export function switchPart(viewer, part) {
  const drawing = viewer.edits.mask.slice();
  for (const k of part.voxels) drawing[k] = part.on ? 0 : 1;
  if (part.on) viewer.removed.push({ ...part, on: false });
  viewer.commit(drawing);
}
