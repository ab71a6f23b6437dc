// Does a scan look like those that the model was trained on? The rules of plausibility.py; its constants and the training images'
// statistics come with the model.

import { listed } from "./common.js";

/** What is measured of a case: of each channel mean and deviation over the foreground (what lies above the channel's mean), and
    six features of FLAIR's appearance, in the order of plausibility.APPEARANCE. */
export function describe(opened, { flair, frame }) {
  const channels = [0, 1, 2].map((channel) => moments(opened.pixels, channel));
  return { foreground_mean: channels.map((c) => c.mean), foreground_deviation: channels.map((c) => c.deviation),
    appearance: appearance(opened, flair, frame, channels[flair]) };
}

/** Of a channel: mean over all pixels; number, mean and deviation of those above it; smallest and largest value. */
function moments(pixels, channel) {
  const histogram = new Float64Array(256);
  for (let k = channel; k < pixels.length; k += 3) histogram[pixels[k]]++;
  const over = (from, f) => histogram.reduce((sum, number, value) => sum + (value > from ? number * f(value) : 0), 0);
  const all = pixels.length / 3;
  const average = over(-1, (v) => v) / all;
  const number = over(average, () => 1), mean = over(average, (v) => v) / Math.max(number, 1);
  const deviation = Math.sqrt(over(average, (v) => (v - mean) ** 2) / Math.max(number, 1));
  const variance = over(-1, (v) => (v - average) ** 2) / all;
  return { average, number, mean, deviation, variance, flat: histogram.filter((n) => n).length === 1 };
}

function appearance({ pixels, count, height, width }, flair, frame, { average, number, mean, variance }) {
  const high = Math.max(1, pythonRound(frame * height)), wide = Math.max(1, pythonRound(frame * width));
  let outer = 0, outerNumber = 0, steps = 0, mirrored = 0;
  const projection = new Float64Array(height * width);
  for (let slice = 0, at = flair; slice < count; slice++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++, at += 3) {
        const value = pixels[at];
        projection[y * width + x] += value;
        if (y < high || y >= height - high || x < wide || x >= width - wide) {
          outer += value;
          outerNumber++;
        }
        if (x + 1 < width) steps += Math.abs(pixels[at + 3] - value);
        mirrored += (value - average) * (pixels[at + 3 * (width - 1 - 2 * x)] - average);
      }
    }
  }
  const all = count * height * width, spread2 = variance + EPSILON;
  const level = number ? mean : 0;
  const middle = projection.reduce((sum, value) => sum + value, 0) / projection.length;
  const tall = new Float64Array(height), broad = new Float64Array(width);
  projection.forEach((value, k) => {
    if (value > middle) {
      tall[Math.floor(k / width)]++;
      broad[k % width]++;
    }
  });
  return [outer / Math.max(outerNumber, 1) / (level + EPSILON), number / all,
    steps / (count * height * (width - 1)) / Math.sqrt(spread2), mirrored / all / spread2, spread(tall), spread(broad)];
}

const EPSILON = 1e-6;

/** Round half to even, as Python does. */
function pythonRound(value) {
  const down = Math.floor(value);
  return value - down === 0.5 ? down + (down % 2) : Math.round(value);
}

/** Standard deviation of the position along an axis, as a share of its length. */
function spread(weights) {
  const total = Math.max(weights.reduce((sum, w) => sum + w, 0), EPSILON);
  const place = (k) => k / weights.length;
  const mean = weights.reduce((sum, w, k) => sum + w * place(k), 0) / total;
  return Math.sqrt(weights.reduce((sum, w, k) => sum + w * (place(k) - mean) ** 2, 0) / total);
}

/** Why a case may be none that the model can judge: a sentence for each reason, none if it looks fine. `rules`: the constants of
    plausibility.py; `training`: the statistics of the model's training images, or null. */
export function doubts(opened, rules, training) {
  const { width, height, count, pixels } = opened;
  const found = [];
  const shorter = Math.min(width, height), longer = Math.max(width, height);
  if (shorter < rules.sides[0] || longer > rules.sides[1]) {
    found.push(`The slices are ${width}×${height} pixels; the model was made for about 256×256.`);
  }
  if (longer > rules.aspect * shorter) {
    found.push(`The slices are ${width}×${height} pixels, and the model knows square ones: the shape is distorted for it.`);
  }
  const flat = rules.channels.filter((_, channel) => moments(pixels, channel).flat);
  if (flat.length) return [...found, `Nothing is to be seen in ${listed(flat)}: every pixel has the same value.`];
  const same = rules.channels.filter((_, channel) => channel !== rules.flair && identical(pixels, channel, rules.flair));
  if (same.length) {
    found.push(`${listed([...same, rules.channels[rules.flair]])} are identical. The model expects three sequences; with copies in ` +
      "the place of missing ones it is less reliable.");
  }
  const measured = describe(opened, rules);
  if (measured.appearance[rules.appearance.indexOf("frame")] > 1) {
    return [...found, "The frame is brighter than the middle. If the intensities are inverted, invert them back."];
  }
  if (!training || !Object.keys(measured).every((name) => name in training)) {
    return [...found, "The model does not say what its training images look like, so this picture is not compared with them."];
  }
  const limit = count > 1 ? rules.limit : rules.limit_alone;
  const far = (name) => measured[name].map((_, k) => k).filter((k) =>
    Math.abs(measured[name][k] - training[name].mean[k]) > limit * (training[name].deviation[k] + EPSILON));
  const unlike = far("appearance").map((k) => rules.appearance[k]);
  if (unlike.length) {
    found.push(`This does not look like the brain scans that the model was trained on (${listed(unlike)}). Its mask means nothing ` +
      "unless it is one.");
  }
  const odd = [...new Set([...far("foreground_mean"), ...far("foreground_deviation")])].sort().map((k) => rules.channels[k]);
  if (odd.length) found.push(`Brightness or contrast of ${listed(odd)} lies outside of the training images' range.`);
  return found;
}

function identical(pixels, one, other) {
  for (let k = 0; k < pixels.length; k += 3) if (pixels[k + one] !== pixels[k + other]) return false;
  return true;
}
