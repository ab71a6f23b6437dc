// The viewer as a component of the Streamlit page. deployment/app/scan_viewer.py is its other end, and describes the messages.

import { createViewer } from "./viewer.js";

const REST = 250; // ms without a further change before the page is informed, so that no stroke waits for it
const GRACE = 1000; // ms in which the page may remove the viewer and insert it elsewhere, as it does if something appears above it
const CODES = 200; // probability 1

const element = document.createElement("div"); // one viewer for all cases of a page: browsers allow few with WebGL
const held = { voxels: null, masks: null, beside: null }; // numbers of the content that came last
const waiting = { slice: null, drawn: null }; // timers of news that the page has not received yet
let viewer = null, tell = null, quiet = false, queue = Promise.resolve();
let given = ""; // steps and threshold of the mask that the page gave last
let calls = 0; // calls of the function below

/** Show what Streamlit gives. Called again whenever the page has run; returns the function that ends it. */
export default function ({ data, parentElement, setTriggerValue }) {
  tell = setTriggerValue;
  const moved = element.parentElement !== parentElement, call = ++calls;
  if (moved) parentElement.append(element); // beside its style
  queue = queue.then(() => take(data)).then(() => moved && tellAgain()).catch((error) => {
    console.error(error);
    const textContent = viewer ? `The viewer failed: ${error.message}. Open the case again.`
      : "This browser draws no three-dimensional pictures (WebGL 2): switch on its hardware acceleration, or use another browser.";
    element.replaceChildren(Object.assign(document.createElement("p"), { role: "alert", textContent }));
    if (viewer) viewer.opened = null; // ignores keys from now on
    viewer = null;
  });
  return () => setTimeout(() => (queue = queue.then(() => call === calls && forget())), GRACE);
}

/** Send again: news from the viewer's former place may have been lost with that place. */
function tellAgain() {
  if (viewer?.opened && drawnOn() !== given) later("drawn");
}

const drawnOn = () => `${viewer.edits.steps} ${viewer.threshold}`;

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
  const message = unpacked(data);
  const number = message.beside?.number ?? null;
  if ((message.voxels !== held.voxels && !message.pixels) || (message.masks !== held.masks && !message.mask) ||
    (number !== null && number !== held.beside && !message.beside_pixels)) return tell("wanted", true);
  viewer ??= await createViewer(element, { slice: () => later("slice"), mask: () => later("drawn") });
  if (message.voxels !== held.voxels) await open(message);
  else await renew(message);
  if (number !== held.beside) await openBeside(message);
}

async function open(message) {
  const { count, height, width, spacing, oriented, together, channels, pixels, codes, threshold } = message;
  const opened = { count, height, width, spacing, oriented, together, channels, pixels, truth: message.truth.length ? message.truth : null };
  quiet = true; // the page's own content is not reported back to it
  try {
    await viewer.show(opened, new Float32Array(codes).map((code) => code / CODES), threshold);
    if (message.mask.length) viewer.takeMask(message.mask);
  } finally {
    quiet = false;
  }
  Object.assign(held, { voxels: message.voxels, masks: message.masks, beside: null });
  given = drawnOn();
}

/** Show the second picture beside the case, or remove it. */
async function openBeside({ beside, beside_pixels: pixels, beside_mask: mask }) {
  held.beside = beside?.number ?? null;
  if (beside) await viewer.beside.show({ ...beside, pixels, mask });
  else viewer.beside.close();
}

async function renew(message) {
  const { opened } = viewer;
  if (`${opened.spacing}` !== `${message.spacing}` || opened.oriented !== message.oriented) {
    opened.oriented = message.oriented;
    await viewer.setSpacing(message.spacing);
  }
  if (message.masks === held.masks) return;
  held.masks = message.masks;
  viewer.setTruth(message.truth.length ? message.truth : null);
  if (waiting.drawn !== null) return; // a stroke that the page has not received is not lost
  quiet = true; // only for this moment: strokes that are drawn while something is awaited must be reported
  viewer.takeMask(message.mask.length ? message.mask : null);
  quiet = false;
  given = drawnOn();
}

// ---- reports to the page ----

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
