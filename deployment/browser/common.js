// What every module of the page may use.

/** A reader's mistake: one sentence that says what is wrong; and what to do. */
export class UserError extends Error {}

/** A file's name without its folders, cut where it is very long. */
export function short(name) {
  const file = name.split("/").at(-1);
  return file.length <= 60 ? file : `${file.slice(0, 40)}…${file.slice(-15)}`;
}

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
