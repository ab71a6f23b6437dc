// Does a scan look like those that the model was trained on? What is measured of it, the limits and the sentences come with the model's
// file, from appearance/: here they are put together.

import { listed } from "./common.js";

const EPSILON = 1e-6;

/** Why a case may be none that the model can judge: a sentence for each reason, none if it looks fine. measured: what the graph gave for
    the whole volume, {foreground_mean, foreground_deviation, appearance, blank, copies}; rules: the file's `plausibility`, where `brain` tells whether
    the model is one of the default task's images; training: the
    statistics of the model's training images, or null. */
export function doubts({ width, height, count }, measured, rules, training) {
  const found = [], { channels, sentences } = rules;
  const tell = (key, names = []) => found.push(sentences[key].replaceAll("{columns}", width).replaceAll("{rows}", height)
    .replaceAll("{images}", rules.images).replaceAll("{names}", names.length ? listed([...new Set(names)]) : ""));
  const shorter = Math.min(width, height), longer = Math.max(width, height);
  if (rules.brain && (shorter < rules.sides[0] || longer > rules.sides[1])) tell("size");
  if (rules.brain && longer > rules.aspect * shorter) tell("shape");
  const flat = channels.filter((_, k) => measured.blank[k]);
  if (flat.length) return tell("blank", flat), found;
  const same = channels.filter((_, k) => measured.copies[k] && k !== rules.flair);
  if (rules.brain && same.length) tell("copies", [...same, channels[rules.flair]]);
  if (rules.brain && measured.appearance[rules.appearance.indexOf("frame")] > 1) return tell("inverted"), found;
  if (!training || !["foreground_mean", "foreground_deviation", "appearance"].every((name) => name in training)) return tell("silent"), found;
  const limit = count > 1 ? rules.limit : rules.limit_alone;
  const far = (name) => training[name].mean.map((_, k) => k).filter((k) =>
    Math.abs(measured[name][k] - training[name].mean[k]) > limit * (training[name].deviation[k] + EPSILON));
  const unlike = far("appearance").map((k) => rules.appearance[k]);
  if (unlike.length) tell("unlike", unlike);
  const odd = new Set([...far("foreground_mean"), ...far("foreground_deviation")]);
  if (rules.brain && odd.size) tell("brightness", channels.filter((_, k) => odd.has(k)));
  return found;
}
