// A second picture beside the case: another date's scan, or another model's mask. It can't be drawn on, and it
// moves along with the case's picture.

import { RIM_ONLY, attach, makeNiivue } from "./canvas.js";
import { marked } from "./edits.js";
import { channelVolume, turn } from "./volumes.js";

export class Beside {
  constructor(viewer) {
    this.viewer = viewer;
    this.nv = makeNiivue();
    this.opened = null;
    this.offset = 0; // slices by which the reader moved only this picture
  }

  /** Show {pixels, count, height, width, spacing, oriented, mask, label} beside the case. mask: count × height × width, above 0 is tumour. */
  async show(opened) {
    const { nv, viewer: { tools } } = this, area = opened.height * opened.width;
    tools.openBeside(opened.label);
    if (!this.attached) await attach(nv, tools.besideCanvas);
    this.attached = true;
    Object.assign(this, { opened, offset: 0, volumes: {} });
    nv.volumes = [];
    nv.closeDrawing();
    nv.opts.isOrientationTextVisible = opened.oriented;
    nv.addVolume(await this.#channel());
    nv.createEmptyDrawing();
    nv.drawBitmap.set(turn(marked(opened.mask, 1), area));
    nv.refreshDrawing(true);
    await this.look();
  }

  async #channel() {
    const { channel } = this.viewer.look;
    this.volumes[channel] ??= await channelVolume(this.opened, channel);
    return this.volumes[channel];
  }

  /** Take over the case's changed look. */
  async look() {
    if (!this.opened) return;
    const { nv, viewer: { look } } = this, volume = await this.#channel();
    if (!this.opened) return; // closed in the meantime
    nv.drawRimOpacity = look.hidden ? -1 : 1;
    nv.drawOpacity = look.hidden ? 0 : look.plane === "3-D" ? 1 : look.overlay === "fill" ? Math.max(look.opacity, RIM_ONLY) : RIM_ONLY;
    nv.volumes = [volume];
    nv.setVolume(volume, 0);
    nv.refreshDrawing(true);
    this.window = null;
    this.follow();
  }

  /** The slice that corresponds to the case's: at the same distance in mm from the middle if both spacings are known, else at the same share of the way. */
  get slice() {
    const { opened: { count, spacing }, viewer } = this, one = viewer.opened, far = viewer.slice - (one.count - 1) / 2;
    const step = spacing && one.spacing ? one.spacing[2] / spacing[2] : count / one.count;
    return Math.min(Math.max(Math.round((count - 1) / 2 + far * step) + this.offset, 0), count - 1);
  }

  move(slices) {
    this.offset += slices;
    this.follow();
  }

  /** Take the case's plane, place, zoom and window. */
  follow() {
    if (!this.opened || !this.viewer.opened || !this.nv.volumes.length) return;
    const { nv, viewer } = this, { nv: main, tools } = viewer, [volume] = nv.volumes;
    for (const name of ["sliceType", "isRadiologicalConvention", "crosshairWidth", "isNearestInterpolation"]) nv.opts[name] = main.opts[name];
    for (const name of ["volScaleMultiplier", "renderAzimuth", "renderElevation"]) nv.scene[name] = main.scene[name];
    nv.scene.pan2Dxyzmm = [...main.scene.pan2Dxyzmm];
    const [x, y] = main.scene.crosshairPos, [, , z] = nv.vox2frac([0, 0, this.slice]);
    nv.scene.crosshairPos = [x, y, z];
    if (this.window !== viewer.window) {
      this.window = viewer.window;
      [volume.cal_min, volume.cal_max] = this.window;
      nv.updateGLVolume();
    }
    nv.drawScene();
    tools.sayBeside(`${this.opened.label}: slice ${this.slice + 1} of ${this.opened.count}${this.opened.oriented ? "" : ". Orientation unknown"}`);
  }

  close() {
    if (!this.opened) return;
    this.opened = null;
    this.nv.volumes = [];
    this.nv.closeDrawing();
    this.viewer.tools.closeBeside();
  }
}
