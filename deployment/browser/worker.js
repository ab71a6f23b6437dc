// Runs the network, so that the page stays alive meanwhile.

// Slices a pass: after each the progress is told. Each pass looks at the whole volume again for its
// statistics, so a long volume gets fewer.
const BLOCK = 4, PASSES = 16;

let ort, session;

/** Makes the network ready on the graphics card if there is one, else on the processor. Returns whether it is on the card. */
async function load({ bytes, threads, card }) {
  if (card) {
    try {
      await prepare("ort-gpu", "webgpu", bytes, threads);
      return true;
    } catch (error) {
      console.warn(error);
    }
  }
  await prepare("ort", "wasm", bytes, threads);
  return false;
}

async function prepare(build, provider, bytes, threads) {
  const at = (name) => new URL(`./libs/onnxruntime/${name}`, import.meta.url).href;
  ort = await import(at(`${build}.js`));
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = { mjs: at(`${build}-wasm.js`), wasm: at(`${build}-wasm.wasm`) };
  // without an arena memory goes back after every step; with one, 200 slices need half a gigabyte more
  session = await ort.InferenceSession.create(bytes, { executionProviders: [provider], enableCpuMemArena: false, enableMemPattern: false, logSeverityLevel: 3 });
}

const integer = (value) => new ort.Tensor("int64", BigInt64Array.of(BigInt(value)), []);

const MEASURED = ["foreground_mean", "foreground_deviation", "appearance", "blank", "copies"];

/** {probability, measured: what the graph says of the whole volume}. The statistics of the normalisation come from the whole volume: all
    slices if they are one patient's, else each slice's own. */
async function segment({ pixels, count, height, width, together }) {
  const probability = new Float32Array(count * height * width);
  const volume = (first, slices) => new ort.Tensor("uint8", pixels.subarray(first * height * width * 3, (first + slices) * height * width * 3),
    [slices, height, width, 3]);
  const run = async (given, first, slices) => session.run({ volume: given, first: integer(first), count: integer(slices) });
  const whole = volume(0, count), block = together ? Math.max(BLOCK, Math.ceil(count / PASSES)) : 1;
  let measured = together || count === 1 ? null : measuredOf(await run(whole, 0, 1));
  for (let first = 0; first < count; first += block) {
    const slices = Math.min(block, count - first);
    const output = await (together ? run(whole, first, slices) : run(volume(first, 1), 0, 1));
    probability.set(output.probability.data, first * height * width);
    measured ??= measuredOf(output);
    Object.values(output).forEach((tensor) => tensor.dispose());
    postMessage({ done: first + slices });
  }
  return { probability, measured };
}

const measuredOf = (output) => Object.fromEntries(MEASURED.map((name) => [name, Array.from(output[name].data)]));

onmessage = async ({ data }) => {
  try {
    const result = await (data.kind === "load" ? load(data) : segment(data));
    postMessage({ result }, result.probability ? [result.probability.buffer] : []);
  } catch (error) {
    postMessage({ failed: String(error?.message ?? error).split("\n")[0] });
  }
};
