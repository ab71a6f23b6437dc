// The viewer as a component of the Streamlit page. deployment/app/scan_viewer.py is its other end, and says what travels.

import { createViewer } from "./viewer.js";

const REST = 250; // ms without a further change after which the page hears of one, so that no stroke waits for it
const CODES = 200; // probability 1

const element = document.createElement("div"); // one viewer for all cases of a page: browsers allow few with WebGL
const held = { voxels: null, masks: null, beside: null }; // numbers of what came last
const waiting = { slice: null, drawn: null }; // timers of what the page has not heard yet
let viewer = null, tell = null, quiet = false, queue = Promise.resolve();

/** Show what Streamlit gives. Called again whenever the page has run; returns what ends it. */
export default function ({ data, parentElement, setTriggerValue }) {
  tell = setTriggerValue;
  if (element.parentElement !== parentElement) parentElement.append(element); // beside its style
  queue = queue.then(() => take(data)).catch((error) => {
    console.error(error);
    const textContent = viewer ? `The viewer failed: ${error.message}. Open the case again.`
      : "This browser draws no three-dimensional pictures (WebGL 2): switch on its hardware acceleration, or use another browser.";
    element.replaceChildren(Object.assign(document.createElement("p"), { role: "alert", textContent }));
    if (viewer) viewer.opened = null; // hears no key any more
    viewer = null;
  });
  return () => (queue = queue.then(() => element.parentElement === parentElement && forget()));
}

function forget() {
  for (const what of Object.keys(waiting)) cancel(what);
  element.remove();
  viewer?.close();
  Object.assign(held, { voxels: null, masks: null, beside: null });
}

/** The head and the named parts of a message. */
function unpacked(data) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength), length = view.getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(data.subarray(4, 4 + length)));
  let at = 4 + length;
  const parts = Object.fromEntries(head.parts.map(([name, size]) => [name, data.slice(at, (at += size))]));
  return { ...head, ...parts };
}

async function take(data) {
  const given = unpacked(data);
  const number = given.beside?.number ?? null;
  if ((given.voxels !== held.voxels && !given.pixels) || (given.masks !== held.masks && !given.mask) ||
    (number !== null && number !== held.beside && !given.beside_pixels)) return tell("wanted", true);
  viewer ??= await createViewer(element, { slice: () => later("slice"), mask: () => later("drawn") });
  quiet = true; // what is given need not be told
  try {
    if (given.voxels !== held.voxels) await open(given);
    else await renew(given);
    if (number !== held.beside) await openBeside(given);
  } finally {
    quiet = false;
  }
}

async function open(given) {
  const { count, height, width, spacing, oriented, together, pixels, codes, threshold } = given;
  const opened = { count, height, width, spacing, oriented, together, pixels, truth: given.truth.length ? given.truth : null };
  await viewer.show(opened, new Float32Array(codes).map((code) => code / CODES), threshold);
  if (given.mask.length) viewer.takeMask(given.mask);
  Object.assign(held, { voxels: given.voxels, masks: given.masks, beside: null });
}

/** What stands beside the case, or nothing any more. */
async function openBeside({ beside, beside_pixels: pixels, beside_mask: mask }) {
  held.beside = beside?.number ?? null;
  if (beside) await viewer.beside.show({ ...beside, pixels, mask });
  else viewer.beside.close();
}

async function renew(given) {
  const { opened } = viewer;
  if (`${opened.spacing}` !== `${given.spacing}` || opened.oriented !== given.oriented) {
    opened.oriented = given.oriented;
    await viewer.setSpacing(given.spacing);
  }
  if (given.masks === held.masks) return;
  held.masks = given.masks;
  viewer.setTruth(given.truth.length ? given.truth : null);
  if (waiting.drawn === null) viewer.takeMask(given.mask.length ? given.mask : null); // a stroke that the page has not heard of is not lost
}

// ---- what the page hears ----

const telling = {
  slice: () => tell("slice", viewer.slice),
  drawn: async () => {
    const { threshold, edits } = viewer, { voxels } = held;
    tell("drawn", { voxels, threshold, mask: edits.changed ? await packed(viewer.mask()) : null });
  },
};

function later(what) {
  if (quiet) return;
  cancel(what);
  waiting[what] = setTimeout(() => now(what), REST);
}

function cancel(what) {
  clearTimeout(waiting[what]);
  waiting[what] = null;
}

function now(what) {
  if (waiting[what] === null) return;
  cancel(what);
  if (viewer.opened) telling[what]();
}

element.addEventListener("pointerleave", () => Object.keys(waiting).forEach(now)); // a button of the page may come next

/** A mask as base64 of a gzip of its bits, the first the highest of its byte. */
async function packed(mask) {
  const bits = new Uint8Array(Math.ceil(mask.length / 8));
  for (let k = 0; k < mask.length; k++) if (mask[k]) bits[k >> 3] |= 128 >> (k & 7);
  const bytes = new Uint8Array(await new Response(new Blob([bits]).stream().pipeThrough(new CompressionStream("gzip"))).arrayBuffer());
  let text = "";
  for (let from = 0; from < bytes.length; from += 0x8000) text += String.fromCharCode(...bytes.subarray(from, from + 0x8000));
  return btoa(text);
}
