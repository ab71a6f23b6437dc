// ZIP and gzip in memory, with bounds on what they may unpack to.

import { Gunzip, gzipSync, unzipSync, zipSync } from "fflate";

import { UserError, short } from "./common.js";

export const MAX_FILES = 1000; // in one case, masks and all
const MAX_NAME = 255; // characters of a file's name
export const MAX_UNPACKED = 256 * 2 ** 20; // bytes

const tooLarge = (name) => new UserError(`${short(name)} unpacks to more than ${MAX_UNPACKED >> 20} MB; pack one patient at a time`);

// The remainders of all bytes for the checksum of ZIP and gzip, which fflate does not compare.
const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});

/** CRC-32 of bytes, going on from that of those before. */
export function crc32(bytes, before = 0) {
  let crc = ~before;
  for (let k = 0; k < bytes.length; k++) crc = CRC[(crc ^ bytes[k]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** Throws UserError for a name that no file system could hold, and in which patterns are looked for without end. */
export function checkLengths(names) {
  const long = names.find((name) => name.split("/").some((part) => part.length > MAX_NAME));
  if (long !== undefined) throw new UserError(`${short(long)} has a name longer than ${MAX_NAME} letters; rename it`);
}

/** Throws UserError for a name that is there twice: one of the two files would be lost. */
export function checkNames(names) {
  const seen = new Set();
  for (const name of names) {
    if (seen.has(name)) {
      throw new UserError(`${short(name)} occurs more than once, and it is not clear which one counts; give each file its own name`);
    }
    seen.add(name);
  }
}

export function checkNumber(files) {
  if (files > MAX_FILES) throw new UserError(`${files} files are more than the ${MAX_FILES} of one case; open one patient at a time`);
}

/** The files of a ZIP, [{name, bytes}], folders and hidden ones left out. */
export function unpackZip(name, bytes) {
  let entries = 0, total = 0;
  const told = new Map(), directory = entriesOf(bytes);
  const wanted = ({ name: path, originalSize }) => {
    const crc = directory();
    const parts = path.replaceAll("\\", "/").split("/");
    if (parts[0] === "" || parts[0].includes(":") || parts.includes("..")) {
      throw new UserError(`${short(name)} holds a name that points out of the archive; pack the slices again`);
    }
    if (parts.at(-1) === "") return false;
    checkNumber(++entries);
    total += originalSize;
    if (total > MAX_UNPACKED) throw tooLarge(name);
    if (parts.some((part) => part.startsWith(".") || part.startsWith("__MACOSX"))) return false;
    checkNames([...told.keys(), path]);
    told.set(path, { crc, size: originalSize });
    return true;
  };
  let unpacked;
  try {
    unpacked = unzipSync(bytes, { filter: wanted });
    for (const [path, content] of Object.entries(unpacked)) {
      const { crc, size } = told.get(path);
      if (content.length !== size || crc32(content) !== crc) throw new Error("damaged");
    }
  } catch (error) {
    if (error instanceof UserError) throw error;
    throw new UserError(`${short(name)} can't be unpacked (damaged, encrypted or not a ZIP); pack it again`);
  }
  const files = Object.entries(unpacked).map(([path, content]) => ({ name: path.replaceAll("\\", "/"), bytes: content }));
  if (!files.length) throw new UserError(`${short(name)} holds no files; pack the slices into it`);
  return files;
}

/** A function that gives the checksum of one entry of a ZIP after the other, in the order of its directory. */
function entriesOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = null;
  return () => {
    if (at === null) {
      let end = bytes.length - 22;
      while (view.getUint32(end, true) !== 0x06054b50) end--;
      at = view.getUint32(end + 16, true);
      if (at === 0xffffffff) at = Number(view.getBigUint64(view.getUint32(end - 12, true) + 48, true)); // a directory of 64 bits
    }
    const crc = view.getUint32(at + 16, true);
    at += 46 + view.getUint16(at + 28, true) + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
    return crc;
  };
}

/** What a .gz file holds. */
export function unpackGzip(name, bytes) {
  const pieces = [];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let length = 0, ended = false, crc = 0, size = 0;
  const check = (end) => { // of a member, whose last 8 bytes tell its checksum and its length
    if (view.getUint32(end - 8, true) !== crc || view.getUint32(end - 4, true) !== size % 2 ** 32) throw new Error("damaged");
    crc = size = 0;
  };
  try {
    const stream = new Gunzip((piece, final) => {
      pieces.push(piece);
      length += piece.length;
      size += piece.length;
      ended = final;
      if (length > MAX_UNPACKED) throw tooLarge(name);
      crc = crc32(piece, crc);
    });
    stream.onmember = check;
    for (let at = 0; at < bytes.length; at += 2 ** 16) { // piece by piece, so that a bomb is noticed before it fills the memory
      stream.push(bytes.subarray(at, at + 2 ** 16), at + 2 ** 16 >= bytes.length);
    }
    if (!ended) throw new Error("truncated");
    check(bytes.length);
  } catch (error) {
    if (error instanceof UserError) throw error;
    throw new UserError(`${short(name)} can't be unpacked; copy it again`);
  }
  const whole = new Uint8Array(length);
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

export const packGzip = (bytes) => gzipSync(bytes, { mtime: 0 });

/** A ZIP of {name: bytes}. */
export const packZip = (files) => zipSync(files, { level: 6 });
