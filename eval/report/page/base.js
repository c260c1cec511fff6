"use strict";
// One script in an envelope of its own: nothing leaks into the page, and nothing here touches a network.
const core = JSON.parse(document.getElementById("core").textContent);
const at = (id) => document.getElementById(id);

/** An element with attributes and children; text goes in as text, never as markup. */
function make(name, attributes = {}, ...children) {
  const svg =
    ["svg", "g", "path", "line", "circle", "rect", "text", "title", "polygon", "a"].includes(name) &&
    attributes.svg !== false;
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "svg" || value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function option(value, text) {
  const element = document.createElement("option");
  element.value = value;
  element.textContent = text;
  return element;
}

const chunks = new Map();
/** What a chunk holds, unpacked once; null where the page has none of that name. */
function chunk(name) {
  if (!chunks.has(name)) chunks.set(name, unpack(at(`chunk-${name}`)));
  return chunks.get(name);
}

async function unpack(element) {
  if (!element) return null;
  const bytes = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function kept(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch {
    /* a page from a file may keep nothing */
  }
  return null;
}

function theme() {
  const button = at("theme");
  const dark = () =>
    (document.documentElement.dataset.theme ||
      (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const stored = kept("aim-theme");
  if (stored === "dark" || stored === "light") document.documentElement.dataset.theme = stored;
  button.setAttribute("aria-pressed", String(dark()));
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    kept("aim-theme", document.documentElement.dataset.theme);
    button.setAttribute("aria-pressed", String(dark()));
  });
}

function tables() {
  at("intervals").addEventListener("change", (event) =>
    at("tables").classList.toggle("intervals", event.target.checked),
  );
  for (const button of document.querySelectorAll(".sort")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"),
        body = button.closest("table").tBodies[0];
      const column = [...head.parentElement.children].indexOf(head);
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) =>
        row.children[column].dataset.v === "" ? -Infinity : Number(row.children[column].dataset.v);
      const rows = [...body.rows].sort((a, b) => (down ? value(b) - value(a) : value(a) - value(b)));
      body.append(...rows);
    });
  }
}

theme();
tables();
