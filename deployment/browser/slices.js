// From a file's bytes to pixels, as scans/pictures.py reads them: 8-bit grey or RGB, one picture, of a sensible size.

import { decode as decodePng, encode as encodePng } from "fast-png";
import { decode as decodeTiff } from "tiff";

import { plainPng, tiffAsksForMore, tiffUnpacksToMore } from "./bounds.js";
import { UserError, short } from "./common.js";

const MAX_SIDE = 4096; // pixels
const TIFF_TYPES = [0, 1, 2, 3], TIFF_PALETTE = 3; // photometric interpretations: white is zero, black is zero, RGB, palette
const PNG_PALETTE = 3; // colour type

/** A slice: {width, height, pixels: Uint8Array of height × width × 3}. A grey picture fills all three channels. */
export async function readSlice(name, bytes) {
  const { width, height, channels, data } = await decoded(name, bytes);
  if (holdsMore(channels, data)) {
    throw new UserError(`${short(name)} has more channels than a slice, which is grey or RGB; save it with the right three`);
  }
  const pixels = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; to < pixels.length; from += channels, to += 3) {
    pixels[to] = data[from];
    pixels[to + 1] = data[channels > 2 ? from + 1 : from]; // a channel beyond grey or RGB is alpha, and is left out
    pixels[to + 2] = data[channels > 2 ? from + 2 : from];
  }
  return { width, height, pixels };
}

/** Whether a channel beyond grey or RGB holds measurements, such as a fourth sequence, and not transparency: that is all or nothing, or
 *  the same everywhere. */
function holdsMore(channels, data) {
  if (channels > 4) return true;
  if (channels % 2) return false;
  const alpha = data.filter((_, k) => k % channels === channels - 1);
  return alpha.some((value) => value !== alpha[0]) && alpha.some((value) => value !== 0 && value !== 255);
}

/** A mask: {width, height, pixels: Uint8Array of height × width, 0 or 255, otherForm: whether it was stored as 0 and 1}. */
export async function readMask(name, bytes) {
  const { width, height, channels, data } = await decoded(name, bytes);
  const pixels = new Uint8Array(width * height);
  for (let k = 0; k < pixels.length; k++) {
    pixels[k] = data[k * channels];
    if (channels > 2 && (data[k * channels + 1] !== pixels[k] || data[k * channels + 2] !== pixels[k])) {
      throw new UserError(`${short(name)} has colours, but a mask is grey: 0, and 255 for what is outlined; save it again`);
    }
  }
  const most = pixels.reduce((one, other) => Math.max(one, other), 0);
  if (most === 1) return { width, height, pixels: pixels.map((value) => 255 * value), otherForm: true };
  const odd = pixels.find((value) => value !== 0 && value !== 255);
  if (odd !== undefined) {
    throw new UserError(`${short(name)} has the value ${odd}, and a mask holds 0 and 255 only, or 0 and 1; write it ` +
      "again, with 255 for what is outlined");
  }
  return { width, height, pixels, otherForm: false };
}

/** A mask's pixels, width × height of 0 or 255, as the bytes of a PNG. */
export function maskPng(pixels, width, height) {
  return encodePng({ width, height, data: pixels, channels: 1, depth: 8 });
}

async function decoded(name, bytes) {
  const signature = String.fromCharCode(...bytes.subarray(0, 4));
  const turned = orientation(bytes);
  if (turned > 1) {
    throw new UserError(`${short(name)} is shown turned or mirrored by viewers (its orientation tag is ${turned}), and a mask could ` +
      "lie on either; save it as it is shown, without the tag");
  }
  try {
    if (signature === "II*\0" || signature === "MM\0*") return fromTiff(name, bytes);
    if (signature === "\x89PNG") return fromPng(name, bytes);
    if (signature.startsWith("\xff\xd8\xff")) return await fromJpeg(name, bytes);
  } catch (error) {
    if (error instanceof UserError) throw error;
    // the decoders throw many kinds of errors for a damaged file
  }
  throw new UserError(`${short(name)} can't be read as a picture (truncated or another format); copy it again`);
}

/** How a viewer turns a picture before it shows it (2 to 8), by its EXIF or TIFF tag; 1 where nothing, or nothing readable, is said. */
function orientation(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    if (view.getUint16(0) !== 0xffd8) return ofTags(view, view.getUint32(0) === 0x89504e47 ? pngExif(view) : 0);
    for (let at = 2; view.getUint16(at) !== 0xffda; at += 2 + view.getUint16(at + 2)) {
      if (view.getUint16(at) === 0xffe1 && view.getUint32(at + 4) === 0x45786966) return ofTags(view, at + 10); // "Exif"
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // it ends too early, as its reader will say
  }
  return 1;
}

/** Where a PNG's EXIF begins. Throws RangeError where there is none. */
function pngExif(view) {
  let at = 8;
  while (view.getUint32(at + 4) !== 0x65584966) at += 12 + view.getUint32(at); // "eXIf"
  return at + 8;
}

/** The orientation among the tags of the TIFF at `start`. */
function ofTags(view, start) {
  const little = view.getUint16(start) === 0x4949, from = start + view.getUint32(start + 4, little);
  for (let k = 0; k < view.getUint16(from, little); k++) {
    const entry = from + 2 + 12 * k;
    if (view.getUint16(entry, little) === 274) return view.getUint16(entry + 8, little);
  }
  return 1;
}

function checkSize(name, width, height) {
  if (Math.max(width, height) > MAX_SIDE) {
    throw new UserError(`${short(name)} is ${width}×${height} pixels, but a slice has at most ${MAX_SIDE} a side; shrink it first`);
  }
}

function refuseType(name, what) {
  throw new UserError(`${short(name)} has ${what}, but a slice has 8-bit grey or RGB; convert it first`);
}

function fromTiff(name, bytes) {
  if (tiffAsksForMore(bytes)) {
    throw new UserError(`${short(name)} holds tags, tiles or pictures that are more than the file or a slice can have; save the picture again`);
  }
  const pages = decodeTiff(bytes, { ignoreImageData: true });
  const page = pages[0];
  checkSize(name, page.width, page.height);
  if (pages.length > 1) {
    throw new UserError(`${short(name)} holds ${pages.length} pictures, but a slice is one; save each as its own file`);
  }
  const bits = page.bitsPerSample ?? 1;
  if (!TIFF_TYPES.includes(page.type)) refuseType(name, "other colours");
  if (bits !== 8) refuseType(name, bits === 1 ? "1 bit a pixel" : `${bits} bits a channel`);
  if (page.sampleFormat !== 1) refuseType(name, "signed or fractional numbers a channel");
  if (page.planarConfiguration !== 1 || (page.tiled && page.samplesPerPixel > 1) || page.fillOrder !== 1) {
    throw new UserError(`${short(name)} keeps its channels apart, in tiles, or its bits the other way round, which this page can't read; ` +
      "save it in another way");
  }
  if (tiffUnpacksToMore(bytes, page)) throw new Error("unpacks to more than it shows");
  const [picture] = decodeTiff(bytes);
  let { data, samplesPerPixel: channels } = picture;
  if (page.type === TIFF_PALETTE) {
    const palette = picture.palette;
    data = Uint8Array.from({ length: 3 * data.length }, (_, k) => palette[data[Math.floor(k / 3)]][k % 3] >> 8);
    channels = 3;
  }
  return { width: picture.width, height: picture.height, channels, data };
}

function fromPng(name, bytes) {
  const header = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  checkSize(name, header.getUint32(16), header.getUint32(20));
  const bits = header.getUint8(24);
  if (bits === 16) refuseType(name, "16 bits a channel");
  if (String.fromCharCode(...bytes.subarray(0, 512)).includes("acTL")) {
    throw new UserError(`${short(name)} is animated, but a slice is one picture; save each as its own file`);
  }
  const picture = decodePng(plainPng(bytes), { checkCrc: true });
  const { width, height, palette } = picture;
  const values = bits === 8 ? picture.data : unpacked(picture, bits);
  if (header.getUint8(25) === PNG_PALETTE) {
    const data = Uint8Array.from({ length: 3 * values.length }, (_, k) => palette[values[Math.floor(k / 3)]][k % 3]);
    return { width, height, channels: 3, data };
  }
  const most = 2 ** bits - 1;
  const data = bits === 8 ? values : values.map((value) => Math.round((255 * value) / most));
  return { width, height, channels: picture.channels, data };
}

/** Samples of 1, 2 or 4 bits, one channel, each in a byte of its own; a row starts at a byte. */
function unpacked({ data, width, height }, bits) {
  const values = new Uint8Array(width * height);
  const line = Math.ceil((width * bits) / 8);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const at = x * bits;
      values[y * width + x] = (data[y * line + (at >> 3)] >> (8 - bits - (at & 7))) & (2 ** bits - 1);
    }
  }
  return values;
}

async function fromJpeg(name, bytes) {
  const { width, height, components } = jpegFrame(bytes);
  checkSize(name, width, height);
  if (components !== 1 && components !== 3) refuseType(name, `${components} colour channels`);
  const end = String.fromCharCode(...bytes.subarray(-64));
  if (!end.includes("\xff\xd9")) throw new Error("truncated"); // a browser would show the part that is there
  const picture = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none", imageOrientation: "none" });
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  return { width, height, channels: 4, data: context.getImageData(0, 0, width, height).data };
}

/** Size and number of components, from a JPEG's start-of-frame segment. */
function jpegFrame(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 2; ;) {
    const marker = view.getUint16(at);
    const isFrame = marker >= 0xffc0 && marker <= 0xffcf && ![0xffc4, 0xffc8, 0xffcc].includes(marker);
    if (isFrame) return { height: view.getUint16(at + 5), width: view.getUint16(at + 7), components: view.getUint8(at + 9) };
    at += 2 + view.getUint16(at + 2);
  }
}
