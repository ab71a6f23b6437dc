// What the browser's modules make of files: node dump.mjs IN.json. IN.json lists cases, each {files: [{name, path}], rules, measured,
// training, probability, threshold, spacing, masks, seriesRules, out}; the pixels go to out, the rest to standard output.

import { readFileSync, writeFileSync } from "node:fs";

const here = new URL("../../deployment/browser/", import.meta.url);
const { readCase, readMasks, maskName } = await import(new URL("cases.js", here));
const { doubts } = await import(new URL("doubts.js", here));
const { componentsText, findComponents } = await import(new URL("components.js", here));
const { csvText, sliceRows, summary } = await import(new URL("readout.js", here));
const { fedOf, ontoPage } = await import(new URL("field_of_view.js", here));
const { maskOf } = await import(new URL("../viewer/edits.js", here));
const { writeNifti } = await import(new URL("nifti.js", here));
const { maskPng } = await import(new URL("slices.js", here));

const DCM2NIIX = new URL("node_modules/@niivue/dcm2niix/dist/dcm2niix.jpeg.js", here);
const load = ({ name, path }) => ({ name, bytes: new Uint8Array(readFileSync(path)) });
const answers = [];
for (const asked of JSON.parse(readFileSync(process.argv[2]))) {
  try {
    const opened = await readCase(asked.files.map(load), async () => ({ createConverter: (await import(DCM2NIIX)).default, rules: asked.seriesRules }));
    if (asked.masks) opened.truth = await readMasks(opened, asked.masks.map(load));
    writeFileSync(asked.out, opened.pixels);
    if (opened.truth) writeFileSync(`${asked.out}.truth`, opened.truth);
    const { name, slices, count, height, width, together, spacing, notes } = opened;
    const answer = { name, slices, shape: [count, height, width], together, spacing, notes, maskNames: slices.map(maskName) };
    const fed = fedOf(opened);
    answer.fed = [fed.count, fed.height, fed.width];
    if (opened.frame) {
      writeFileSync(`${asked.out}.fed`, fed.pixels);
      const greens = Float32Array.from({ length: fed.pixels.length / 3 }, (_, k) => fed.pixels[3 * k + 1]);
      writeFileSync(`${asked.out}.back`, ontoPage(opened, fed, greens));
    }
    if (asked.rules) answer.doubts = doubts(opened, asked.measured, asked.rules, asked.training);
    if (asked.probability) {
      const bytes = readFileSync(asked.probability);
      const probability = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
      if (asked.spacing) opened.spacing = asked.spacing;
      const mask = maskOf(probability, asked.threshold).map((value) => 255 * value), rows = sliceRows(opened, probability, mask);
      Object.assign(answer, { rows, summary: summary(opened, rows), csv: csvText(rows),
        components: componentsText(opened, findComponents(opened, mask, asked.drawn ? null : probability)) });
      writeFileSync(`${asked.out}.png`, maskPng(mask.subarray(0, height * width), width, height));
      if (opened.nifti) writeFileSync(`${asked.out}.nii.gz`, writeNifti(opened, mask));
    }
    answers.push(answer);
  } catch (error) {
    answers.push({ error: error.message, kind: error.constructor.name });
  }
}
console.log(JSON.stringify(answers));
process.exitCode = 0; // dcm2niix leaves its own there
