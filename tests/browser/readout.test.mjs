// Figures on tiny masks that can be counted by hand, and model files that are none.

import assert from "node:assert/strict";
import test from "node:test";

const here = new URL("../../deployment/browser/", import.meta.url);
const { agreement, csvText, largestDiameters, perpendicularDiameters, sliceRows, summary } = await import(new URL("readout.js", here));
const { maskOf } = await import(new URL("../viewer/edits.js", here));
const { readProperties } = await import(new URL("model.js", here));
const { cell, listed, plain, short } = await import(new URL("common.js", here));

const grid = (text) => Uint8Array.from(text.replaceAll(/\s/g, ""), (mark) => (mark === "#" ? 1 : 0));

test("the largest diameter is that of one part, corners connect, and a lone pixel has none", () => {
  assert.deepEqual(largestDiameters(grid("#.... ..... ....#"), 3, 5, null), [0, 0]);
  assert.deepEqual(largestDiameters(grid("#.... .#... ..#.. #...."), 4, 5, null)[0], Math.hypot(2, 2));
  assert.equal(largestDiameters(grid("##### ....."), 2, 5, [2, 3])[1], 12);
  assert.equal(largestDiameters(grid("#.... #.... #...."), 3, 5, [2, 3])[1], 4);
  assert.equal(largestDiameters(grid("##### #...# #####"), 3, 5, null)[0], Math.hypot(2, 4));
});

test("names of others are no formulas in a CSV, and hide nothing", () => {
  for (const name of ["=cmd|'/C calc'!A0", "+1", "-1+2", "@SUM(1)", "＝1", "\t=1", "a;=1", "a,=1", "a\n=1"]) {
    const made = cell(name).replaceAll('"', "");
    assert.ok(!/(^|[;,\n])\s*[=+\-@＝]/u.test(made), made);
  }
  assert.equal(cell("anna_1.tif"), "anna_1.tif");
  assert.equal(plain("\u202egnp.\u001b[31m"), "\\u202egnp.\\x1b[31m");
});

test("Dice and IoU are undefined where both masks are empty", () => {
  assert.deepEqual(agreement({ both: 0, false: 0, missed: 0 }), { dice: null, iou: null });
  assert.deepEqual(agreement({ both: 2, false: 1, missed: 1 }), { dice: 4 / 6, iou: 0.5 });
  assert.deepEqual(agreement({ both: 0, false: 3, missed: 0 }), { dice: 0, iou: 0 });
});

const opened = { count: 2, height: 1, width: 4, slices: ["a_1.tif", 'a "b", 2.tif'], together: true, spacing: [0.5, 0.5, 4],
  truth: Uint8Array.of(255, 255, 0, 0, 0, 0, 0, 0), pixels: new Uint8Array(24).fill(0).map((_, k) => (k % 6 < 3 ? 200 : 0)) };
const probability = Float32Array.of(0.5, 0.2, 0.9, 0, 0, 0.1, 0, 0);

test("slices and case are counted, and a probability at the threshold is tumour", () => {
  const rows = sliceRows(opened, probability, maskOf(probability, 0.5));
  assert.deepEqual(rows.map((row) => row.pixels), [2, 0]);
  assert.deepEqual(rows[0].tally, { both: 1, false: 1, missed: 1 });
  assert.equal(rows[1].mean, null);
  const figures = summary(opened, rows);
  assert.deepEqual([figures.pixels, figures.slices, figures.count, figures.cm3], [2, 1, 2, 0.002]);
  assert.deepEqual([figures.dice, figures.iou], [0.5, 1 / 3]);
  assert.equal(figures.share, 0.5); // four pixels lie above FLAIR's mean
  assert.deepEqual([...maskOf(Float32Array.of(0.7), 0.7)], [1]); // 0.7 as float32 is less than 0.7
  const all = new Float32Array(8).fill(0.7);
  assert.equal(sliceRows(opened, all, maskOf(all, 0.7))[0].pixels, 4);
  assert.ok(!("dice" in summary({ ...opened, together: false }, rows)));
  assert.deepEqual([...maskOf(Float32Array.of(0.3, 0.29999, 0.7), 0.3)], [1, 0, 1]);
});

test("a file's name can't break the CSV", () => {
  const [head, , second] = csvText(sliceRows(opened, probability, maskOf(probability, 0.5))).split("\n");
  assert.ok(head.endsWith("tumour_mm2,largest_diameter_mm,dice,iou"));
  assert.ok(second.startsWith('2,"a ""b"", 2.tif",0,'));
});

test("a model file that is cut off or not ours is refused", () => {
  for (const [bytes, sentence] of [[[0x0a, 0x7f, 1], /truncated/], [[0x80], /truncated/], [[], /not one that this page can use/],
    [[...new TextEncoder().encode("version https://git-lfs")], /truncated/], [[0x72, 6, 0x0a, 1, 0x61, 0x12, 1, 0x62], /not one/],
    [[0x72, 17, 0x0a, 12, ...new TextEncoder().encode("medfl_format"), 0x12, 1, 0x33], /not one/]]) {
    assert.throws(() => readProperties(Uint8Array.from(bytes)), { message: sentence });
  }
});

test("names are shortened and listed", () => {
  assert.equal(short("a/b/c.tif"), "c.tif");
  assert.equal(short("x".repeat(80)).length, 56);
  assert.equal(listed(["a"]) + listed(["a", "b"]) + listed(["a", "b", "c"]), "aa and ba, b and c");
});

test("the two largest perpendicular diameters, and the volume between probabilities", () => {
  const bar = grid(`......
                    .#####
                    .#####
                    .#####
                    ......`);
  const [one, other] = perpendicularDiameters(bar.slice(), 5, 6, null);
  assert.ok(Math.abs(one - Math.hypot(4, 2)) < 1e-9); // the diagonal
  assert.ok(other > 2 && other < 3.6, `${other}`); // across it, within the bar
  const line = grid(`####
                     ....`);
  assert.deepEqual(perpendicularDiameters(line.slice(), 2, 4, [3, 2]), [6, 0]);
  const cross = grid(`...#...
                      ...#...
                      #######
                      ...#...
                      ...#...`);
  assert.deepEqual(perpendicularDiameters(cross.slice(), 5, 7, null), [6, 4]);
  const opened = { count: 1, height: 2, width: 2, spacing: [1, 1, 10], slices: ["a"], pixels: new Uint8Array(12), together: true };
  const probability = Float32Array.of(0.95, 0.6, 0.2, 0.05);
  const found = summary(opened, sliceRows(opened, probability, maskOf(probability, 0.5)));
  assert.deepEqual(found.bounds, [1, 3]);
  assert.ok(Math.abs(found.boundsCm3[1] - 0.03) < 1e-12);
});
