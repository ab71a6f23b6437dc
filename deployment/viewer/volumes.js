// A case as NiiVue's volumes. A case's slices begin at the front and at the patient's right; NiiVue's voxels begin at the left and the
// back. So each slice is turned by half a turn, which is its own inverse.

import { NVImage } from "@niivue/niivue";

import { CHANNELS } from "./choices.js";

const UINT8 = 2, RGB24 = 128; // NIfTI's data types

/** Values of all slices, count × area, each turned by half a turn, in their own place. */
export function turn(values, area) {
  for (let from = 0; from < values.length; from += area) values.subarray(from, from + area).reverse();
  return values;
}

/** One channel of a case, turned; for the composite all three, as red, green and blue. */
function channelOf({ pixels, count, height, width }, channel) {
  const area = height * width, wide = channel === null ? 3 : 1;
  const out = new Uint8Array(count * area * wide);
  for (let slice = 0; slice < count; slice++) {
    for (let k = 0, to = ((slice + 1) * area - 1) * wide; k < area; k++, to -= wide) {
      const from = 3 * (slice * area + k);
      if (wide === 1) out[to] = pixels[from + channel];
      else out.set(pixels.subarray(from, from + 3), to);
    }
  }
  return out;
}

async function volume({ count, height, width, spacing }, bytes, name, colormap, type = UINT8) {
  const [row, column, between] = spacing ?? [1, 1, 1]; // mm from row to row, column to column, slice to slice
  const affine = [column, 0, 0, (-column * (width - 1)) / 2, 0, row, 0, (-row * (height - 1)) / 2, 0, 0, between, (-between * (count - 1)) / 2,
    0, 0, 0, 1];
  const file = NVImage.createNiftiArray([width, height, count], [column, row, between], affine, type, bytes);
  return NVImage.new(file.buffer, `${name}.nii`, colormap, 1, null, 0, 255);
}

/** A case's channel as a volume. view: one of CHANNELS. */
export function channelVolume(opened, view) {
  const channel = CHANNELS[view];
  return volume(opened, channelOf(opened, channel), view, "gray", channel === null ? RGB24 : UINT8);
}

/** The probability as a volume of 0 to 255, dark blue to yellow. */
export function probabilityVolume(opened, probability) {
  const bytes = new Uint8Array(probability.length);
  for (let k = 0; k < bytes.length; k++) bytes[k] = Math.round(255 * probability[k]);
  return volume(opened, turn(bytes, opened.height * opened.width), "probability", "cividis");
}
