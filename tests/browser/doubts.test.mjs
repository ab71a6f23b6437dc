// Which differences are told: the limits, for a volume and for a lone slice, and the bounds of size.

import assert from "node:assert/strict";
import test from "node:test";

const { doubts } = await import(new URL("../../deployment/browser/doubts.js", import.meta.url));
const sentences = Object.fromEntries(["size", "shape", "blank", "copies", "inverted", "silent", "unlike", "brightness"]
  .map((name) => [name, `${name} {columns}×{rows} {names}`]));
const rules = { channels: ["pre-contrast", "FLAIR", "post-contrast"], brain: true, images: "brain scans", flair: 1, limit: 4, limit_alone: 6, sides: [64, 1024], aspect: 1.3,
  appearance: ["frame", "foreground", "roughness", "symmetry", "height", "width"], sentences };
const measured = { foreground_mean: [90, 80, 70], foreground_deviation: [30, 20, 10], appearance: [0.1, 0.3, 0.2, 0.8, 0.25, 0.2],
  blank: [0, 0, 0], copies: [0, 1, 0] };
const like = (values) => Object.fromEntries(["appearance", "foreground_mean", "foreground_deviation"].map((key) =>
  [key, { mean: values[key], deviation: values[key].map(() => 1) }]));
const sized = (height, width, count = 1) => ({ count, height, width });

test("a feature is doubted beyond so many deviations: 4 of a volume, 6 of a lone slice", () => {
  for (const [count, limit] of [[2, 4], [1, 6]]) {
    for (const [name, sentence] of [["appearance", "unlike 64×64 width"], ["foreground_mean", "brightness 64×64 post-contrast"],
      ["foreground_deviation", "brightness 64×64 post-contrast"]]) {
      for (const [far, wanted] of [[limit - 0.1, []], [limit + 0.1, [sentence]]]) {
        const training = like(measured);
        training[name].mean = training[name].mean.with(-1, training[name].mean.at(-1) + far);
        assert.deepEqual(doubts(sized(64, 64, count), measured, rules, training), wanted);
      }
    }
  }
});

test("sides, shape, and a model that tells half of its training images", () => {
  for (const [height, width, wanted] of [[64, 83, 0], [64, 84, 1], [63, 64, 1], [1024, 900, 0], [1025, 900, 1]]) {
    const told = doubts(sized(height, width), measured, rules, null);
    assert.equal(told.filter((text) => /^s(ize|hape)/.test(text)).length, wanted, `${width}×${height}`);
  }
  assert.match(doubts(sized(64, 64), measured, rules, { appearance: {} }).at(-1), /^silent/);
});

test("what is blank is told and nothing else; copies and an inverted picture", () => {
  assert.deepEqual(doubts(sized(64, 64), { ...measured, blank: [1, 0, 1] }, rules, null), ["blank 64×64 pre-contrast and post-contrast"]);
  assert.deepEqual(doubts(sized(64, 64), { ...measured, copies: [1, 1, 0] }, rules, like(measured)), ["copies 64×64 pre-contrast and FLAIR"]);
  assert.deepEqual(doubts(sized(64, 64), { ...measured, appearance: measured.appearance.with(0, 1.1) }, rules, null), ["inverted 64×64 "]);
});

test("images that are no brains have any size and brightness, and one channel is named once", () => {
  const others = { ...rules, channels: ["T1", "T1", "T1"], brain: false, images: "images" }, training = like(measured);
  assert.deepEqual(doubts(sized(40, 99), { ...measured, copies: [1, 1, 1] }, others, training), []);
  training.foreground_mean.mean = training.foreground_mean.mean.map((value) => value + 99);
  assert.deepEqual(doubts(sized(40, 99), measured, others, training), []);
  assert.deepEqual(doubts(sized(40, 99), { ...measured, blank: [1, 1, 1] }, others, null), ["blank 99×40 T1"]);
});
