// The viewer of the pages, around NiiVue: it gets a case, the model's probability and perhaps a truth, and gives the reader's mask.

import { DRAG_MODE } from "@niivue/niivue";

import { Beside } from "./beside.js";
import { RIM_ONLY, attach, makeNiivue } from "./canvas.js";
import { PLANES, WINDOWS } from "./choices.js";
import { Edits, compared, countsOf, marked, maskOf } from "./edits.js";
import { listen } from "./gestures.js";
import { Tools } from "./tools.js";
import { channelVolume, probabilityVolume, turn } from "./volumes.js";

const COMPARISONS = ["truth", "changes"]; // overlays that show two masks
const THICK = 1.5; // if slices are this many times farther apart than pixels, they are shown as steps, not smoothed

/** A viewer that fills `element`. told: {slice(), mask()}, called when another slice is shown and when the mask has changed. */
export async function createViewer(element, told) {
  const viewer = new Viewer(element, told);
  await viewer.start();
  return viewer;
}

class Viewer {
  constructor(element, told) {
    this.element = element;
    this.told = told;
    this.look = { plane: "axial", channel: "FLAIR", overlay: "outline", hidden: false, opacity: 0.5, radiological: true };
    this.tool = "look"; // or measure, pen, eraser, grow
    this.penSize = 3; // pixels
    this.turn = 0; // the number of the latest change of the look
    this.tolerance = 15; // grey values by which growing may differ
    this.tools = new Tools(this);
    this.nv = makeNiivue();
    this.beside = new Beside(this);
  }

  async start() {
    await attach(this.nv, this.tools.canvas);
    const draw = this.nv.drawScene.bind(this.nv);
    this.nv.drawScene = () => {
      draw();
      this.beside.follow();
    };
    this.nv.onLocationChange = () => this.#sliceMayDiffer();
    listen(this);
    this.element.viewer = this; // for programs that drive the page
  }

  // ---- the shown case ----

  /** Show a case: {pixels, count, height, width, spacing, oriented, name, slices, truth}, its probability and the threshold. Without a
      probability the scan can be looked at, until `propose` brings one. */
  async show(opened, probability, threshold) {
    Object.assign(this, { opened, threshold, volumes: {}, probability: null });
    this.beside.close();
    const { count, height, width } = opened;
    this.area = height * width;
    Object.assign(this.look, { plane: "axial", overlay: "outline", hidden: false, opacity: 0.5 });
    this.tool = "look";
    this.truth = null;
    this.setTruth(opened.truth);
    this.edits = new Edits(new Uint8Array(count * this.area));
    this.first = Math.floor(count / 2);
    if (probability) this.#take(probability);
    await this.#draw(this.first);
    if (probability) this.#maskDiffers();
  }

  /** Take the model's probability. If the reader has not moved to another slice yet, the one with most of the tumour is shown. */
  async propose(probability) {
    const untouched = this.slice === this.first;
    this.#take(probability);
    if (untouched) this.goTo(this.first);
    await this.set({});
    this.#maskDiffers();
  }

  #take(probability) {
    this.probability = probability; // in the case's order; a copy would be the largest thing here
    this.edits = new Edits(this.#proposed());
    const counts = countsOf(this.edits.mask, this.area), most = Math.max(...counts);
    if (most) this.first = counts.indexOf(most);
  }

  /** Make the volumes again, for example after another spacing, at slice `number` from 0. */
  async #draw(number) {
    const { nv, opened, look } = this;
    this.removed = []; // parts that the reader switched off
    this.volumes = {};
    this.sent = [];
    nv.volumes = [];
    nv.closeDrawing();
    nv.opts.isOrientationTextVisible = opened.oriented;
    nv.opts.showMeasureUnits = Boolean(opened.spacing);
    this.window = WINDOWS["full range"];
    this.#send([await this.#channel()]);
    nv.createEmptyDrawing();
    nv.clickToSegmentGrowingBitmap = null; // belongs to a tool that the viewer does not offer
    nv.scene.crosshairPos = nv.vox2frac([Math.floor(opened.width / 2), Math.floor(opened.height / 2), number]);
    await this.set(look);
    this.resetLook();
    this.useTool(this.tool);
  }

  async setSpacing(spacing) {
    this.opened.spacing = spacing;
    await this.#draw(this.slice);
  }

  /** truth: count × height × width, above 0 is tumour, or null. */
  setTruth(truth) {
    this.truth = truth && turn(marked(truth, 1), this.area);
    this.tools.refresh();
  }

  async #channel() {
    const { channel } = this.look;
    this.volumes[channel] ??= await channelVolume(this.opened, channel);
    return this.volumes[channel];
  }

  /** Change how it is looked at: any of the keys of `look`. */
  async set(change) {
    const { nv, look } = this, turn = ++this.turn;
    Object.assign(look, change);
    if (this.compares && this.drawing) this.useTool("look");
    const volumes = [await this.#channel()];
    if (look.overlay === "probability" && !look.hidden && this.probability) {
      volumes.push((this.volumes.probability ??= await probabilityVolume(this.opened, this.probability)));
      volumes[1].opacity = look.opacity;
    }
    if (turn !== this.turn) return; // something else was requested in the meantime, or the case was closed
    const solid = look.plane === "3-D";
    volumes[0].opacity = 1;
    const showsMask = !look.hidden && (look.overlay !== "probability" || solid);
    nv.drawRimOpacity = showsMask ? 1 : -1;
    nv.drawOpacity = !showsMask ? 0 : solid ? 1 : look.overlay === "outline" ? RIM_ONLY : Math.max(look.opacity, RIM_ONLY);
    nv.opts.isRadiologicalConvention = look.radiological;
    nv.opts.crosshairWidth = look.plane === "planes" ? 0.3 : 0;
    nv.opts.sliceType = PLANES[look.plane];
    nv.opts.isNearestInterpolation = look.plane === "planes" && this.#thick();
    this.#send(volumes);
    this.#mouse();
    this.#refreshDrawing();
    this.tools.refresh();
    await this.beside.look();
  }

  /** Give NiiVue the volumes to draw, but only those that have changed, because it sends all their voxels to the graphics card. */
  #send(volumes) {
    const { nv } = this;
    [volumes[0].cal_min, volumes[0].cal_max] = this.window;
    const sent = volumes.flatMap((volume) => [volume, volume.opacity, volume.cal_min, volume.cal_max]);
    if (sent.length === this.sent.length && sent.every((value, k) => value === this.sent[k])) return;
    this.sent = sent;
    nv.volumes = volumes;
    nv.setVolume(volumes[0], 0);
  }

  #thick() {
    const { spacing } = this.opened;
    return Boolean(spacing) && spacing[2] > THICK * Math.min(spacing[0], spacing[1]);
  }

  setWindow([low, high]) {
    this.window = [low, high];
    this.#send(this.nv.volumes);
    this.nv.drawScene();
    this.tools.refresh();
  }

  /** Called after a drag over the picture, which NiiVue has handled. */
  windowMayDiffer() {
    const [base] = this.nv.volumes;
    if (base.cal_min === this.window[0] && base.cal_max === this.window[1]) return;
    this.window = [base.cal_min, base.cal_max];
    this.sent = []; // NiiVue sent this window itself
    this.tools.refresh();
  }

  /** The full range of grey values, the whole slice, no measured lines. */
  resetLook() {
    this.nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    this.nv.scene.volScaleMultiplier = 1;
    this.nv.setRenderAzimuthElevation(160, 20);
    this.nv.clearAllMeasurements();
    this.setWindow(WINDOWS["full range"]);
  }

  zoom(factor) {
    const { scene } = this.nv;
    if (this.look.plane === "3-D") this.nv.setScale(scene.volScaleMultiplier * factor);
    else scene.pan2Dxyzmm = [...scene.pan2Dxyzmm.slice(0, 3), Math.min(Math.max(scene.pan2Dxyzmm[3] * factor, 1), 12)];
    this.nv.drawScene();
  }

  /** The mm of the slice that one pixel of the screen shows. */
  millimetresOfPixel() {
    const { opened: { width, height, spacing }, tools: { canvas }, nv } = this, [row, column] = spacing ?? [1, 1];
    return Math.max((width * column) / canvas.clientWidth, (height * row) / canvas.clientHeight) / nv.scene.pan2Dxyzmm[3];
  }

  // ---- slices ----

  /** The slice that is shown, from 0 at the feet. */
  get slice() {
    return this.nv.frac2vox(this.nv.scene.crosshairPos)[2];
  }

  goTo(number) {
    const [x, y] = this.nv.frac2vox(this.nv.scene.crosshairPos);
    const z = Math.min(Math.max(number, 0), this.opened.count - 1);
    this.nv.scene.crosshairPos = this.nv.vox2frac([x, y, z]);
    this.nv.drawScene();
    this.#sliceMayDiffer();
  }

  #sliceMayDiffer() {
    if (this.slice === this.told.last) return;
    this.told.last = this.slice;
    this.tools.refresh();
    this.told.slice();
  }

  // ---- the mask ----

  setThreshold(threshold) {
    if (!this.probability) return;
    this.threshold = threshold;
    this.edits.propose(this.#proposed());
    this.#maskDiffers();
  }

  #proposed() {
    return turn(maskOf(this.probability, this.threshold), this.area);
  }

  /** The reader's mask: count × height × width of 0 or 255, in the case's order. */
  mask() {
    return turn(marked(this.edits.mask, 255), this.area);
  }

  /** The model's mask at the current threshold, in the form of `mask`. */
  proposal() {
    return turn(marked(this.edits.proposal, 255), this.area);
  }

  /** Take a mask from elsewhere, such as a file's (count × height × width, above 0 is tumour), as a step that can be undone; null is the proposal,
      and nothing counts as touched then. */
  takeMask(mask) {
    if (mask) this.edits.commit(turn(marked(mask, 1), this.area));
    else this.edits = new Edits(this.edits.proposal);
    this.#maskDiffers();
  }

  #maskDiffers() {
    this.#refreshDrawing();
    this.told.last = this.slice;
    this.tools.refresh();
    this.told.mask();
  }

  #refreshDrawing() {
    const { nv, edits, look } = this;
    if (!nv.drawBitmap) return;
    const other = look.overlay === "truth" ? this.truth : look.overlay === "changes" ? edits.proposal : null;
    nv.drawBitmap.set(other ? compared(edits.mask, other) : edits.mask);
    nv.refreshDrawing(true);
  }

  // ---- the reader's input ----

  get drawing() {
    return ["pen", "eraser", "grow"].includes(this.tool);
  }

  useTool(tool) {
    this.tool = this.probability || tool === "measure" ? tool : "look";
    const { plane, overlay, hidden } = this.look, seen = !hidden && ["outline", "fill"].includes(overlay);
    if (this.drawing && (plane === "3-D" || !seen)) {
      this.set({ plane: plane === "3-D" ? "axial" : plane, overlay: seen ? overlay : "fill", hidden: false });
    }
    this.#mouse();
    this.tools.refresh();
  }

  setPenSize(size) {
    this.penSize = Math.min(Math.max(size, 1), 30);
    this.#mouse();
    this.tools.refresh();
  }

  /** Set the effect of the mouse buttons, for the tool and the planes that are shown. */
  #mouse() {
    const { nv, tool, look } = this;
    const paints = tool === "pen" || tool === "eraser";
    const click = DRAG_MODE.crosshair; // also turns in three dimensions, and draws while drawing is enabled
    const primary = tool === "measure" ? DRAG_MODE.measurement : tool === "look" && look.plane === "axial" ? DRAG_MODE.windowing : click;
    nv.setMouseEventConfig({ leftButton: { primary, withShift: DRAG_MODE.pan, withCtrl: DRAG_MODE.pan }, rightButton: DRAG_MODE.windowing,
      centerButton: DRAG_MODE.pan });
    nv.setTouchEventConfig({ singleTouch: primary, doubleTouch: DRAG_MODE.pan });
    nv.opts.drawingEnabled = paints;
    nv.opts.penValue = tool === "eraser" ? 0 : 1;
    nv.opts.penSize = this.penSize;
  }

  /** Take the current drawing, or another one, as the mask. */
  commit(drawing = this.nv.drawBitmap) {
    if (this.edits.commit(drawing)) this.#maskDiffers();
  }

  /** Whether two masks are shown as colours, instead of the one that can be drawn on. */
  get compares() {
    return COMPARISONS.includes(this.look.overlay);
  }

  undo() {
    if (this.edits.undo()) this.#maskDiffers();
  }

  redo() {
    if (this.edits.redo()) this.#maskDiffers();
  }

  /** Forget the case. */
  close() {
    this.turn++;
    this.beside.close();
    this.nv.volumes = [];
    this.nv.closeDrawing();
    Object.assign(this, { opened: null, probability: null, edits: null, truth: null, volumes: {}, removed: [] });
  }
}
