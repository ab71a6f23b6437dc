// What a reader takes along: masks and figures as files.

import { packZip } from "./archives.js";
import { maskName } from "./cases.js";
import { componentsText, findComponents } from "./components.js";
import { writeNifti } from "./nifti.js";
import { csvText } from "./readout.js";
import { maskPng } from "./slices.js";

/** Whether slices lie above each other, so that parts of several are one. */
export const isVolume = ({ together, count }) => together || count === 1;

/** The connected parts of the mask of now. What a person drew has no probability. */
export const components = ({ opened, viewer, probability }) => findComponents(opened, viewer.mask(), viewer.edits.changed ? null : probability);

function save(name, bytes, type) {
  const address = URL.createObjectURL(new Blob([bytes], { type }));
  Object.assign(document.createElement("a"), { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** What each button gives, {text: function}, for the page's state. measure: makes the figures those of now, because what was drawn a moment
    ago counts. */
export function downloads(state, measure) {
  const { opened, viewer, model } = state;
  const area = opened.height * opened.width;
  const asPng = (all, k) => maskPng(all.subarray(k * area, (k + 1) * area), opened.width, opened.height);
  const all = (give) => () => {
    measure();
    give(viewer.mask());
    state.saved = viewer.edits.steps;
  };
  return {
    "Mask of this slice (PNG)": () => save(maskName(opened.slices[viewer.slice]), asPng(viewer.mask(), viewer.slice), "image/png"),
    "All masks (ZIP)": all((mask) => {
      const files = Object.fromEntries(opened.slices.map((name, k) => [maskName(name), asPng(mask, k)]));
      files["readout.csv"] = new TextEncoder().encode(csvText(state.rows));
      if (isVolume(opened)) files["components.csv"] = new TextEncoder().encode(componentsText(opened, components(state)));
      if (viewer.edits.changed) {
        const proposal = viewer.proposal();
        opened.slices.forEach((name, k) => (files[`proposal/${maskName(name)}`] = asPng(proposal, k)));
        files["correction.json"] = new TextEncoder().encode(JSON.stringify(correction(viewer, model), null, 2));
      }
      save(`${opened.name}_masks.zip`, packZip(files), "application/zip");
    }),
    "Figures (CSV)": () => {
      measure();
      save(`${opened.name}.csv`, csvText(state.rows), "text/csv");
    },
    ...(isVolume(opened) && { "Components (CSV)": () => save(`${opened.name}_components.csv`, componentsText(opened, components(state)), "text/csv") }),
    ...(opened.nifti && { "Mask (NIfTI)": all((mask) => save(`${opened.name}_mask.nii.gz`, writeNifti(opened, mask), "application/gzip")) }),
  };
}

/** What a corrected mask was made from. */
function correction(viewer, model) {
  return { version: 1, corrected: new Date().toISOString(), model_sha256: Object.fromEntries(model.card)["SHA-256"] ?? null,
    threshold: viewer.threshold, changed_pixels: viewer.edits.changed };
}
