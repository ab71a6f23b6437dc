// From what a reader chose or dropped to names and bytes.

import { checkNumber } from "./archives.js";
import { MAX_BYTES } from "./cases.js";
import { UserError, short } from "./common.js";

/** [{name, bytes}] of the browser's files, with the folders they lie in. Throws UserError for too many or too large ones. */
export async function take(list) {
  const files = [...list];
  checkNumber(files.length);
  const large = files.find((file) => file.size > MAX_BYTES);
  if (large) throw new UserError(`${short(large.name)} is larger than ${MAX_BYTES >> 20} MB; open one patient at a time`);
  return Promise.all(files.map(async (file) => ({ name: file.webkitRelativePath || file.path || file.name,
    bytes: new Uint8Array(await file.arrayBuffer()) })));
}

/** The files under what was dropped, folders and all. */
export async function dropped(items) {
  const entries = [...items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const files = [];
  while (entries.length) {
    const entry = entries.shift();
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      file.path = entry.fullPath.slice(1);
      files.push(file);
      checkNumber(files.length);
      continue;
    }
    const reader = entry.createReader();
    for (;;) { // a reader gives a hundred at a time
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) break;
      entries.push(...some);
    }
  }
  return files;
}
