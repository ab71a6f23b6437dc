// Exports of the built file: the viewer itself, and the viewer as a component of the Streamlit page.

export { default } from "./streamlit.js";
export { createViewer } from "./viewer.js";
