// NIfTI scans in and masks out, by the rules of deployment/app/nifti.py.

import { isNIFTI1, readHeader, Utils } from "nifti-reader-js";

import { packGzip, unpackGzip } from "./archives.js";
import { MAX_PIXELS, MIN_SIDE } from "./cases.js";
import { UserError, isSizeMm, short } from "./common.js";

const BRIGHTEST = 0.999; // quantile of the voxels above 0 that becomes 255
const HEADER = 348; // bytes
const SROW = 280; // where the header's affine begins, 3 × 4 float32
const READERS = { // by NIfTI's data type: bytes of a voxel and how one is read
  2: [1, (view, at) => view.getUint8(at)], 256: [1, (view, at) => view.getInt8(at)],
  4: [2, (view, at, little) => view.getInt16(at, little)], 512: [2, (view, at, little) => view.getUint16(at, little)],
  8: [4, (view, at, little) => view.getInt32(at, little)], 768: [4, (view, at, little) => view.getUint32(at, little)],
  16: [4, (view, at, little) => view.getFloat32(at, little)], 64: [8, (view, at, little) => view.getFloat64(at, little)],
};
const UINT8 = 2, RGB = 128;

export const isNifti = (name) => /\.nii(\.gz)?$/i.test(name);
const isTruth = (name) => /_(mask|seg)\.nii(\.gz)?$/i.test(name);

/** The case of one NIfTI file among [{name, bytes}], its axial slices from feet to head, and of its mask if that came along. */
export function readNifti(files) {
  const scans = files.filter(({ name }) => !isTruth(name)), truths = files.filter(({ name }) => isTruth(name));
  if (scans.length !== 1 || truths.length > 1 || !files.every(({ name }) => isNifti(name))) {
    throw new UserError("a NIfTI case is one scan and at most one mask (named ..._mask or ..._seg); open these alone");
  }
  const name = short(scans[0].name);
  const stored = load(scans[0]);
  const { header, volumes } = stored;
  if (volumes !== 1 && volumes !== 3) {
    throw new UserError(`${name} holds ${volumes} volumes, and a case has one, or three (pre-contrast, FLAIR and post-contrast); ` +
      "choose another file");
  }
  const { count, height, width } = stored.turned;
  if (Math.min(height, width) < MIN_SIDE || count * height * width > MAX_PIXELS) {
    throw new UserError(`${name} has ${size(stored.turned)}, which this page can't hold; crop or resample it first`);
  }
  const pixels = new Uint8Array(count * height * width * 3);
  for (let volume = 0; volume < volumes; volume++) {
    const grey = toBytes(name, stored.values(volume), stored.isBytes);
    const { place } = stored.turned;
    for (let k = 0; k < grey.length; k++) pixels[3 * k + volume] = grey[place(k)];
  }
  if (volumes === 1) for (let k = 0; k < pixels.length; k += 3) pixels[k + 1] = pixels[k + 2] = pixels[k];
  const base = scans[0].name.split("/").at(-1).replace(/\.nii(\.gz)?$/i, "");
  const [columns, rows, between] = stored.turned.axes.map((axis) => Math.abs(header.pixDims[axis + 1]));
  const opened = {
    name: base, slices: Array.from({ length: count }, (_, k) => `${base}_${k + 1}`), count, height, width, pixels, together: true,
    truth: null, spacing: null, measured: false, notes: [],
    nifti: { head: stored.head, header, turned: stored.turned },
  };
  if ([rows, columns, between].every(isSizeMm)) {
    Object.assign(opened, { spacing: [rows, columns, between], measured: true });
  } else {
    opened.notes.push(`The file tells voxels of ${columns} × ${rows} × ${between} mm, which can't be right: there are no figures in mm ` +
      "unless you give the sizes.");
  }
  if (!stored.isBytes) {
    opened.notes.push("The intensities of each sequence were scaled to 0–255: 0 and below become 0, and the " +
      `${100 * BRIGHTEST} % percentile of the rest becomes 255.`);
  }
  if (truths.length) opened.truth = readNiftiMask(opened, truths[0]);
  return opened;
}

/** A mask of the case's shape from a NIfTI file, 0 or 255: every value above 0 is tumour. */
export function readNiftiMask(opened, file) {
  const stored = load(file);
  const { count, height, width, place } = stored.turned;
  if (count !== opened.count || height !== opened.height || width !== opened.width || stored.volumes !== 1) {
    throw new UserError(`the mask has ${size(stored.turned)} and the scan ${size(opened)}; choose the mask of this scan`);
  }
  const values = stored.values(0);
  return Uint8Array.from({ length: values.length }, (_, k) => (values[place(k)] > 0 ? 255 : 0));
}

const size = ({ count, height, width }) => `${count} slices of ${width}×${height} pixels`;

/** A file's header, how its voxels become axial slices (`turned`), and a function that gives one of its volumes as numbers. */
function load({ name, bytes }) {
  const broken = new UserError(`${short(name)} can't be read as NIfTI; copy it again`);
  if (/\.gz$/i.test(name)) bytes = unpackGzip(name, bytes);
  const data = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  if (bytes.length < HEADER || !isNIFTI1(data)) throw broken;
  const header = readHeader(data);
  if (!header?.dims) throw broken;
  const dimensions = header.dims[0];
  if (dimensions < 3) throw new UserError(`${short(name)} has ${dimensions} dimensions, and a scan has three; choose another file`);
  const shape = header.dims.slice(1, 4);
  const length = shape[0] * shape[1] * shape[2];
  const colours = header.datatypeCode === RGB ? 3 : 1;
  const [bytesOf, read] = READERS[colours === 3 ? UINT8 : header.datatypeCode] ?? [];
  const stacked = header.dims.slice(4, 1 + dimensions).reduce((product, side) => product * side, 1);
  const volumes = colours * stacked;
  if (!read || dimensions > 7 || !(length > 0) || header.vox_offset + length * volumes * bytesOf > data.byteLength) throw broken;
  const scaled = Number.isFinite(header.scl_slope) && header.scl_slope !== 0;
  const slope = scaled ? header.scl_slope : 1, shift = scaled ? header.scl_inter : 0;
  const view = new DataView(data, header.vox_offset);
  const values = (volume) => {
    const out = new Float32Array(length);
    for (let k = 0; k < length; k++) {
      const at = colours === 3 ? 3 * k + volume : length * volume + k; // colours lie side by side, volumes one after the other
      out[k] = slope * read(view, at * bytesOf, header.littleEndian) + shift;
    }
    return out;
  };
  return { header, head: data.slice(0, HEADER), volumes, values, turned: turn(shape, affine(header, data)),
    isBytes: bytesOf === 1 && header.datatypeCode !== 256 && slope === 1 && shift === 0 };
}

/** The matrix from voxels to mm, 3 × 3: the header's sform if it has one, else its qform, else the pixel size with x turned. */
function affine(header, data) {
  if (header.sform_code > 0) {
    return [0, 1, 2].map((row) => [0, 1, 2].map((column) => Utils.getFloatAt(new DataView(data), SROW + 16 * row + 4 * column, header.littleEndian)));
  }
  if (header.qform_code > 0) return header.affine.slice(0, 3).map((row) => row.slice(0, 3));
  return [[-header.pixDims[1], 0, 0], [0, header.pixDims[2], 0], [0, 0, header.pixDims[3]]];
}

/** How voxels of this shape become slices from feet to head with the front at the top and the patient's left at the right:
    count, height, width, the stored axis of columns, rows and slices, and `place`, from a slice pixel's index to the voxel's.
    The stored axis that is nearest to each of the body's is taken, the best fitting first (as nibabel does it). */
export function turn(shape, matrix) {
  const lengths = [0, 1, 2].map((axis) => Math.hypot(...matrix.map((row) => row[axis])) || 1);
  const cosine = (body, axis) => matrix[body][axis] / lengths[axis];
  const best = (axis) => Math.max(...[0, 1, 2].map((body) => Math.abs(cosine(body, axis))));
  const axes = [], signs = [];
  for (const axis of [0, 1, 2].sort((a, b) => best(b) - best(a))) {
    const free = [0, 1, 2].filter((body) => axes[body] === undefined);
    const body = free.reduce((a, b) => (Math.abs(cosine(b, axis)) > Math.abs(cosine(a, axis)) ? b : a));
    axes[body] = axis;
    signs[body] = cosine(body, axis) < 0 ? -1 : 1;
  }
  const strides = [1, shape[0], shape[0] * shape[1]];
  const [width, height, count] = axes.map((axis) => shape[axis]);
  const step = axes.map((axis, body) => signs[body] * strides[axis]);
  const start = axes.reduce((sum, axis, body) => sum + (signs[body] < 0 ? (shape[axis] - 1) * strides[axis] : 0), 0);
  const place = (k) => {
    const x = k % width, y = height - 1 - (Math.floor(k / width) % height), z = Math.floor(k / (width * height));
    return start + x * step[0] + y * step[1] + z * step[2];
  };
  return { count, height, width, axes, place };
}

/** Intensities of one sequence as bytes: 0 stays 0, the brightest become 255. Bytes stay as they are. */
function toBytes(name, values, isBytes) {
  if (isBytes) return Uint8Array.from(values);
  if (!values.every(Number.isFinite)) throw new UserError(`${name} holds values that are not finite; write it again without them`);
  const above = values.filter((value) => value > 0).sort();
  let top = 1;
  if (above.length) {
    const at = BRIGHTEST * (above.length - 1), low = Math.floor(at);
    top = above[low] + (at - low) * ((above[low + 1] ?? above[low]) - above[low]);
  }
  const factor = 255 / Math.max(top, 1e-6);
  return Uint8Array.from(values, (value) => Math.round(Math.min(Math.max(value * factor, 0), 255)));
}

/** A mask, count × height × width of 0 or 255, as .nii.gz, voxel for voxel on the scan that was opened, 1 where there is tumour. */
export function writeNifti(opened, mask) {
  const { head, header, turned } = opened.nifti;
  const file = new Uint8Array(HEADER + 4 + mask.length); // 4 bytes that say: no extensions
  file.set(new Uint8Array(head));
  const view = new DataView(file.buffer), little = header.littleEndian;
  view.setInt16(40, 3, little); // three dimensions, and none beyond
  for (let beyond = 4; beyond <= 7; beyond++) view.setInt16(40 + 2 * beyond, 1, little);
  view.setInt16(70, UINT8, little);
  view.setInt16(72, 8, little); // bits of a voxel
  view.setFloat32(108, HEADER + 4, little); // where voxels begin
  view.setFloat32(112, 1, little); // slope
  view.setFloat32(116, 0, little); // intercept
  view.setFloat32(124, 0, little); // the brightest and the darkest to show: unknown
  view.setFloat32(128, 0, little);
  view.setUint8(123, 2); // mm
  file.set([0x6e, 0x2b, 0x31, 0], 344); // "n+1": header and voxels in one file
  for (let k = 0; k < mask.length; k++) file[HEADER + 4 + turned.place(k)] = mask[k] > 0 ? 1 : 0;
  return packGzip(file);
}
