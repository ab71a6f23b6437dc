// Which differences are told: the limits, for a volume and for a lone slice, and the bounds of size.

import assert from "node:assert/strict";
import test from "node:test";

const { describe, doubts } = await import(new URL("../../deployment/browser/plausibility.js", import.meta.url));
const rules = { channels: ["pre-contrast", "FLAIR", "post-contrast"], flair: 1, frame: 0.05, limit: 4, limit_alone: 6, sides: [64, 1024],
  aspect: 1.3, appearance: ["frame", "foreground", "roughness", "symmetry", "height", "width"] };
const blob = (count, height, width) => {
  const pixels = new Uint8Array(count * height * width * 3);
  for (let k = 0; k < pixels.length; k++) {
    const x = Math.floor(k / 3) % width, y = Math.floor(k / 3 / width) % height;
    if (x > 8 && x < width - 8 && y > 8 && y < height - 8) pixels[k] = (k * 7919) % 251;
  }
  return { count, height, width, pixels };
};

test("a feature is doubted beyond so many deviations: 4 of a volume, 6 of a lone slice", () => {
  for (const [count, limit] of [[2, 4], [1, 6]]) {
    for (const [name, sentence] of [["appearance", /does not look like/], ["foreground_mean", /Brightness/], ["foreground_deviation", /Brightness/]]) {
      const opened = blob(count, 64, 64);
      for (const [far, wanted] of [[limit - 0.1, 0], [limit + 0.1, 1]]) {
        const training = Object.fromEntries(Object.entries(describe(opened, rules)).map(([key, mean]) => [key, { mean, deviation: mean.map(() => 1) }]));
        training[name].mean = training[name].mean.with(-1, training[name].mean.at(-1) + far);
        const told = doubts(opened, rules, training);
        assert.equal(told.length, wanted, `${name} ${count} ${told}`);
        if (wanted) assert.match(told[0], sentence);
      }
    }
  }
});

test("sides, shape, and a model that tells half of its training images", () => {
  for (const [height, width, wanted] of [[64, 83, 0], [64, 84, 1], [63, 64, 1], [1024, 900, 0], [1025, 900, 1]]) {
    assert.equal(doubts(blob(1, height, width), rules, null).filter((text) => text.includes("×")).length, wanted, `${width}×${height}`);
  }
  assert.match(doubts(blob(1, 64, 64), rules, { appearance: {} }).at(-1), /not compared/);
  // 0.05 × 90 = 4.5, which Python rounds to 4: the fifth row is no frame
  const opened = { count: 1, height: 90, width: 90, pixels: new Uint8Array(90 * 90 * 3) };
  for (let x = 4; x < 86; x++) for (let y = 4; y < 86; y++) opened.pixels[3 * (y * 90 + x) + 1] = 200;
  assert.equal(describe(opened, rules).appearance[0], 0);
});
