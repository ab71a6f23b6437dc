// What every module of the page may use.

/** A reader's mistake: one sentence that says what is wrong; and what to do. */
export class UserError extends Error {}

/** A file's name without its folders, cut where it is very long. */
export function short(name) {
  const file = name.split("/").at(-1);
  return file.length <= 60 ? file : `${file.slice(0, 40)}…${file.slice(-15)}`;
}

// What a spreadsheet takes for a formula: a cell, or a part of one between its own separators, that begins so.
const FORMULA = /(^|[;,|]|\\[trn])(\s*)(?=[=+\-@＝＋－＠])/gu;
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const NAMED = { "\t": "\\t", "\n": "\\n", "\r": "\\r" };

/** A text in one line in which every character can be seen, by the rules of borders/escaping.py. */
export function plain(text) {
  return text.replace(UNSEEN, (character) => {
    const code = character.codePointAt(0).toString(16);
    return NAMED[character] ?? (code.length > 2 ? `\\u${code.padStart(4, "0")}` : `\\x${code.padStart(2, "0")}`);
  });
}

/** A text as a cell of a CSV file: it is no formula, whatever it begins with. */
export function cell(text) {
  const safe = plain(text).replace(FORMULA, "$1$2'");
  return /[",]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

export const SIZES_MM = [0.01, 100]; // of a pixel, or between slices: borders/limits.py

/** Whether a number can be the millimetres of a pixel or between slices. */
export const isSizeMm = (value) => typeof value === "number" && value >= SIZES_MM[0] && value <= SIZES_MM[1];

/** "1 mask", "5 masks". */
export function counted(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** "a", "a and b", "a, b and c". */
export function listed(names) {
  return names.length === 1 ? names[0] : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}

/** A number with n decimals, or an empty text for null. */
export function fixed(value, decimals) {
  return value === null || value === undefined ? "" : value.toFixed(decimals);
}
