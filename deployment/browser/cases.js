// From the files that a reader opens to a case, by the rules of deployment/app/cases.py.

import { checkNames, checkNumber, unpackZip } from "./archives.js";
import { UserError, counted, isSizeMm, short, SIZES_MM } from "./common.js";
import { isNifti, readNifti, readNiftiMask } from "./nifti.js";
import { readMask, readSlice } from "./slices.js";

export const MAX_PIXELS = 16 * 2 ** 20; // of a case: 256 slices of 256×256
export const MAX_BYTES = 200 * 2 ** 20; // of a file
export const MIN_SIDE = 16; // pixels
const IMAGE = /\.(tiff?|png|jpe?g)$/i;
const MASK = /_mask\.(tiff?|png|jpe?g)$/i;
const SHEET = /_contact_sheet\.[^.]*$/; // of a prepared patient, to look through
const MEASURES = "volume.json"; // of a prepared patient, by the rules of spacing.py
const NUMBER = /(?:^|[_\-. ])(\d{1,18})$/;

/* A case:
   name; slices: a name for each; count, height, width; pixels: Uint8Array, count × height × width × 3;
   together: whether the slices are one volume, or each is normalised by itself; truth: Uint8Array, count × height × width,
   0 or 255, or null; spacing: mm between rows, columns and slices, or null; measured: whether the files tell it; notes; nifti:
   where the scan came from, or null. */

/** The case that [{name, bytes}] make: slices, one ZIP of slices, or a NIfTI file. Throws UserError for anything else. */
export async function readCase(files) {
  files = files.map(({ name, bytes }) => ({ name: name.replaceAll("\\", "/"), bytes }));
  const archive = files.find(({ name }) => /\.zip$/i.test(name));
  if (archive) {
    if (files.length > 1) throw new UserError(`${short(archive.name)} came with other files; open a ZIP by itself`);
    files = unpackZip(archive.name, archive.bytes);
  }
  checkNumber(files.length);
  checkNames(files.map(({ name }) => name));
  return files.some(({ name }) => isNifti(name)) ? readNifti(files) : readSlices(files);
}

const hidden = (name) => name.split("/").at(-1).startsWith(".");
const folder = (name) => name.slice(0, name.lastIndexOf("/") + 1);
const file = (name) => name.slice(folder(name).length);
const stem = (name) => file(name).replace(/\.[^.]*$/, "");
const number = (name) => stem(name).match(NUMBER)?.[1];

async function readSlices(files) {
  const images = files.filter(({ name }) => IMAGE.test(name) && !MASK.test(name) && !SHEET.test(name) && !hidden(name));
  const masks = oneEach(files.filter(({ name }) => MASK.test(name) && !hidden(name))
    .map((mask) => [folder(mask.name) + stem(mask.name).slice(0, -"_mask".length), mask]));
  if (!images.length) {
    throw new UserError("there is no slice among the files (TIFF, PNG or JPEG, not a _mask file); choose other files");
  }
  const numbered = images.filter(({ name }) => number(name) !== undefined);
  const patients = new Map(numbered.map(({ name }) => {
    const base = stem(name).replace(NUMBER, "") || folder(name).split("/").at(-2) || "";
    return [folder(name) + base, base];
  }));
  if (patients.size > 1) {
    const names = [...new Set(patients.values())].sort().slice(0, 3).join(", ");
    throw new UserError(`these are slices of ${patients.size} patients (${names}); open one at a time`);
  }
  if (numbered.length && numbered.length < images.length) {
    const odd = images.find(({ name }) => number(name) === undefined);
    throw new UserError(`${short(odd.name)} has no slice number at its end and others have; open it by itself`);
  }
  const order = numbered.length ? numbered.sort((a, b) => number(a.name) - number(b.name) || (a.name < b.name ? -1 : 1)) : images;
  const twice = order.findIndex((one, k) => k > 0 && numbered.length && Number(number(one.name)) === Number(number(order[k - 1].name)));
  if (twice > 0) {
    throw new UserError(`${short(order[twice - 1].name)} and ${short(order[twice].name)} have one slice number, and which one counts ` +
      "can't be told; leave one out");
  }
  const { width, height, pixels } = await readAll(order);
  const opened = {
    name: [...patients.values()][0] || stem(order[0].name), slices: order.map(({ name }) => file(name)), count: order.length,
    height, width, pixels, together: numbered.length > 0, truth: null, spacing: null, measured: false, notes: [], nifti: null,
  };
  const known = order.map(({ name }) => masks.get(folder(name) + stem(name)));
  const used = known.filter(Boolean).length;
  if (used) opened.truth = await readTruth(opened, known);
  if (order.length === 1 || !opened.together) {
    opened.notes.push("A lone slice is normalised by itself and not with its patient's other slices: its mask is less reliable. " +
      "Open a patient's slices together.");
  }
  if (masks.size > used) {
    const spare = masks.size - used;
    opened.notes.push(`${counted(spare, "mask")} ${spare === 1 ? "belongs" : "belong"} to no slice that was opened. Ignored.`);
  }
  const told = files.filter(({ name }) => file(name) === MEASURES);
  if (told.length > 1) {
    throw new UserError(`${told.length} files are called ${MEASURES}, and a patient has one; open one patient at a time`);
  }
  if (told.length) Object.assign(opened, { spacing: readSpacing(told[0], opened.count), measured: true });
  const left = files.length - images.length - masks.size - told.length;
  if (left) opened.notes.push(`${counted(left, "file")} ignored: neither slice nor mask.`);
  return opened;
}

/** A map of [slice, mask]. Throws UserError where two masks are of one slice. */
function oneEach(masks) {
  const found = new Map();
  for (const [slice, mask] of masks) {
    if (found.has(slice)) {
      throw new UserError(`${short(found.get(slice).name)} and ${short(mask.name)} are masks of one slice, and which one counts can't be ` +
        "told; leave one out");
    }
    found.set(slice, mask);
  }
  return found;
}

/** Millimetres between rows, columns and slices, from the volume.json of a patient of so many slices. */
function readSpacing({ name, bytes }, slices) {
  const again = "make it again with data/prepare_hospital.py, or leave it out to do without millimetres";
  let told;
  try {
    told = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    if (!("version" in told)) throw new TypeError("another file");
  } catch {
    throw new UserError(`${short(name)} is no ${MEASURES} of a prepared patient; ${again}`);
  }
  if (told.version !== 1) throw new UserError(`${short(name)} is of version ${short(`${told.version}`)}, and this page reads 1; ${again}`);
  const { spacing_mm: spacing, slice_positions_mm: positions } = told;
  if (!(Array.isArray(spacing) && spacing.length === 3 && spacing.every(isSizeMm))) {
    throw new UserError(`${short(name)} holds no three sizes of ${SIZES_MM.join(" to ")} mm as spacing_mm (between slices, row, column); ${again}`);
  }
  if (!Array.isArray(positions) || positions.length !== slices) {
    throw new UserError(`${short(name)} tells of ${positions?.length ?? 0} slices, and the patient has ${slices}; ${again}`);
  }
  return [spacing[1], spacing[2], spacing[0]];
}

/** The pixels of slices of one size, one after the other. */
async function readAll(order) {
  let width, height, pixels;
  for (const [k, { name, bytes }] of order.entries()) {
    const one = await readSlice(name, bytes);
    if (k === 0) {
      ({ width, height } = one);
      if (Math.min(width, height) < MIN_SIDE) {
        throw new UserError(`${short(name)} is ${width}×${height} pixels, too small for a slice; choose another file`);
      }
      if (order.length * width * height > MAX_PIXELS) {
        throw new UserError(`${order.length} slices of ${width}×${height} pixels are more than this page can hold; open fewer slices`);
      }
      pixels = new Uint8Array(order.length * width * height * 3);
    }
    if (one.width !== width || one.height !== height) {
      throw new UserError(`${short(name)} is ${one.width}×${one.height} pixels and ${short(order[0].name)} is ${width}×${height}; ` +
        "open slices of one size together");
    }
    pixels.set(one.pixels, k * one.pixels.length);
  }
  return { width, height, pixels };
}

/** The truth of each slice from its mask file. */
async function readTruth(opened, masks) {
  const { count, height, width } = opened;
  const truth = new Uint8Array(count * height * width);
  for (const [k, mask] of masks.entries()) {
    const name = opened.slices[k];
    if (!mask) {
      throw new UserError(`${short(name)} has no mask and other slices have; add ${short(stem(name))}_mask, or leave all masks out`);
    }
    const one = await readMask(mask.name, mask.bytes);
    if (one.width !== width || one.height !== height) {
      throw new UserError(`${short(mask.name)} is ${one.width}×${one.height} pixels and its slice is ${width}×${height}; ` +
        "choose masks of the slices' size");
    }
    truth.set(one.pixels, k * height * width);
  }
  return truth;
}

/** The truth that mask files, [{name, bytes}], give for a case that is open. A mask belongs to the slice of its name without
    `_mask`; for a lone slice any one mask does. Throws UserError where they don't fit. */
export async function readMasks(opened, files) {
  checkNumber(files.length);
  if (files.length === 1 && isNifti(files[0].name)) return readNiftiMask(opened, files[0]);
  if (files.length === 1 && opened.count === 1) return readTruth(opened, files);
  const named = files.map((mask) => [stem(mask.name).toLowerCase().replace(/_mask$/, ""), mask]);
  const slices = opened.slices.map((name) => stem(name).toLowerCase());
  if (!named.some(([slice]) => slices.includes(slice))) {
    throw new UserError("no mask has the name of a slice with _mask at its end; rename the masks, or choose others");
  }
  const masks = oneEach(named);
  return readTruth(opened, slices.map((slice) => masks.get(slice)));
}

/** The name of a slice's mask, as predict.py gives it. */
export const maskName = (name) => `${name.includes(".") ? stem(name) : name}_mask.png`;
