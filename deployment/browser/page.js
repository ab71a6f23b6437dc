// The page: what is opened, shown and downloaded. The other modules know nothing of it.

import { readCase, readMasks } from "./cases.js";
import { SIZES_MM, UserError, counted, isSizeMm, plain } from "./common.js";
import { doubts } from "./doubts.js";
import { components, downloads, isVolume } from "./downloads.js";
import { unframe } from "./field_of_view.js";
import { componentLines, figureLines, sliceWords } from "./figures.js";
import { dropped, take } from "./files.js";
import { keep } from "./keeping.js";
import { Network, checkBrowser, download, readProperties } from "./model.js";
import { mirror } from "./nifti.js";
import { sliceRows } from "./readout.js";
import { createViewer } from "./viewer.js";
import { $, attempt, message, progress, say, tableRows } from "./words.js";

const DICOM = { converter: "libs/dcm2niix/dcm2niix.jpeg.js", binary: "libs/dcm2niix/dcm2niix.jpeg.wasm", rules: "series_rules.json" };
const SAMPLES = ["phantom_1", "phantom_2", "phantom_3"];
const PHANTOMS_ONLY = "This model learned from phantoms only, which are painted: it knows nothing of real scans, and its outline of one " +
  "means nothing.";
const REST = 150; // ms
const state = { model: null, network: null, viewer: null, opened: null, probability: null, measured: null, rows: null, saved: 0, busy: false, cancelled: false };

// ---- the model ----

async function start() {
  checkBrowser();
  for (const name of SAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name.replace("_", " ").replace("p", "P");
    button.onclick = () => attempt(async () => open([{ name: `${name}.zip`, bytes: await download(`samples/${name}.zip`) }], true));
    $("samples").append(button);
  }
  say("Loading the model …");
  const bytes = await download("model.onnx", (share) => progress(share));
  const size = bytes.length;
  state.model = readProperties(bytes);
  state.network = new Network();
  await state.network.load(bytes);
  showCard(size);
  try {
    state.viewer = await createViewer($("viewer"), { slice: showSlice, mask: showMask });
  } catch (error) {
    console.warn(error);
    throw new UserError("this browser draws no three-dimensional pictures (WebGL 2); switch on its hardware acceleration, or use another browser");
  }
  ready("Ready.");
  keep([...Object.values(DICOM), ...state.network.files]).catch(() => {}); // not waited for; a private window keeps nothing; the page works as before
}

function ready(text) {
  const { threads, card } = state.network;
  const how = card ? "the graphics card" : threads > 1 ? `${threads} threads` : "one thread";
  const why = card || self.crossOriginIsolated ? "" : ": this address does not isolate the page, so it may not use more";
  $("progress").hidden = true;
  say(`${text} The network runs on ${how}${why}.`);
  showParts();
}

/** Either the ways to open a case, or the case; nothing to open while the network is busy or not there. */
function showParts() {
  $("case").hidden = state.opened === null;
  $("open").hidden = $("intro").hidden = state.opened !== null;
  $("open").hidden ||= state.busy || !state.viewer;
  $("cancel").hidden = !state.busy;
  $("close").hidden = state.busy && state.probability === null; // cancelling closes it
  $("side-panel").inert = state.probability === null;
  document.body.classList.toggle("reading", state.opened !== null);
  if (state.opened) $("side-panel").append($("card"), $("foot"));
  else document.querySelector(".page").append($("card"), $("foot"));
}

/** What the model outlines: of another task than the default its file tells. */
const outlined = () => state.model.metadata.task?.region ?? "tumour";

function showCard(size) {
  const { task } = state.model.metadata;
  $("heading").textContent = `MedFL: ${outlined()} segmentation`;
  if (task && task.name !== "lgg") {
    $("what").textContent = `Open slices (${task.channels.join(" and ")}) as in ${task.title}.`;
    $("outlined").textContent = task.region;
  }
  const { medfl, commit, model } = state.model.version;
  $("version").textContent = `MedFL ${medfl}, commit ${commit?.slice(0, 12) ?? "unknown"}; model ${model.slice(0, 12)} (SHA-256)`;
  const rows = [...state.model.card, ["This file", `model.onnx, ${(size / 1e6).toFixed(1)} MB`]];
  $("card-rows").replaceChildren(...rows.map(([subject, text]) => {
    const entry = document.createElement("div");
    for (const [kind, content] of [["dt", subject], ["dd", text]]) {
      entry.append(Object.assign(document.createElement(kind), { textContent: content }));
    }
    return entry;
  }));
}

// ---- opening and closing ----

/** The case in these files, as the model takes it. */
async function read(files) {
  const opened = await readCase(files, loadDicom);
  opened.isBrain = state.model.plausibility.brain;
  if (!opened.isBrain) unframe(opened);
  return opened;
}

/** Segment the files of a case and show it. sample: whether they are this page's own phantoms. */
async function open(files, sample = false) {
  if (state.busy || !state.viewer) return;
  Object.assign(state, { busy: true, cancelled: false });
  say("Reading the files …");
  try {
    await drawn(); // reading is one piece of work: without a pause the page would still say that it is ready
    const opened = await read(files);
    opened.sample = sample;
    files.length = 0; // their bytes are not needed any more
    showParts();
    say(`Segmenting ${counted(opened.count, "slice")} …`);
    await drawn();
    if (state.cancelled) return ready("Cancelled.");
    await segment(opened);
  } catch (error) {
    ready("Ready.");
    throw error;
  } finally {
    state.busy = false;
    showParts();
  }
}

/** What reads DICOM, loaded when it is needed. */
async function loadDicom() {
  const [{ default: createConverter }, rules] = await Promise.all([import(`./${DICOM.converter}`), download(DICOM.rules)]);
  return { createConverter, rules: JSON.parse(new TextDecoder().decode(rules)) };
}

/** Show the scan, and what the network finds as soon as that is there. */
async function segment(opened) {
  const begun = performance.now();
  Object.assign(state, { opened, probability: null, measured: null, rows: null });
  let found = null;
  try {
    await showScan();
    found = state.cancelled ? null : await state.network.segment(opened, (done) => {
      say(`Segmenting: slice ${done} of ${opened.count}.`);
      progress(done / opened.count);
    });
  } finally {
    if (!found || state.cancelled) close();
  }
  if (!state.opened) return ready("Cancelled.");
  Object.assign(state, found);
  await showFound();
  ready(`${opened.count === 1 ? "One slice" : `${opened.count} slices`} in ${((performance.now() - begun) / 1000).toFixed(1)} s.`);
}

/** What the reader knows of the side becomes the case's; a mirrored case is segmented again. */
async function takeSide(left) {
  const { opened } = state;
  if (state.busy || !mayForget()) return;
  opened.oriented = true;
  if (!left) {
    await showScan();
    return showFound();
  }
  mirror(opened);
  Object.assign(state, { busy: true, cancelled: false });
  try {
    await segment(opened);
  } finally {
    state.busy = false;
    showParts();
  }
}

/** Segment another date's scan and show it beside the case. */
async function openBeside(files) {
  if (state.busy) return;
  Object.assign(state, { busy: true, cancelled: false });
  const { opened: first, viewer, model } = state;
  try {
    say("Reading the files …");
    await drawn();
    const opened = await read(files);
    showParts();
    const found = await state.network.segment(opened, (done) => {
      say(`Segmenting the other date: slice ${done} of ${opened.count}.`);
      progress(done / opened.count);
    });
    if (!found || state.cancelled || state.opened !== first) return;
    const mask = found.probability.map((value) => (value >= model.metadata.threshold ? 1 : 0));
    await viewer.beside.show({ ...opened, mask, label: `Other date, ${plain(opened.name)}` });
  } finally {
    state.busy = false;
    ready(state.cancelled ? "Cancelled." : "Ready.");
  }
}

/** Resolves once the browser had the time to show what was said. */
const drawn = () => new Promise((done) => setTimeout(done, 20));

const unsaved = () => state.opened !== null && state.viewer.edits?.changed > 0 && state.viewer.edits.steps !== state.saved;
const mayForget = () => !unsaved() || confirm("Your corrections of this case were not downloaded. Forget them?");

function close() {
  state.viewer.close();
  Object.assign(state, { opened: null, probability: null, measured: null, rows: null });
  for (const id of ["files", "folder", "truth", "date", "masks", "pixel-size", "slice-distance"]) $(id).value = "";
  $("messages").replaceChildren();
  ready("Ready.");
}

// ---- showing ----

/** The scan, without what the network finds. */
async function showScan() {
  const { opened, model, viewer } = state;
  state.saved = 0;
  showParts();
  $("name").textContent = plain(opened.name);
  for (const id of ["doubts", "figures", "component-rows", "downloads"]) $(id).replaceChildren();
  $("edited").textContent = "";
  $("slice-figures").textContent = "Figures, files and doubts come with the outline.";
  $("spacing").hidden = opened.measured;
  $("side").hidden = opened.oriented || !opened.nifti;
  $("figures-title").textContent = opened.count === 1 ? "This slice" : "All slices";
  opened.channels = model.metadata.task?.name === "lgg" ? null : model.metadata.task?.channels;
  await viewer.show(opened, null, model.metadata.threshold);
  $("name").tabIndex = -1;
  $("name").focus({ preventScroll: true });
}

/** What the network found: its outline, the doubts about it, figures and files. */
async function showFound() {
  const { opened, model, viewer } = state;
  showParts();
  const ofPhantoms = model.metadata.data?.name === "phantoms";
  const words = opened.sample ? ["This is a phantom: painted, not measured."] : ofPhantoms ? [PHANTOMS_ONLY] : [];
  $("doubts").replaceChildren(
    ...words.map((text) => message(opened.sample ? "note" : "doubt", text)),
    ...doubts(opened, state.measured, model.plausibility, model.metadata.preprocessing.training_images).map((text) => message("doubt", text)),
    ...opened.notes.map((text) => message("note", text)));
  offerDownloads();
  await viewer.propose(state.probability);
  measure();
}

/** The mask is another one: its figures, and those of the slice, once the reader's hand rests, so that no stroke waits for them. */
function showMask() {
  clearTimeout(state.due);
  state.due = setTimeout(measure, REST);
}

/** The figures for the mask, the truth and the spacing of now. */
function measure() {
  clearTimeout(state.due);
  if (!state.probability) return; // closed meanwhile
  const { opened, probability, viewer } = state, { changed } = viewer.edits;
  state.rows = sliceRows(opened, probability, viewer.mask());
  $("figures").replaceChildren(...tableRows(figureLines(opened, state.rows, changed, outlined())));
  showComponents();
  $("edited").textContent = changed ? `You changed ${counted(changed, "pixel")} of the model's proposal: the files hold your mask, and the ` +
    "ZIP the proposal beside it." : "";
  showSlice();
}

/** Each connected part by itself, where the reader has that table open. */
function showComponents() {
  $("components").hidden = !isVolume(state.opened);
  if (!$("components").open || !state.probability || $("components").hidden) return;
  $("component-rows").replaceChildren(...tableRows(componentLines(state.opened, components(state))));
}

function showSlice() {
  const { rows, viewer } = state;
  if (!rows) return;
  $("slice-figures").textContent = sliceWords(rows, viewer.slice);
}

// ---- taking along ----

function offerDownloads() {
  const offers = downloads(state, measure);
  $("downloads").replaceChildren(...Object.entries(offers).map(([text, give]) =>
    Object.assign(document.createElement("button"), { type: "button", textContent: text, onclick: () => attempt(give) })));
}

// ---- what a reader does ----

/** What is done with the files that a field gets. */
function whenChosen(id, act) {
  $(id).onchange = () => attempt(async () => {
    const files = [...$(id).files];
    $(id).value = ""; // so that the same files can be chosen again
    if (files.length) await act(await take(files));
  });
}
for (const id of ["files", "folder"]) whenChosen(id, (files) => open(files));
$("drop").ondragover = (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
};
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const files = dropped(event.dataTransfer.items); // the list is gone once this function has returned
  attempt(async () => open(await take(await files)));
};
// a drop beside the field would leave the page for the file
document.ondragover = document.ondrop = (event) => event.preventDefault();
$("cancel").onclick = () => attempt(async () => {
  state.cancelled = true;
  await state.network.cancel();
});
window.onbeforeunload = (event) => {
  if (state.opened || state.busy) event.preventDefault(); // the browser asks
};
$("close").onclick = () => mayForget() && close();
$("components").ontoggle = showComponents;
$("fold").onclick = () => {
  const folded = document.body.classList.toggle("folded");
  $("fold").setAttribute("aria-expanded", !folded);
};
for (const id of ["pixel-size", "slice-distance"]) {
  $(id).onchange = () => {
    const [plane, between] = [Number($("pixel-size").value), Number($("slice-distance").value)];
    const all = [plane, between].every(isSizeMm);
    attempt(async () => {
      await state.viewer.setSpacing(all ? [plane, plane, between] : null);
      showMask();
      if (!all && [plane, between].some((value) => value && !isSizeMm(value))) {
        throw new UserError(`sizes lie between ${SIZES_MM.join(" and ")} mm; give the side of a pixel and the distance of slices again`);
      }
    });
  };
}
$("side-right").onclick = () => attempt(() => takeSide(false));
$("side-left").onclick = () => attempt(() => takeSide(true));
whenChosen("truth", async (files) => {
  state.opened.truth = await readMasks(state.opened, files);
  state.viewer.setTruth(state.opened.truth);
  showMask();
});
whenChosen("date", openBeside);
whenChosen("masks", async (files) => state.viewer.beside.show({ ...state.opened, mask: await readMasks(state.opened, files), label: "Other masks" }));
$("where").textContent = "Scans, masks and figures stay in this browser's memory until the case or the page is closed. The page may load " +
  "things from its own address alone.";
showParts();
attempt(start);
