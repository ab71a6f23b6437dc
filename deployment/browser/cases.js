// From the files that a reader opens to a case, by the rules of deployment/app/cases.py.

import { checkLengths, checkNames, checkNumber, unpackZip } from "./archives.js";
import { UserError, counted, isSizeMm, short, SIZES_MM } from "./common.js";
import { isDicom, readDicom } from "./dicom.js";
import { isNifti, readNifti, readNiftiMask } from "./nifti.js";
import { readMask, readSlice } from "./slices.js";

export const MAX_PIXELS = 16 * 2 ** 20; // of a case: 256 slices of 256×256
export const MAX_BYTES = 200 * 2 ** 20; // of a file
export const MIN_SIDE = 16; // pixels
const IMAGE = /\.(tiff?|png|jpe?g)$/i;
const MASK = /_mask(?:[ (].*)?\.(tiff?|png|jpe?g)$/i; // also of a copy, by the rules of scans/naming.py
const MASK_END = /_mask(?:[ (].*)?$/i;
const COPY = / (?:(?:- )?(?:copy|copie|copia|kopie)(?: ?\(?\d+\)?)?|\(.*(?:conflict|konflikt).*\))$/i;
const SHEET = /_contact_sheet\.[^.]*$/; // of a prepared patient, to look through
const MEASURES = "volume.json"; // of a prepared patient, by the rules of scans/spacing.py
const NUMBER = /[_\-. (]*(?<!\d)(\d{1,18})\)?$/; // of a slice, by the rules of scans/naming.py
const KIND_OF_SCAN = /(?:^|[^a-z])t[12]$/i;
const IMAGE_TREE = /^(images?|imagestr)$/i, MASK_TREE = /^(masks?|labels?|labelstr)$/i; // by the rules of scans/pairing.py

const convert = "is another format of volumes; convert it to .nii.gz", half = "is half of a pair (.hdr and .img); convert the pair to one .nii.gz file";
const OTHERS = { ".mgz": convert, ".mgh": convert, ".nrrd": convert, ".mha": convert, ".mhd": convert, ".img": half, ".hdr": half };

/* A case:
   name; slices: a name for each; count, height, width; pixels: Uint8Array, count × height × width × 3;
   together: whether the slices are one volume, or each is normalised by itself; truth: Uint8Array, count × height × width,
   0 or 255, or null; spacing: mm between rows, columns and slices, or null; measured: whether the files tell it; oriented:
   whether it is known that the patient's left is on each slice's right; notes; frame: how the network's slices are cut out of
   these (field_of_view.js), or null; nifti: where the scan came from, or null. */

/** The case that [{name, bytes}] make: slices, one ZIP of slices, a NIfTI file, or a DICOM series. loadDicom: gives what dicom.js needs.
    Throws UserError for anything else. */
export async function readCase(files, loadDicom) {
  files = files.map(({ name, bytes }) => ({ name: name.replaceAll("\\", "/"), bytes }));
  const archive = files.find(({ name }) => /\.zip$/i.test(name));
  if (archive) {
    if (files.length > 1) throw new UserError(`${short(archive.name)} came with other files; open a ZIP by itself`);
    files = unpackZip(archive.name, archive.bytes);
  }
  checkNumber(files.length);
  checkLengths(files.map(({ name }) => name));
  checkNames(files.map(({ name }) => name));
  const other = Object.keys(OTHERS).find((ending) => files.some(({ name }) => name.toLowerCase().endsWith(ending)));
  if (other && !files.some(({ name }) => isNifti(name))) throw new UserError(`a ${other} file ${OTHERS[other]}`);
  if (files.some(isDicom)) return readDicom(files, loadDicom);
  return files.some(({ name }) => isNifti(name)) ? readNifti(files) : readSlices(files, Boolean(archive));
}

const hidden = (name) => name.split("/").at(-1).startsWith(".");
const folder = (name) => name.slice(0, name.lastIndexOf("/") + 1);
const file = (name) => name.slice(folder(name).length);
const stem = (name) => file(name).replace(/\.[^.]*$/, "");
const number = (name) => (KIND_OF_SCAN.test(stem(name)) ? undefined : stem(name).match(NUMBER)?.[1]);
const volumeName = (name) => (number(name) === undefined ? stem(name) : stem(name).replace(NUMBER, "") || parent(name));
const parent = (name) => folder(name).split("/").at(-2) ?? "";
const isPicture = ({ name }) => IMAGE.test(name) && !SHEET.test(name) && !hidden(name);

/** Slices, the mask of each, and masks without a slice, as scans/pairing.py pairs them. */
function pair(files) {
  const pictures = files.filter(isPicture);
  const trees = new Set(pictures.flatMap(({ name }) => treesOf(name, IMAGE_TREE).map(({ tree }) => tree)));
  const images = [], masks = new Map();
  for (const picture of pictures) {
    const bare = stem(picture.name).replace(MASK_END, "");
    const found = treesOf(picture.name, MASK_TREE).flatMap(({ tree, above, rest }) => [...trees].sort()
      .filter((other) => folder(other.slice(0, -1)) === above).map((other) => other + rest))[0];
    if (found === undefined && !MASK.test(picture.name)) {
      images.push(picture);
      continue;
    }
    const wanted = (found ?? folder(picture.name)) + bare;
    if (masks.has(wanted)) {
      throw new UserError(`${short(masks.get(wanted).name)} and ${short(picture.name)} are two masks of one slice; remove one of them`);
    }
    masks.set(wanted, picture);
  }
  return { images, masks };
}

/** The folders above a file whose names fit, nearest first: {tree, above: what stands before it, rest: the folders after it}. */
function treesOf(name, fits) {
  const parts = folder(name).split("/").slice(0, -1);
  return parts.map((part, k) => ({ part, tree: `${parts.slice(0, k + 1).join("/")}/`, above: parts.slice(0, k).map((p) => `${p}/`).join(""),
    rest: parts.slice(k + 1).map((p) => `${p}/`).join("") })).filter(({ part }) => fits.test(part)).reverse();
}

/** The slices of each volume in order, by the rules of scans.naming.group_volumes. */
function groupVolumes(images, isFolder) {
  const volumes = [];
  for (const [place, inside] of grouped(images, ({ name }) => folder(name))) {
    refuseCopies(inside);
    const names = grouped(inside.filter(({ name }) => number(name) !== undefined), ({ name }) => String(Number(number(name))));
    const several = [...names.values()].some((same) => new Set(same.map(({ name }) => volumeName(name))).size > 1);
    if (isFolder(place) && !several) volumes.push(inside);
    else volumes.push(...grouped(inside, ({ name }) => volumeName(name) + (number(name) === undefined ? `/${name}` : "")).values());
  }
  volumes.forEach(refuseDoubles);
  return volumes.map((slices) => slices.sort(bySlice));
}

/** By slice number, those without one last, by name. */
function bySlice(a, b) {
  const [one, other] = [number(a.name), number(b.name)];
  if ((one === undefined) !== (other === undefined)) return one === undefined ? 1 : -1;
  return (one ?? 0) - (other ?? 0) || (a.name < b.name ? -1 : 1);
}

function refuseCopies(slices) {
  const known = new Map(slices.map(({ name }) => [stem(name), name]));
  for (const { name } of slices) {
    const original = stem(name).replace(COPY, "");
    if (original !== stem(name) && known.has(original)) {
      throw new UserError(`${short(known.get(original))} and ${short(name)} are the same slice twice; remove one of them`);
    }
  }
}

function refuseDoubles(slices) {
  const known = new Map();
  for (const { name } of [...slices].sort((a, b) => (a.name < b.name ? -1 : 1))) {
    const slice = number(name) === undefined ? stem(name) : `${volumeName(name)}/${Number(number(name))}`;
    if (known.has(slice)) throw new UserError(`${short(known.get(slice))} and ${short(name)} are the same slice twice; remove one of them`);
    known.set(slice, name);
  }
}

function grouped(items, key) {
  const groups = new Map();
  for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return groups;
}

async function readSlices(files, archive) {
  const { images, masks } = pair(files);
  if (!images.length) {
    throw new UserError("there is no slice among the files (TIFF, PNG or JPEG, not a _mask file); choose other files");
  }
  const folders = new Set(images.map(({ name }) => folder(name)).filter((place) => archive || place));
  const volumes = groupVolumes(images, (place) => folders.has(place));
  const together = number(volumes[0][0].name) !== undefined || folders.size > 0;
  if (volumes.length > 1) refuseSeveral(volumes, folders);
  const order = volumes.flat();
  const names = new Set(order.map(({ name }) => volumeName(name)));
  const { width, height, pixels } = await readAll(order);
  const opened = {
    name: names.size === 1 ? [...names][0] : parent(order[0].name) || stem(order[0].name), slices: order.map(({ name }) => file(name)), count: order.length,
    height, width, pixels, together, truth: null, spacing: null, measured: false, oriented: false, notes: [], frame: null, nifti: null,
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
    throw new UserError(`${told.length} files are called ${MEASURES}, but a patient has only one; open one patient at a time`);
  }
  if (told.length) Object.assign(opened, { spacing: readSpacing(told[0], opened.count), measured: true, oriented: true });
  const left = files.length - images.length - masks.size - told.length;
  if (left) opened.notes.push(`${counted(left, "file")} ignored: neither slice nor mask.`);
  return opened;
}

/** Throws UserError where volumes are several patients', and not lone slices that are looked at side by side. */
function refuseSeveral(volumes, folders) {
  const numbered = volumes.filter(([{ name }]) => number(name) !== undefined);
  if (numbered.length > 1 || folders.size > 1) {
    const names = volumes.map(([{ name }]) => (parent(name) ? `${parent(name).slice(0, 20)}/` : "") + short(volumeName(name))).sort().slice(0, 3);
    throw new UserError(`these are slices of ${volumes.length} patients (${names.join(", ")}); open one at a time; masks have the slice's name ` +
      "with _mask at its end");
  }
  if (numbered.length) {
    const odd = volumes.flat().find(({ name }) => number(name) === undefined);
    throw new UserError(`${short(odd.name)} has no slice number at its end, but others do; open it by itself, or the patient's folder as a ZIP`);
  }
}

/** A map of [slice, mask]. Throws UserError where two masks are of one slice. */
function oneEach(masks) {
  const found = new Map();
  for (const [slice, mask] of masks) {
    if (found.has(slice)) {
      throw new UserError(`${short(found.get(slice).name)} and ${short(mask.name)} are masks of one slice, and it is not clear which one counts; ` +
        "leave one out");
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
    throw new UserError(`${short(name)} is not the ${MEASURES} of a prepared patient; ${again}`);
  }
  if (told.version !== 1) throw new UserError(`${short(name)} has version ${short(`${told.version}`)}, but this page reads version 1; ${again}`);
  const { spacing_mm: spacing, slice_positions_mm: positions } = told;
  if (!(Array.isArray(spacing) && spacing.length === 3 && spacing.every(isSizeMm))) {
    throw new UserError(`${short(name)} holds no three sizes of ${SIZES_MM.join(" to ")} mm as spacing_mm (between slices, row, column); ${again}`);
  }
  if (!Array.isArray(positions) || positions.length !== slices) {
    throw new UserError(`${short(name)} describes ${positions?.length ?? 0} slices, but the patient has ${slices}; ${again}`);
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
  let otherForms = 0;
  for (const [k, mask] of masks.entries()) {
    const name = opened.slices[k];
    if (!mask) {
      throw new UserError(`${short(name)} has no mask, but other slices do; add ${short(stem(name))}_mask, or leave all masks out`);
    }
    const one = await readMask(mask.name, mask.bytes);
    if (one.width !== width || one.height !== height) {
      throw new UserError(`${short(mask.name)} is ${one.width}×${one.height} pixels and its slice is ${width}×${height}; ` +
        "choose masks of the slices' size");
    }
    truth.set(one.pixels, k * height * width);
    otherForms += one.otherForm;
  }
  if (otherForms) opened.notes.push(`${counted(otherForms, "mask")} with 1, or a palette, instead of 255: 1 is read as 255.`);
  return truth;
}

/** The truth that mask files, [{name, bytes}], give for a case that is open. A mask belongs to the slice of its name without
    `_mask`; for a lone slice any one mask does. Throws UserError where they don't fit. */
export async function readMasks(opened, files) {
  checkNumber(files.length);
  checkLengths(files.map(({ name }) => name));
  if (files.length === 1 && isNifti(files[0].name)) return readNiftiMask(opened, files[0]);
  if (files.length === 1 && opened.count === 1) return readTruth(opened, files);
  const named = files.map((mask) => [stem(mask.name).toLowerCase().replace(MASK_END, ""), mask]);
  const slices = opened.slices.map((name) => stem(name).toLowerCase());
  if (!named.some(([slice]) => slices.includes(slice))) {
    throw new UserError("no mask has the name of a slice with _mask at its end; rename the masks, or choose others");
  }
  const masks = oneEach(named.filter(([slice]) => slices.includes(slice)));
  return readTruth(opened, slices.map((slice) => masks.get(slice)));
}

/** The name of a slice's mask, as predict.py gives it. */
export const maskName = (name) => `${name.includes(".") ? stem(name) : name}_mask.png`;
