// What a reader sees of a slice, on a canvas. Colours are told apart by colour-blind readers (Okabe and Ito), and lines differ
// in style.

export const ORANGE = [230, 159, 0], BLUE = [86, 180, 233], YELLOW = [240, 228, 66]; // prediction, truth, agreement
export const VIEWS = { pre: 0, FLAIR: 1, post: 2, composite: null };
export const UNKNOWN = "orientation unknown";
const SHOWN = 640; // pixels that the shorter side of a picture has at least
const CIVIDIS = [[0, 34, 78], [66, 78, 108], [124, 123, 120], [187, 173, 108], [254, 232, 56]]; // 0, 1/4 ... 1
const css = (colour, opacity = 1) => `rgb(${colour.join(" ")} / ${opacity})`;

/** Draw slice `index`, from 0, of a case. look: view, level, width, overlay (outline, fill, probability, truth), hidden, opacity,
    threshold. */
export function draw(canvas, opened, probability, index, look) {
  drawSlice(canvas, opened, probability, index, look);
  mark(canvas, opened.oriented);
}

/** R, L, A and P at the edges of a picture, or the words that the orientation is not known. */
function mark(canvas, oriented) {
  const context = canvas.getContext("2d"), { width, height } = canvas;
  const high = Math.max(10, Math.round(Math.min(width, height) / 30));
  context.imageSmoothingEnabled = true;
  Object.assign(context, { font: `${high}px sans-serif`, fillStyle: "white", strokeStyle: "black", lineWidth: 4, textAlign: "center", textBaseline: "middle" });
  context.setLineDash([]);
  const edges = oriented ? [["R", high, height / 2], ["L", width - high, height / 2], ["A", width / 2, high], ["P", width / 2, height - high]]
    : [[UNKNOWN, width / 2, height - high]];
  for (const [text, x, y] of edges) {
    context.strokeText(text, x, y);
    context.fillText(text, x, y);
  }
}

function drawSlice(canvas, opened, probability, index, look) {
  const { height, width } = opened, area = height * width;
  const times = Math.max(1, Math.ceil(SHOWN / Math.min(height, width)));
  canvas.width = width * times;
  canvas.height = height * times;
  const context = canvas.getContext("2d");
  const shown = probability.subarray(index * area, (index + 1) * area);
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(onCanvas(basePicture(opened, index, look), width, height), 0, 0, canvas.width, canvas.height);
  if (look.hidden) return;
  const limit = Math.fround(look.threshold);
  const marked = (k) => shown[k] >= limit;
  const lay = (pixels) => {
    context.imageSmoothingEnabled = false;
    context.globalAlpha = look.opacity;
    context.drawImage(onCanvas(pixels, width, height), 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
  };
  const paint = (inside, colour) => {
    const flat = new Uint8ClampedArray(4 * area);
    for (let k = 0; k < area; k++) if (inside(k)) flat.set([...colour, 255], 4 * k);
    lay(flat);
  };
  const line = (inside, colour, dash = []) => {
    context.lineWidth = Math.max(2, Math.round(canvas.width / 220));
    context.strokeStyle = css(colour);
    context.setLineDash(dash);
    context.stroke(edges(inside, width, height, times));
  };
  if (look.overlay === "probability") lay(probabilityPicture(shown));
  if (look.overlay === "fill") paint(marked, ORANGE);
  if (look.overlay === "outline") line(marked, ORANGE);
  if (look.overlay === "truth") {
    const truth = opened.truth.subarray(index * area, (index + 1) * area);
    const wrong = (k) => marked(k) && !truth[k], missed = (k) => !marked(k) && truth[k] > 0;
    paint((k) => marked(k) && truth[k] > 0, YELLOW);
    paint(wrong, ORANGE);
    paint(missed, BLUE);
    line(wrong, ORANGE);
    line(missed, BLUE, [8, 8]);
  }
}

function onCanvas(pixels, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  return canvas;
}

/** A slice in one of `VIEWS`, level - width / 2 becoming black and level + width / 2 white. */
function basePicture({ pixels, height, width }, index, look) {
  const area = height * width, channel = VIEWS[look.view];
  const shade = Uint8ClampedArray.from({ length: 256 }, (_, value) => ((value - look.level) * 255) / look.width + 127.5);
  const picture = new Uint8ClampedArray(4 * area);
  for (let k = 0, from = 3 * index * area; k < 4 * area; k += 4, from += 3) {
    for (let colour = 0; colour < 3; colour++) picture[k + colour] = shade[pixels[from + (channel ?? colour)]];
    picture[k + 3] = 255;
  }
  return picture;
}

/** Probabilities in the colours of cividis: dark blue 0, yellow 1. */
function probabilityPicture(probability) {
  const last = CIVIDIS.length - 1;
  const picture = new Uint8ClampedArray(4 * probability.length);
  probability.forEach((value, k) => {
    const at = value * last, low = Math.min(Math.floor(at), last - 1);
    for (let colour = 0; colour < 3; colour++) {
      picture[4 * k + colour] = CIVIDIS[low][colour] + (at - low) * (CIVIDIS[low + 1][colour] - CIVIDIS[low][colour]);
    }
    picture[4 * k + 3] = 255;
  });
  return picture;
}

/** The border between pixels inside and outside, as a path on a picture `times` as large. */
function edges(inside, width, height, times) {
  const path = new Path2D();
  const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height && Boolean(inside(y * width + x));
  const stroke = (x, y, u, v) => {
    path.moveTo(x * times, y * times);
    path.lineTo(u * times, v * times);
  };
  for (let y = 0; y <= height; y++) { // runs of horizontal border, then of vertical
    for (let x = 0, from = null; x <= width; x++) {
      const border = x < width && at(x, y) !== at(x, y - 1);
      if (border && from === null) from = x;
      if (!border && from !== null) {
        stroke(from, y, x, y);
        from = null;
      }
    }
  }
  for (let x = 0; x <= width; x++) {
    for (let y = 0, from = null; y <= height; y++) {
      const border = y < height && at(x, y) !== at(x - 1, y);
      if (border && from === null) from = y;
      if (!border && from !== null) {
        stroke(x, from, x, y);
        from = null;
      }
    }
  }
  return path;
}

/** The tumour's area in each slice as an SVG of bars, the slice that is shown in orange; `jump` gets a slice that is clicked. */
export function chart(svg, rows, number, jump) {
  const most = Math.max(1, ...rows.map((row) => row.pixels));
  const bars = rows.map((row) => {
    const group = document.createElementNS(svg.namespaceURI, "g");
    const tall = (96 * row.pixels) / most;
    for (const [y, h, name] of [[0, 100, "reach"], [98 - tall, tall + 2, row.slice === number ? "bar current" : "bar"]]) {
      const bar = document.createElementNS(svg.namespaceURI, "rect");
      for (const [key, value] of Object.entries({ x: row.slice - 0.9, width: 0.8, y, height: h, class: name })) bar.setAttribute(key, value);
      group.append(bar);
    }
    const title = document.createElementNS(svg.namespaceURI, "title");
    title.textContent = `slice ${row.slice}: ${row.pixels} pixels`;
    group.append(title);
    group.addEventListener("click", () => jump(row.slice));
    return group;
  });
  svg.setAttribute("viewBox", `0 0 ${rows.length} 100`);
  svg.setAttribute("aria-label", `Tumour area in each of ${rows.length} slices, at most ${most} pixels; slice ${number} is marked; ` +
    "the slider above does the same");
  svg.replaceChildren(...bars);
}
