// The network: its file read and checked here, run in a worker, slice block by slice block.

import { UserError } from "./common.js";
import { fedOf, ontoPage } from "./field_of_view.js";

const PROPERTIES = 14, KEY = 1, VALUE = 2; // fields of ONNX's ModelProto and of an entry in its metadata_props
const FORMAT = "2"; // of the properties that deployment/export_onnx.py writes
// A module with one SIMD instruction: what runs the network needs them.
const SIMD = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11]);

/** Whether this browser can run the network at all. Throws UserError if not. */
export function checkBrowser() {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(SIMD)) {
    throw new UserError("this browser has no WebAssembly with SIMD, which the network needs; use a current Firefox, Chrome, Edge or Safari");
  }
}

/** The properties that travel in an ONNX file, {name: text}. Throws UserError for a file that is cut off or not MedFL's. */
export function readProperties(bytes) {
  const found = {};
  try {
    for (const [field, content] of fields(bytes)) {
      if (field !== PROPERTIES) continue;
      const entry = Object.fromEntries(fields(content));
      found[new TextDecoder().decode(entry[KEY])] = new TextDecoder().decode(entry[VALUE]);
    }
  } catch {
    throw new UserError("the model file is truncated or not an ONNX file; export it again with deployment/export_onnx.py");
  }
  if (found.medfl_format !== FORMAT) {
    throw new UserError("the model file is not one that this page can use; export it with its own deployment/export_onnx.py");
  }
  return Object.fromEntries(["metadata", "card", "plausibility", "version"].map((name) => [name, JSON.parse(found[name])]));
}

/** The top-level fields of a protobuf message: [number, bytes or integer]. Throws RangeError where it is cut off. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    for (let value = 0, power = 1; ; power *= 128) {
      if (at >= bytes.length) throw new RangeError("cut off");
      const byte = bytes[at++];
      value += (byte & 127) * power;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const length = { 0: () => null, 1: () => 8, 2: varint, 5: () => 4 }[tag % 8]?.();
    if (length === undefined) throw new RangeError("no protobuf");
    if (length === null) {
      yield [Math.floor(tag / 8), varint()];
      continue;
    }
    if (at + length > bytes.length) throw new RangeError("cut off");
    yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
    at += length;
  }
}

/** The bytes at an address of this page, `progress` told the share that has come. Throws UserError where they don't come. */
export async function download(address, progress = () => {}) {
  try {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const size = Number(answer.headers.get("Content-Length"));
    const pieces = [];
    let length = 0;
    for (const reader = answer.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      pieces.push(value);
      length += value.length;
      if (size) progress(Math.min(length / size, 1));
    }
    return new Uint8Array(await new Blob(pieces).arrayBuffer());
  } catch {
    throw new UserError(`${address} can't be loaded; check the connection and load the page again`);
  }
}

/** Whether there is a graphics card that the network can run on: by WebGPU, with what lets WebAssembly wait for it. One that is imitated
    by the processor is slower than the processor itself. */
async function hasCard() {
  if (!navigator.gpu || !("Suspending" in WebAssembly)) return false;
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  return Boolean(adapter) && !adapter.info.isFallbackAdapter;
}

/** Starts the worker with a model's bytes. `threads` says how many the network will use, `card` whether it runs on the graphics card. */
export class Network {
  constructor() {
    this.threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
    // A worker from a blob is bound by the page's own content security policy; one from a file would not be.
    const source = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
    this.address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    this.worker = new Worker(this.address, { type: "module" });
  }

  /** Loads the model; resolves when the network is ready. */
  async load(bytes) {
    this.model = new Blob([bytes]); // to begin again after a cancellation
    this.card = await hasCard();
    await this.#load(bytes);
  }

  async #load(bytes) {
    this.loaded = this.#ask({ kind: "load", bytes, threads: this.threads, card: this.card }, [bytes.buffer]);
    this.card = (await this.loaded) ?? this.card; // nothing comes back where it was cancelled
  }

  /** What the worker loads: files of this page. */
  get files() {
    const build = this.card ? "ort-gpu" : "ort";
    return ["worker.js", ...["", "-wasm"].map((part) => `libs/onnxruntime/${build}${part}.js`), `libs/onnxruntime/${build}-wasm.wasm`];
  }

  /** The probability of tumour in each pixel of a case, Float32Array of count × height × width, and what was measured of its volume, for
      doubts.js; or null if it was cancelled. `progress` is told how many slices are done. */
  async segment(opened, progress) {
    await this.loaded;
    const { pixels, count, height, width, together } = fedOf(opened);
    const asked = { kind: "segment", pixels, count, height, width, together };
    const told = (done) => progress(Math.round((done / count) * opened.count));
    const found = await this.#ask(asked, [], told).catch(async (error) => {
      if (!this.card) throw error;
      this.card = false; // it may be lost, or too small for these slices
      await this.#restart();
      return this.#ask(asked, [], told);
    });
    return found && { ...found, probability: ontoPage(opened, { height, width }, found.probability) };
  }

  /** Ends a segmentation at once; the network gets ready again meanwhile. */
  async cancel() {
    this.worker.terminate(); // what computes hears nothing until a block of slices is done, which can take seconds
    this.stop?.(null);
    await this.#restart();
  }

  async #restart() {
    this.worker.terminate();
    this.worker = new Worker(this.address, { type: "module" });
    await (this.loaded = this.model.arrayBuffer().then((buffer) => this.#load(new Uint8Array(buffer))));
  }

  #ask(message, transfer, progress) {
    return new Promise((resolve, reject) => {
      this.stop = resolve;
      this.worker.onerror = (event) => reject(new UserError(`the network can't run here (${event.message || "no worker"}); reload the page`));
      this.worker.onmessage = ({ data }) => {
        if ("done" in data) progress(data.done);
        else if ("failed" in data) reject(new UserError(`the network stopped (${data.failed}); reload the page, or open fewer slices`));
        else resolve(data.result);
      };
      this.worker.postMessage(message, transfer);
    });
  }
}
