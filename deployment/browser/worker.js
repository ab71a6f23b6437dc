// Runs the network, so that the page stays alive meanwhile.

import * as ort from "./libs/onnxruntime/ort.js";

// Slices a pass: after each the progress is told. Each pass looks at the whole volume again for its
// statistics, so a long volume gets fewer.
const BLOCK = 4, PASSES = 16;

let session;

async function load({ bytes, threads }) {
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = { mjs: new URL("./libs/onnxruntime/ort-wasm.js", import.meta.url).href,
    wasm: new URL("./libs/onnxruntime/ort-wasm.wasm", import.meta.url).href };
  // without an arena memory goes back after every step; with one, 200 slices need half a gigabyte more
  session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], enableCpuMemArena: false });
}

const integer = (value) => new ort.Tensor("int64", BigInt64Array.of(BigInt(value)), []);

/** The statistics of the normalisation come from the whole volume: all slices if they are one patient's, else each slice's own. */
async function segment({ pixels, count, height, width, together }) {
  const probability = new Float32Array(count * height * width);
  const volume = (first, slices) => new ort.Tensor("uint8", pixels.subarray(first * height * width * 3, (first + slices) * height * width * 3),
    [slices, height, width, 3]);
  const whole = together ? volume(0, count) : null;
  const block = together ? Math.max(BLOCK, Math.ceil(count / PASSES)) : 1;
  for (let first = 0; first < count; first += block) {
    const slices = Math.min(block, count - first);
    const feeds = { volume: whole ?? volume(first, 1), first: integer(together ? first : 0), count: integer(slices) };
    const output = (await session.run(feeds)).probability;
    probability.set(output.data, first * height * width);
    output.dispose();
    postMessage({ done: first + slices });
  }
  return probability;
}

onmessage = async ({ data }) => {
  try {
    const result = await (data.kind === "load" ? load(data) : segment(data));
    postMessage({ result }, result ? [result.buffer] : []);
  } catch (error) {
    postMessage({ failed: String(error?.message ?? error).split("\n")[0] });
  }
};
