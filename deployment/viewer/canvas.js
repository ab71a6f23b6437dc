// NiiVue on a canvas, as used by both pictures of the viewer.

import { Niivue } from "@niivue/niivue";

// Okabe and Ito's colours, which colour-blind readers can distinguish: only the mask, only the other mask, both.
const COLOURS = { R: [0, 230, 86, 240], G: [0, 159, 180, 228], B: [0, 0, 233, 66], labels: ["", "mask", "other", "both"] };
export const RIM_ONLY = 0.01; // opacity inside an outline: at 0 NiiVue draws no rim either

export const makeNiivue = () => new Niivue({ dragAndDropEnabled: false, logLevel: "error", isRadiologicalConvention: true,
  showAllOrientationMarkers: true, isForceMouseClickToVoxelCenters: true, crosshairWidthUnit: "percent", crosshairColor: [0.5, 0.8, 1, 0.9],
  fontColor: [1, 1, 1, 1], fontMinPx: 16, viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "", multiplanarShowRender: 1,
  windowingGainFactor: 1, rulerColor: [0.94, 0.89, 0.26, 1], measureLineColor: [0.94, 0.89, 0.26, 1], measureTextColor: [0.94, 0.89, 0.26, 1],
  loadingText: "", maxDrawUndoBitmaps: 2 }); // Edits does undo and redo

/** Whether the processor draws instead of a graphics card: smooth edges of lines then cost half of a frame's time. */
function isSoftware() {
  const gl = document.createElement("canvas").getContext("webgl2"), told = gl?.getExtension("WEBGL_debug_renderer_info");
  const name = gl?.getParameter(told ? told.UNMASKED_RENDERER_WEBGL : gl.RENDERER) ?? "";
  gl?.getExtension("WEBGL_lose_context")?.loseContext();
  return /swiftshader|llvmpipe|basic render/i.test(name);
}

/** Let NiiVue draw on a canvas. */
export async function attach(nv, canvas) {
  await nv.attachToCanvas(canvas, !isSoftware());
  nv.drawLut.lut.set([0, 0, 0, 0]);
  nv.setDrawColormap(COLOURS);
}
