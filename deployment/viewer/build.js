// npm run build [-- FOLDER]: our modules with NiiVue and what NiiVue needs in one file, their style, and the licences of all parts. The result is
// committed, because a hospital that starts the Streamlit page has no Node.js.

import { readFileSync, readdirSync, writeFileSync } from "node:fs";

import { build } from "esbuild";

const out = process.argv[2] ?? "dist";
// For the light on volumes rendered with gradients, which the viewer does not use, NiiVue filters the whole scan twice each time a voxel or
// a window changes: seconds for 40 slices without a graphics card. Its other functions first check whether the result is used; now this one does too.
const GRADIENT = "this.gradientTexture = gradientGL({";
const withoutGradient = { name: "without-gradient", setup({ onLoad }) {
  onLoad({ filter: /@niivue\/niivue\/build\/niivue\/index\.js$/ }, ({ path }) => {
    const [before, inSetter, inRefresh, ...more] = readFileSync(path, "utf-8").split(GRADIENT);
    if (inRefresh === undefined || more.length) throw new Error("NiiVue computes its gradients elsewhere; look at build.js");
    return { contents: `${before}${GRADIENT}${inSetter}if (this.gradientTextureAmount > 0) ${GRADIENT}${inRefresh}`, loader: "js" };
  });
} };
const entryPoints = ["bundle.js", "viewer.css"].map((file) => ({ in: file, out: "viewer" }));
const { metafile } = await build({ entryPoints, bundle: true, format: "esm", minify: true, target: "es2022", outdir: out,
  external: ["numcodecs/*"], // unpacks Zarr, which no case uses: 1.4 MB, loaded only on demand
  plugins: [withoutGradient], metafile: true, logLevel: "warning" });
const packages = new Set(Object.keys(metafile.inputs).map((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1]).filter(Boolean));
const licence = (name) => {
  if (name === "@niivue/niivue") return readFileSync("LICENSE-niivue.txt", "utf-8"); // its package does not contain the text
  const folder = `node_modules/${name}`, file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
  return file ? readFileSync(`${folder}/${file}`, "utf-8") : `${JSON.parse(readFileSync(`${folder}/package.json`)).license}\n`;
};
writeFileSync(`${out}/LICENSES.txt`, [...packages].sort().map((name) => `${name}\n\n${licence(name)}`).join(`\n${"-".repeat(80)}\n\n`));
