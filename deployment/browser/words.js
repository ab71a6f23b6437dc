// What the page says: its state, messages, and how far it is.

import { UserError } from "./common.js";

export const $ = (id) => document.getElementById(id);

/** Say what the page does. */
export function say(text) {
  $("status").textContent = text;
}

/** A line of the page. kind: error, doubt or note. */
export function message(kind, text) {
  const line = document.createElement("p");
  line.className = `message ${kind}`;
  line.textContent = text;
  return line;
}

/** Rows of a table, from [[name, value]]. */
export const tableRows = (lines) => lines.map(([name, value]) => {
  const row = document.createElement("tr");
  row.append(Object.assign(document.createElement("th"), { scope: "row", textContent: name }),
    Object.assign(document.createElement("td"), { textContent: value }));
  return row;
});

/** Run what a reader asked for; a mistake becomes one sentence, and the page stays as it was. */
export async function attempt(action) {
  $("messages").replaceChildren();
  try {
    await action();
  } catch (error) {
    if (!(error instanceof UserError)) console.error(error);
    const text = error instanceof UserError ? error.message : `something went wrong (${error.message}); reload the page`;
    $("messages").replaceChildren(message("error", `${text}.`));
  } finally {
    $("progress").hidden = true;
  }
}

/** Show how far it is, 0 to 1. */
export function progress(share) {
  $("progress").hidden = false;
  $("progress").value = share;
}
