// ZIP and gzip in memory, with bounds on what they may unpack to.

import { Gunzip, gzipSync, unzipSync, zipSync } from "fflate";

import { UserError, short } from "./common.js";

export const MAX_FILES = 1000; // in one case, masks and all
export const MAX_UNPACKED = 256 * 2 ** 20; // bytes

const tooLarge = (name) => new UserError(`${short(name)} unpacks to more than ${MAX_UNPACKED >> 20} MB; pack one patient at a time`);

export function checkNumber(files) {
  if (files > MAX_FILES) throw new UserError(`${files} files are more than the ${MAX_FILES} of one case; open one patient at a time`);
}

/** The files of a ZIP, [{name, bytes}], folders and hidden ones left out. */
export function unpackZip(name, bytes) {
  let entries = 0, total = 0;
  const wanted = ({ name: path, originalSize }) => {
    const parts = path.replaceAll("\\", "/").split("/");
    if (parts[0] === "" || parts[0].includes(":") || parts.includes("..")) {
      throw new UserError(`${short(name)} holds a name that points out of the archive; pack the slices again`);
    }
    if (parts.at(-1) === "") return false;
    checkNumber(++entries);
    total += originalSize;
    if (total > MAX_UNPACKED) throw tooLarge(name);
    return !parts.some((part) => part.startsWith(".") || part.startsWith("__MACOSX"));
  };
  let unpacked;
  try {
    unpacked = unzipSync(bytes, { filter: wanted });
  } catch (error) {
    if (error instanceof UserError) throw error;
    throw new UserError(`${short(name)} can't be unpacked (damaged, encrypted or of another kind); pack it again`);
  }
  const files = Object.entries(unpacked).map(([path, content]) => ({ name: path.replaceAll("\\", "/"), bytes: content }));
  if (!files.length) throw new UserError(`${short(name)} holds no files; pack the slices into it`);
  return files;
}

/** What a .gz file holds. */
export function unpackGzip(name, bytes) {
  const pieces = [];
  let length = 0, ended = false;
  try {
    const stream = new Gunzip((piece, final) => {
      pieces.push(piece);
      length += piece.length;
      ended = final;
      if (length > MAX_UNPACKED) throw tooLarge(name);
    });
    for (let at = 0; at < bytes.length; at += 2 ** 16) { // piece by piece, so that a bomb is noticed before it fills the memory
      stream.push(bytes.subarray(at, at + 2 ** 16), at + 2 ** 16 >= bytes.length);
    }
    if (!ended) throw new Error("truncated");
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
