// What a picture may ask for, looked at before its decoder allocates it, by the rules of borders/limits.py.

import { Unzlib } from "fflate";

const MAX_PICTURES = 1000, MAX_SIDE = 4096; // of a TIFF; pixels
const MAX_SCANS = 100; // passes in which a JPEG is refined; each decodes the whole picture again
const TIFF_BYTES = [0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4]; // of a value by its type
const TILE = [322, 323], ENTRY = 12; // tags of a tile's columns and rows; bytes of a tag
const DEFLATED = [8, 32946]; // compressions of a TIFF
const NEEDED = ["IHDR", "PLTE", "IDAT", "IEND"]; // of a PNG's chunks; others may unpack to anything

/** Whether a JPEG is refined in more than MAX_SCANS passes, which take seconds per kilobyte. */
export function hasManyScans(bytes) {
  let scans = 0;
  for (let at = bytes.indexOf(0xff); at >= 0; at = bytes.indexOf(0xff, at + 1)) scans += bytes[at + 1] === 0xda;
  return scans > MAX_SCANS;
}

/** Whether a TIFF holds countless pictures, tiles that are larger than any slice, or tags that claim more bytes than the file has. */
export function tiffAsksForMore(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const little = view.getUint16(0) === 0x4949;
  let place = view.getUint32(4, little);
  for (let picture = 0; picture < MAX_PICTURES; picture++) {
    if (place === 0 || place + 2 > bytes.length) return false; // the last one, or cut off, as its reader will say
    const end = place + 2 + ENTRY * view.getUint16(place, little);
    if (end > bytes.length) return true;
    let claimed = 0;
    for (let at = place + 2; at < end; at += ENTRY) {
      const type = view.getUint16(at + 2, little), count = view.getUint32(at + 4, little);
      claimed += (TIFF_BYTES[type] ?? 0) * count;
      const value = type === 3 ? view.getUint16(at + 8, little) : view.getUint32(at + 8, little);
      if (TILE.includes(view.getUint16(at, little)) && value > MAX_SIDE) return true;
    }
    if (claimed > bytes.length) return true;
    place = end + 4 <= bytes.length ? view.getUint32(end, little) : 0;
  }
  return true;
}

/** Whether the packed pixels of a TIFF's picture, as its decoder tells it without them, unpack to more than twice what it shows. */
export function tiffUnpacksToMore(bytes, page) {
  if (!DEFLATED.includes(page.compression)) return false;
  const most = pixelBytes(page.width, page.height, (page.samplesPerPixel ?? 1) * 8);
  const places = page.stripOffsets ?? page.tileOffsets, sizes = page.stripByteCounts ?? page.tileByteCounts;
  return unpackedLength(Array.from(places, (place, k) => bytes.subarray(place, place + sizes[k])), most, true) > most;
}

/** A PNG without the chunks that nobody reads. Throws RangeError where it is cut off, or its pixels unpack to more than it shows. */
export function plainPng(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const kept = [bytes.subarray(0, 8)], packed = [];
  for (let at = 8, name = ""; name !== "IEND"; ) {
    const end = at + 12 + view.getUint32(at);
    name = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (end > bytes.length) throw new RangeError("cut off");
    if (NEEDED.includes(name)) kept.push(bytes.subarray(at, end));
    if (name === "IDAT") packed.push(bytes.subarray(at + 8, end - 4));
    at = end;
  }
  const samples = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }[view.getUint8(25)] ?? 4;
  const most = pixelBytes(view.getUint32(16), view.getUint32(20), samples * view.getUint8(24));
  if (unpackedLength(packed, most, false) > most) throw new RangeError("unpacks to more");
  return concatenated(kept);
}

const pixelBytes = (width, height, bits) => 2 * height * (Math.ceil((width * bits) / 8) + 1) + 1024;

/** How many bytes pieces of zlib data unpack to, one after the other or each by itself; what is beyond `most` is not unpacked. */
function unpackedLength(pieces, most, apart) {
  let length = 0, stream;
  for (const [k, piece] of pieces.entries()) {
    if (apart || k === 0) stream = new Unzlib((part) => (length += part.length));
    for (let at = 0; at < piece.length && length <= most; at += 1024) stream.push(piece.subarray(at, at + 1024));
  }
  return length;
}

function concatenated(pieces) {
  const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  pieces.reduce((at, piece) => (whole.set(piece, at), at + piece.length), 0);
  return whole;
}
