// NIfTI scans in and masks out, by the rules of deployment/app/nifti.py and scans/nifti_file.py.

import { readHeader } from "nifti-reader-js";

import { packGzip, unpackGzip } from "./archives.js";
import { MAX_PIXELS, MIN_SIDE } from "./cases.js";
import { UserError, isSizeMm, short } from "./common.js";
import { FRAMED, frameOf, mirrorFrame } from "./field_of_view.js";
import { affine, doubt, samePlace, turn } from "./orientation.js";

const BRIGHTEST = 0.999; // quantile of the voxels above 0 that becomes 255
const BELOW = 0.25, DARKEST = 0.005; // more of what is not 0 lies below it: 0 is not the black; the quantile that is
const MAX_LARGE = 1e15, UNLIKE = 0.01; // of a voxel's value; of a voxel's size, by which its two records may differ: borders/limits.py, scans/nifti_file.py
const WHOLE = 1e-4; // by which a label may lie beside a whole number: nifti_file.py
const HEADER = 348; // bytes
const READERS = { // by NIfTI's data type: bytes of a voxel and how one is read
  2: [1, (view, at) => view.getUint8(at)], 256: [1, (view, at) => view.getInt8(at)],
  4: [2, (view, at, little) => view.getInt16(at, little)], 512: [2, (view, at, little) => view.getUint16(at, little)],
  8: [4, (view, at, little) => view.getInt32(at, little)], 768: [4, (view, at, little) => view.getUint32(at, little)],
  16: [4, (view, at, little) => view.getFloat32(at, little)], 64: [8, (view, at, little) => view.getFloat64(at, little)],
};
const UINT8 = 2, RGB = 128, COMPLEX = [32, 1792, 2048];
const NONE = { "is ANALYZE 7.5, which does not say where left is": "convert the scan's DICOM files to NIfTI",
  "is the header of a pair (.hdr and .img)": "convert the pair to one .nii.gz file",
  "is NIfTI-2, which this page can't read": "convert it to NIfTI-1, or open it in the page with a server" };

export const isNifti = (name) => /\.nii(\.gz)?$/i.test(name);
const isTruth = (name) => /(mask|seg|segm|segmentation|labels?|glistrboost|manuallycorrected)\.nii(\.gz)?$/i.test(name) &&
  !/(brain|skull|head)[_-]?(mask|seg\w*)\.nii(\.gz)?$/i.test(name);

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
    throw new UserError(`${name} has ${size(stored.turned)}, which this page can't hold; prepare it with data/prepare_hospital.py and open the slices`);
  }
  const pixels = new Uint8Array(count * height * width * 3), notes = [];
  let odd = 0, centred = false, flair = null;
  for (let volume = 0; volume < volumes; volume++) {
    const values = stored.values(volume);
    odd += background(name, values);
    centred ||= isCentred(values, stored.isBytes);
    if (volumes === 1 || volume === 1) flair = values;
    const grey = toBytes(values, stored.isBytes);
    const { place } = stored.turned;
    for (let k = 0; k < grey.length; k++) pixels[3 * k + volume] = grey[place(k)];
  }
  if (volumes === 1) for (let k = 0; k < pixels.length; k += 3) pixels[k + 1] = pixels[k + 2] = pixels[k];
  const base = scans[0].name.split("/").at(-1).replace(/\.nii(\.gz)?$/i, "");
  const [columns, rows, between] = stored.turned.axes.map((axis) => Math.abs(header.pixDims[axis + 1]));
  const opened = {
    name: base, slices: Array.from({ length: count }, (_, k) => `${base}_${k + 1}`), count, height, width, pixels, together: true,
    truth: null, spacing: null, measured: false, oriented: !stored.doubt, notes, frame: null,
    nifti: { head: stored.head, header, turned: stored.turned },
  };
  const steps = [0, 1, 2].map((axis) => Math.hypot(...stored.turned.shown.map((row) => row[axis])));
  if ([columns, rows, between].some((size, axis) => !(Math.abs(size - steps[axis]) <= UNLIKE * steps[axis]))) {
    notes.push(`${name} tells voxels of ${[columns, rows, between].join(" × ")} mm and places them ${steps.map((mm) => +mm.toPrecision(6)).join(" × ")} ` +
      "mm apart: there are no figures in mm unless you give the sizes.");
  } else if ([rows, columns, between].every(isSizeMm)) {
    Object.assign(opened, { spacing: [rows, columns, between], measured: true });
  } else {
    notes.push(`According to the file voxels measure ${columns} × ${rows} × ${between} mm, which can't be right: there are no figures in mm ` +
      "unless you give the sizes.");
  }
  if (odd) notes.push(`${odd} values were not finite and became background.`);
  if (centred) {
    notes.push("Many values lie below 0, as after a z-score: they were brought into range, from the least to the greatest, and the " +
      "background to black.");
  }
  if (!stored.isBytes) {
    opened.notes.push("The intensities of each sequence were scaled to 0–255: 0 and below become 0, and the " +
      `${100 * BRIGHTEST} % percentile of the rest becomes 255.`);
  }
  if (stored.doubt) {
    notes.push(`Orientation unknown: ${name} ${stored.doubt}. Left and right may be exchanged; if you know which side ` +
      "is the patient's left, choose it below.");
  }
  if (opened.spacing) {
    const { place, axes } = stored.turned;
    opened.frame = frameOf(opened, (k) => flair[place(k)], [between, rows, columns], axes[2] === 2); // slices follow the last stored axis
    if (opened.frame?.told.length) {
      notes.push(`${FRAMED}, ${opened.frame.told.join(" and ")}; nothing is found outside.`);
    }
  }
  if (truths.length) {
    opened.truth = readNiftiMask(opened, truths[0]);
    const other = short(truths[0].name);
    if (areOfOthers(scans[0].name, truths[0].name)) {
      notes.push(`${other} names other numbers than ${name}: make sure that both are of one patient and one day.`);
    }
  }
  return opened;
}

/** Whether the long numbers in two files' names, of a patient or a day, differ. Research sets have one grid for all patients. */
function areOfOthers(...names) {
  const [one, other] = names.map((name) => (name.split("/").at(-1).match(/\d{3,}/g) ?? []).join(" "));
  return one !== "" && other !== "" && one !== other;
}

/** A mask of the case's shape from a NIfTI file, 0 or 255: every label above 0 is tumour. */
export function readNiftiMask(opened, file) {
  const stored = load(file);
  const { count, height, width, place } = stored.turned;
  if (count !== opened.count || height !== opened.height || width !== opened.width || stored.volumes !== 1) {
    throw new UserError(`the mask has ${size(stored.turned)} and the scan ${size(opened)}; choose the mask of this scan`);
  }
  if (opened.nifti && !samePlace(opened.nifti.turned, stored.turned)) {
    throw new UserError(`${short(file.name)} has another position than the scan, by its affine; choose the mask of this scan`);
  }
  if (!opened.nifti && stored.doubt) throw new UserError(`${short(file.name)} ${stored.doubt}, so it can't be placed on these slices; choose a mask that states it`);
  const values = stored.values(0);
  if (values.some((value) => Number.isFinite(value) && !(value >= 0 && Math.abs(value - Math.round(value)) <= WHOLE))) {
    throw new UserError(`${short(file.name)} holds values that are not labels (0, 1, 2 and so on), such as probabilities; save it as a mask`);
  }
  return Uint8Array.from({ length: values.length }, (_, k) => (values[place(k)] > 0.5 ? 255 : 0));
}

/** Exchange left and right of a case whose file does not tell them; a mask is still written voxel for voxel. */
export function mirror(opened) {
  const { count, height, width, pixels, truth } = opened, { place } = opened.nifti.turned;
  const across = (k) => k - (k % width) + width - 1 - (k % width);
  const turned = new Uint8Array(pixels.length);
  for (let k = 0; k < count * height * width; k++) turned.set(pixels.subarray(3 * across(k), 3 * across(k) + 3), 3 * k);
  opened.pixels = turned;
  opened.truth = truth && truth.map((_, k) => truth[across(k)]);
  opened.frame &&= mirrorFrame(opened.frame, width);
  opened.nifti.turned = { ...opened.nifti.turned, place: (k) => place(across(k)) };
}

const size = ({ count, height, width }) => `${count} slices of ${width}×${height} pixels`;

/** A file's header, how its voxels become axial slices (`turned`), and a function that gives one of its volumes as numbers. */
function load({ name, bytes }) {
  const broken = new UserError(`${short(name)} can't be read as NIfTI, it is damaged or something else; copy it again`);
  if ((bytes[0] === 0x1f && bytes[1] === 0x8b) || (/\.gz$/i.test(name) && bytes.length && !lengthOf(bytes))) bytes = unpackGzip(name, bytes);
  if (!bytes.length) throw new UserError(`${short(name)} is empty; copy it again`);
  const data = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  refuseOthers(name, bytes, broken);
  const header = readHeader(data.slice(0, HEADER)); // without extensions: one of negative length would be read for ever, and none is of use
  if (!header?.dims) throw broken;
  const dimensions = header.dims[0];
  if (dimensions < 3) throw new UserError(`${short(name)} has ${dimensions} dimensions, but a scan has three; choose another file`);
  const shape = header.dims.slice(1, 4);
  const length = shape[0] * shape[1] * shape[2];
  const colours = header.datatypeCode === RGB ? 3 : 1;
  if (COMPLEX.includes(header.datatypeCode)) {
    throw new UserError(`${short(name)} holds complex numbers, but a scan has real ones; export its magnitude`);
  }
  const [bytesOf, read] = READERS[colours === 3 ? UINT8 : header.datatypeCode] ?? [];
  const stacked = header.dims.slice(4, 1 + dimensions).reduce((product, side) => product * side, 1);
  const volumes = colours * stacked;
  if (!read || dimensions > 7 || !(length > 0)) throw broken;
  if (!(header.vox_offset >= HEADER + 4)) { // also NaN; some readers would take the header for voxels, and shift all others
    throw new UserError(`${short(name)} says that its voxels begin at byte ${header.vox_offset}, within its header; convert it again`);
  }
  const promised = header.vox_offset + length * volumes * bytesOf;
  if (promised > data.byteLength) {
    throw new UserError(`${short(name)} is truncated: its header promises ${promised} bytes, and it has ${data.byteLength}; copy it again`);
  }
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
  return { header, head: data.slice(0, HEADER), volumes, values, turned: turn(shape, affine(header, data)), doubt: doubt(header, data, shape),
    isBytes: bytesOf === 1 && header.datatypeCode !== 256 && slope === 1 && shift === 0 };
}

/** How long a NIfTI header is that begins so, or undefined for what is none. */
function lengthOf(bytes) {
  if (bytes.length < 4) return undefined;
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  return [348, 540].find((length) => view.getInt32(0, true) === length || view.getInt32(0, false) === length);
}

/** Throws for what is no NIfTI-1 file of header and voxels, and says what it is. */
function refuseOthers(name, bytes, broken) {
  const length = lengthOf(bytes), magic = String.fromCharCode(...bytes.subarray(344, 347));
  if (length === 348 && bytes.length >= HEADER && magic === "n+1") return;
  const [analyze, pair, second] = Object.entries(NONE);
  if (length === undefined || bytes.length < length) throw broken;
  const [what, remedy] = length === 540 ? second : magic === "ni1" ? pair : analyze;
  throw new UserError(`${short(name)} ${what}; ${remedy}`);
}

const isMeasured = (value) => Math.abs(value) <= MAX_LARGE; // false for NaN

/** Put the background's value in the place of NaN, infinity and what is too large to compute with, in `values`; how many that were. */
function background(name, values) {
  let odd = 0, least = Infinity;
  for (const value of values) if (isMeasured(value)) least = Math.min(least, value);
    else odd++;
  if (odd === values.length) throw new UserError(`${name} holds no finite value; export it again`);
  if (odd) for (let k = 0; k < values.length; k++) if (!isMeasured(values[k])) values[k] = Math.min(0, least);
  return odd;
}

/** Whether so many values lie below 0 that 0 is not the black of a sequence. */
function isCentred(values, isBytes) {
  let below = 0, there = 0;
  for (const value of values) {
    below += value < 0;
    there += value !== 0;
  }
  return !isBytes && below > BELOW * there;
}

function quantile(sorted, share) {
  const at = share * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

/** Intensities of one sequence as bytes: 0 stays 0, the brightest become 255. Bytes stay as they are. A sequence around 0 is brought
    into range first: its darkest values become 0, and what is exactly 0 as well. */
function toBytes(values, isBytes) {
  if (isBytes) return Uint8Array.from(values);
  if (isCentred(values, isBytes)) {
    const dark = Math.fround(quantile(values.filter((value) => value !== 0).sort(), DARKEST));
    values = values.map((value) => (value === 0 ? 0 : value - dark));
  }
  const above = values.filter((value) => value > 0).sort();
  const factor = 255 / Math.max(above.length ? quantile(above, BRIGHTEST) : 1, 1e-6);
  return Uint8Array.from(values, (value) => Math.round(Math.min(Math.max(value * factor, 0), 255)));
}

// of a header: data_type and db_name, descrip and aux_file, intent_name. Converters write comments, times and names of patients there
const TEXTS = [[4, 32], [148, 252], [328, 344]];

/** A mask, count × height × width of 0 or 255, as .nii.gz, voxel for voxel on the scan that was opened, 1 where there is tumour. */
export function writeNifti(opened, mask) {
  const { head, header, turned } = opened.nifti;
  const file = new Uint8Array(HEADER + 4 + mask.length); // 4 bytes that say: no extensions
  file.set(new Uint8Array(head));
  for (const [from, to] of TEXTS) file.fill(0, from, to);
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
