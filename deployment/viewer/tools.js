// The toolbar, the picture with its texts, and the slices' slider.

import { CHANNELS, PLANES, WINDOWS } from "./choices.js";
import { fillBetween, parts, switchPart } from "./correcting.js";
import { countsOf } from "./edits.js";

const MOST_PARTS = 12; // number of listed parts
const LEGENDS = {
  outline: "Orange line: the mask.", fill: "Orange: the mask.", probability: "Dark blue is probability 0, yellow is 1.",
  truth: "Yellow: both. Orange: the mask only. Blue: the truth only.",
  changes: "Yellow: unchanged. Orange: added by you. Blue: taken away by you.",
};
const HELP = [["Wheel, arrows, swipe", "through the slices (Page up and down: five; Home, End)"],
  ["Drag (right button in three planes)", "level, up and down, and width of the window"], ["Double click, r", "the picture as it was at first"],
  ["Shift + wheel over the right picture", "only that one, where there are two"],
  ["Ctrl + wheel, + and −, pinch", "zoom"], ["Shift + drag, two fingers", "move the picture"], ["o", "hide or show the overlay"],
  ["1, 2, 3, 4", "pre, FLAIR, post, composite"], ["t", "threshold"], ["m", "measure a distance: drag a line"],
  ["e", "edit: pen on and off"], ["[ and ]", "size of the pen"], ["Ctrl + z, Ctrl + y", "undo and redo, 20 steps"], ["Escape", "lay the tool down"]];

const make = (kind, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(kind), properties);
  element.append(...children);
  return element;
};

export class Tools {
  constructor(viewer) {
    this.viewer = viewer;
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    this.words = make("p", { className: "words" });
    this.legend = make("p", { className: "legend" });
    this.#beside();
    this.stage = make("div", { className: "stage" }, make("div", { className: "picture" }, this.canvas), this.words, this.legend);
    this.said = make("p", { className: "unseen" });
    this.said.setAttribute("role", "status");
    this.slider = make("input", { type: "range", min: 1, step: 1, oninput: () => viewer.goTo(Number(this.slider.value) - 1) });
    this.slider.setAttribute("aria-label", "Slice");
    this.strip = make("div", { className: "strip" });
    this.strip.setAttribute("aria-hidden", "true"); // the slider says the same
    this.help = make("dialog", { className: "keys" }, make("h2", { textContent: "Keys and hands" }),
      make("dl", {}, ...HELP.flatMap(([keys, does]) => [make("dt", { textContent: keys }), make("dd", { textContent: does })])),
      make("form", { method: "dialog" }, make("button", { textContent: "Close" })));
    this.#bar();
    this.#editBar();
    viewer.element.classList.add("medfl-viewer");
    viewer.element.replaceChildren(this.bar, this.edit, this.stage, make("div", { className: "slices" }, this.strip, this.slider), this.said, this.help);
  }

  /** The second picture, with buttons that move only it. A shield blocks other input: it moves with the first. */
  #beside() {
    const { viewer } = this, wheel = (event) => {
      if (event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      event.stopPropagation();
      const step = event.deltaY + event.deltaX < 0 ? 1 : -1; // with shift, browsers report the wheel as sideways
      if (event.shiftKey) viewer.beside.move(step);
      else viewer.goTo(viewer.slice + step);
    };
    this.besideCanvas = make("canvas");
    this.besideCanvas.setAttribute("role", "img");
    this.besideWords = make("p", { className: "place" });
    const shield = make("div", { className: "shield" });
    shield.addEventListener("wheel", wheel, { passive: false });
    this.beside = make("div", { className: "picture beside" }, this.besideCanvas, shield, this.besideWords,
      make("span", { className: "moves" }, this.#button("Up", "Only this picture a slice up (Shift + wheel)", () => viewer.beside.move(1)),
        this.#button("Down", "Only this picture a slice down (Shift + wheel)", () => viewer.beside.move(-1)),
        this.#button("Take away", "One picture again", () => viewer.beside.close())));
  }

  openBeside(label) {
    this.stage.append(this.beside);
    this.stage.classList.add("two");
    this.besideCanvas.setAttribute("aria-label", label);
  }

  sayBeside(text) {
    if (this.besideWords.textContent === text) return;
    this.besideWords.textContent = text;
    this.besideCanvas.setAttribute("aria-label", `Beside the case: ${text}`);
  }

  closeBeside() {
    this.beside.remove();
    this.stage.classList.remove("two");
  }

  #button(text, title, onclick) {
    return make("button", { type: "button", textContent: text, title, onclick });
  }

  #select(label, values, change) {
    const select = make("select", { onchange: () => change(select.value) }, ...values.map((value) => make("option", { value, textContent: value })));
    return { select, field: make("label", {}, make("span", { textContent: label }), select) };
  }

  #range(label, [min, max, step], change) {
    const input = make("input", { type: "range", min, max, step, oninput: () => change(Number(input.value)) });
    const output = make("output");
    return { input, output, field: make("label", {}, make("span", { textContent: label }), input, output) };
  }

  #bar() {
    const { viewer } = this;
    this.planes = Object.keys(PLANES).map((plane) => this.#button({ axial: "Axial", planes: "Three planes" }[plane] ?? plane, "", () => viewer.set({ plane })));
    this.channel = this.#select("Channel", Object.keys(CHANNELS), (channel) => viewer.set({ channel }));
    this.overlay = this.#select("Overlay", Object.keys(LEGENDS), (overlay) => viewer.set({ overlay, hidden: false }));
    this.hide = this.#button("Hide", "Hide or show the overlay (o)", () => viewer.set({ hidden: !viewer.look.hidden }));
    this.opacity = this.#range("Opacity", [0, 1, 0.05], (opacity) => viewer.set({ opacity }));
    this.limit = this.#range("Threshold", [0.05, 0.95, 0.05], (threshold) => viewer.setThreshold(threshold));
    this.threshold = this.limit.input;
    this.window = this.#select("Window", [...Object.keys(WINDOWS), "by hand"], (name) => WINDOWS[name] && viewer.setWindow(WINDOWS[name]));
    this.measure = this.#button("Measure", "Drag a line to measure (m)", () => viewer.useTool(viewer.tool === "measure" ? "look" : "measure"));
    this.editing = this.#button("Edit", "Correct the mask (e)", () => viewer.useTool(viewer.drawing ? "look" : "pen"));
    this.side = this.#button("", "Exchange the sides of the picture", () => viewer.set({ radiological: !viewer.look.radiological }));
    this.bar = make("div", { className: "bar" }, make("span", { className: "group" }, ...this.planes), this.channel.field, this.overlay.field,
      this.hide, this.opacity.field, this.limit.field, this.window.field, this.measure, this.editing, this.side,
      this.#button("Reset", "The picture as it was at first (r, or a double click)", () => viewer.resetLook()),
      this.#button("?", "Keys and hands (?)", () => this.help.showModal()));
    this.bar.setAttribute("role", "toolbar");
    this.bar.setAttribute("aria-label", "Tools");
  }

  #editBar() {
    const { viewer } = this;
    this.pens = ["pen", "eraser", "grow"].map((tool) => this.#button(`${tool[0].toUpperCase()}${tool.slice(1)}`,
      tool === "grow" ? "Click: paint what is as bright and connected in this slice" : "Drag over the slice", () => viewer.useTool(tool)));
    this.size = this.#range("Size", [1, 30, 1], (size) => viewer.setPenSize(size));
    this.tolerance = this.#range("Tolerance", [1, 60, 1], (tolerance) => {
      viewer.tolerance = tolerance;
      this.refresh();
    });
    this.fill = this.#button("Fill between slices", "Fill the empty slices around this one from those above and below", () =>
      fillBetween(viewer) || this.say("There is no gap between marked slices here."));
    this.undo = this.#button("Undo", "Ctrl + z", () => viewer.undo());
    this.redo = this.#button("Redo", "Ctrl + y", () => viewer.redo());
    this.counted = make("output");
    this.partList = make("span", { className: "parts" });
    this.partsButton = make("details", { ontoggle: () => this.refresh() }, make("summary", { textContent: "Parts" }), this.partList);
    this.edit = make("div", { className: "bar edit" }, make("span", { className: "group" }, ...this.pens), this.size.field, this.tolerance.field,
      this.fill, this.undo, this.redo, this.partsButton, this.counted);
    this.edit.setAttribute("role", "toolbar");
    this.edit.setAttribute("aria-label", "Correcting");
  }

  say(text) {
    this.said.textContent = text;
    this.words.textContent = text;
  }

  /** Show the viewer's settings in the tools. */
  refresh() {
    const { viewer } = this, { look, opened, edits } = viewer;
    if (!opened || !edits || !viewer.nv.volumes.length) return;
    this.planes.forEach((button, k) => button.setAttribute("aria-pressed", Object.keys(PLANES)[k] === look.plane));
    this.pens.forEach((button, k) => button.setAttribute("aria-pressed", ["pen", "eraser", "grow"][k] === viewer.tool));
    for (const button of this.planes.slice(1)) button.disabled = opened.count === 1 || !opened.together;
    this.measure.setAttribute("aria-pressed", viewer.tool === "measure");
    this.editing.setAttribute("aria-pressed", viewer.drawing);
    this.hide.setAttribute("aria-pressed", look.hidden);
    this.side.textContent = look.radiological ? "Radiological" : "Neurological";
    this.side.title = look.radiological ? "The patient's right is on the picture's left; press to exchange"
      : "The patient's left is on the picture's left; press to exchange";
    this.channel.select.value = look.channel;
    for (const option of this.channel.select.options) option.textContent = this.#named(option.value);
    this.channel.field.hidden = opened.channels?.length === 1;
    this.overlay.select.value = look.overlay;
    const there = { truth: Boolean(viewer.truth), changes: true };
    for (const option of this.overlay.select.options) option.hidden = option.disabled = there[option.value] === false;
    this.opacity.input.value = this.opacity.output.value = look.opacity;
    this.opacity.input.disabled = look.overlay === "outline";
    this.limit.input.value = viewer.threshold;
    this.limit.output.value = Number(viewer.threshold).toFixed(2);
    const preset = Object.entries(WINDOWS).find(([, value]) => value.join() === viewer.window.join());
    this.window.select.value = preset?.[0] ?? "by hand";
    this.window.select.disabled = look.channel === "composite";
    this.size.input.value = this.size.output.value = viewer.penSize;
    this.tolerance.input.value = this.tolerance.output.value = viewer.tolerance;
    this.tolerance.field.hidden = viewer.tool !== "grow";
    this.size.field.hidden = viewer.tool === "grow";
    const { changed } = edits, waits = !viewer.probability; // the scan is there, but the model is still at work
    for (const control of [this.overlay.select, this.hide, this.limit.input, this.editing]) control.disabled = waits;
    this.edit.hidden = !viewer.drawing && !changed;
    this.undo.disabled = !edits.done.length;
    this.redo.disabled = !edits.undone.length;
    this.counted.value = `${changed.toLocaleString("en")} pixels changed`;
    this.#slices();
    this.#words(changed, waits);
    this.#parts();
  }

  /** A channel's name in this case: tasks other than the default have their own names, and a single channel fills all three. */
  #named(channel) {
    const { channels } = this.viewer.opened;
    return channels?.[channels.length === 1 ? 0 : CHANNELS[channel]] ?? channel;
  }

  #words(changed, waits) {
    const { viewer } = this, { opened, look, slice } = viewer, pixels = this.counts.counts[slice];
    const marked = waits ? ", no outline yet" : pixels ? `: ${pixels.toLocaleString("en")} pixels marked` : ": nothing outlined";
    const [low, high] = viewer.window;
    this.words.textContent = `Slice ${slice + 1} of ${opened.count}${marked}. Level ${Math.round((low + high) / 2)}, width ${Math.round(high - low)}` +
      `${opened.oriented ? "" : ". Orientation unknown"}`;
    this.legend.textContent = waits ? "The model is at work; its outline comes by itself." : look.hidden ? "Overlay hidden (press o)." : LEGENDS[look.overlay];
    this.said.textContent = `Slice ${slice + 1} of ${opened.count}${marked}${changed ? `, ${changed} changed in the case` : ""}`;
    this.canvas.setAttribute("aria-label", `${look.plane} view, ${this.#named(look.channel)}, slice ${slice + 1} of ${opened.count}${marked}; ` +
      (opened.oriented ? `the patient's ${look.radiological ? "left" : "right"} is on the right` : "orientation unknown"));
  }

  /** The mask's area in each slice, as bars; a click jumps. */
  #slices() {
    const { viewer } = this, { opened, edits, area, slice } = viewer;
    this.slider.max = opened.count;
    this.slider.value = slice + 1;
    this.slider.setAttribute("aria-valuetext", `slice ${slice + 1} of ${opened.count}`);
    this.slider.parentElement.hidden = opened.count === 1;
    if (this.counts?.mask !== edits.mask || this.counts.steps !== edits.steps) {
      const counts = countsOf(edits.mask, area);
      this.counts = { mask: edits.mask, steps: edits.steps, counts };
      const most = Math.max(1, ...counts);
      this.strip.replaceChildren(...counts.map((pixels, k) => {
        const bar = make("i", { title: `slice ${k + 1}: ${pixels} pixels`, onclick: () => viewer.goTo(k) });
        bar.style.setProperty("--high", `${(100 * pixels) / most}%`);
        return bar;
      }));
    }
    [...this.strip.children].forEach((bar, k) => bar.classList.toggle("current", k === slice));
  }

  #parts() {
    this.partsButton.hidden = !this.viewer.drawing && !this.viewer.removed.length;
    if (!this.partsButton.open || this.partsButton.hidden) return;
    const { viewer } = this, spacing = viewer.opened.spacing;
    const size = ({ length }) => (spacing ? `${((length * spacing[0] * spacing[1] * spacing[2]) / 1000).toFixed(2)} cm³` : `${length} pixels`);
    this.partList.replaceChildren(...parts(viewer).slice(0, MOST_PARTS).map((part, k) =>
      make("label", {}, make("input", { type: "checkbox", checked: part.on, onchange: () => switchPart(viewer, part) }), `${k + 1}: ${size(part.voxels)}`)));
  }
}
