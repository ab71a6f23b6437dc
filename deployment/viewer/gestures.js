// Wheel, keys and touch, except for those that NiiVue handles.

import { endStroke, grow } from "./correcting.js";

const SWIPE = 14; // pixels that a finger moves from slice to slice
const onButton = (event) => Boolean(event.target.closest?.("button")); // the second picture has some

/** Let a reader's hands move a viewer. */
export function listen(viewer) {
  const { tools, element } = viewer, { stage } = tools;
  stage.addEventListener("wheel", (event) => {
    if (!viewer.opened || !(event.ctrlKey || event.metaKey)) return; // without them NiiVue moves through the slices
    stop(event);
    viewer.zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15);
  }, { capture: true, passive: false });
  stage.addEventListener("dblclick", (event) => {
    if (onButton(event)) return;
    stop(event);
    if (viewer.opened && !viewer.drawing) viewer.resetLook();
  }, { capture: true });
  stage.addEventListener("pointermove", (event) => event.buttons && viewer.opened && viewer.windowMayDiffer());
  const ended = () => viewer.opened && (viewer.tool === "pen" || viewer.tool === "eraser") && endStroke(viewer);
  stage.addEventListener("pointerup", (event) => {
    if (viewer.opened && viewer.tool === "grow" && event.button === 0 && event.target === tools.canvas) grow(viewer);
    ended();
    if (viewer.opened) viewer.windowMayDiffer();
  });
  stage.addEventListener("pointerleave", ended);
  touches(viewer, stage);
  const heard = (event) => {
    if (!viewer.opened || event.altKey || event.target.closest?.("input, select, textarea, dialog, [contenteditable]")) return;
    if (event.target !== element.ownerDocument.body && event.target.closest?.("button, a, summary") && [" ", "Enter"].includes(event.key)) return;
    if (!key(viewer, event)) return;
    event.preventDefault();
    event.stopPropagation(); // NiiVue's own keys would change the planes
  };
  element.ownerDocument.addEventListener("keydown", heard, { capture: true });
  tools.canvas.addEventListener("keydown", (event) => event.stopImmediatePropagation(), { capture: true });
}

function stop(event) {
  event.preventDefault();
  event.stopPropagation();
}

/** Returns whether the key has a meaning. */
function key(viewer, { key: pressed, ctrlKey, metaKey, shiftKey }) {
  const { look, slice, tools } = viewer;
  if (ctrlKey || metaKey) {
    const does = { z: () => (shiftKey ? viewer.redo() : viewer.undo()), y: () => viewer.redo() }[pressed.toLowerCase()];
    does?.();
    return Boolean(does);
  }
  const channels = ["pre", "FLAIR", "post", "composite"];
  const does = {
    ArrowUp: () => viewer.goTo(slice + 1), ArrowRight: () => viewer.goTo(slice + 1), ArrowDown: () => viewer.goTo(slice - 1),
    ArrowLeft: () => viewer.goTo(slice - 1), PageUp: () => viewer.goTo(slice + 5), PageDown: () => viewer.goTo(slice - 5),
    Home: () => viewer.goTo(0), End: () => viewer.goTo(viewer.opened.count - 1), o: () => viewer.set({ hidden: !look.hidden }),
    t: () => tools.threshold.focus(), e: () => viewer.useTool(viewer.drawing ? "look" : "pen"),
    m: () => viewer.useTool(viewer.tool === "measure" ? "look" : "measure"), r: () => viewer.resetLook(), "+": () => viewer.zoom(1.15),
    "-": () => viewer.zoom(1 / 1.15), "?": () => tools.help.showModal(), "[": () => viewer.setPenSize(viewer.penSize - 1),
    "]": () => viewer.setPenSize(viewer.penSize + 1), Escape: () => viewer.useTool("look"),
  }[pressed] ?? (channels["1234".indexOf(pressed)] && (() => viewer.set({ channel: channels["1234".indexOf(pressed)] })));
  does?.();
  return Boolean(does);
}

/** One finger through the slices, two to zoom and move; a selected tool uses the single finger. */
function touches(viewer, stage) {
  let last = null;
  const seen = ({ touches: fingers }) => {
    const [one, other = one] = [...fingers].map(({ clientX, clientY }) => ({ x: clientX, y: clientY }));
    return { x: (one.x + other.x) / 2, y: (one.y + other.y) / 2, apart: Math.hypot(one.x - other.x, one.y - other.y), fingers: fingers.length };
  };
  const ours = ({ touches: fingers }) => fingers.length > 1 || (viewer.tool === "look" && viewer.look.plane === "axial");
  const begin = (event) => {
    if (!viewer.opened || !event.touches.length || !ours(event) || onButton(event)) return void (last = null);
    stop(event);
    last = seen(event);
  };
  stage.addEventListener("touchstart", begin, { capture: true, passive: false });
  stage.addEventListener("touchmove", (event) => {
    if (!last || !ours(event)) return;
    stop(event);
    const now = seen(event);
    if (now.fingers === 1) {
      const steps = Math.trunc((last.y - now.y) / SWIPE);
      if (steps) viewer.goTo(viewer.slice + steps);
      if (steps) last.y -= steps * SWIPE;
      return;
    }
    const { scene } = viewer.nv;
    if (last.apart > 0) viewer.zoom(now.apart / last.apart);
    const mm = viewer.millimetresOfPixel();
    const side = viewer.look.radiological ? -1 : 1;
    scene.pan2Dxyzmm = [scene.pan2Dxyzmm[0] + side * (now.x - last.x) * mm, scene.pan2Dxyzmm[1] - (now.y - last.y) * mm, ...scene.pan2Dxyzmm.slice(2)];
    viewer.nv.drawScene();
    last = now;
  }, { capture: true, passive: false });
  stage.addEventListener("touchend", (event) => {
    if (last) stop(event);
    begin(event);
    if (viewer.opened && viewer.drawing) (viewer.tool === "grow" ? grow(viewer) : endStroke(viewer));
  }, { capture: true, passive: false });
}
