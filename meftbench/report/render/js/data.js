"use strict";
// The page's data: columns of all cells, and the details of cells in compressed chunks that are read when asked for.

const SOURCES = ["measured", "counted", "predicted"];

/** The JSON that stands, compressed and in base64, in a script element. */
async function unpacked(element) {
  const text = atob(element.textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

class Data {
  constructor(content) {
    Object.assign(this, content);
    this.chunks = new Map();
  }

  /** A word of a cell: its method, its status, the text of a table's column. */
  word(name, cell) {
    const column = this.words[name];
    return column ? column.values[column.at[cell]] : "";
  }

  /** All words of a column that occur in the cells, in their order of appearance. */
  wordsOf(name, cells) {
    return [...new Set(cells.map(cell => this.word(name, cell)))];
  }

  /** A number of a cell; null where it was not taken. */
  number(name, cell) {
    const value = this.numbers[name]?.[cell] ?? null;
    return typeof value === "string" ? Number(value) : value;
  }

  source(name, cell) {
    const column = this.sources[name];
    return column ? column.values[column.at[cell]] : "";
  }

  cellsOf(table) {
    return Array.from({ length: table.end - table.begin }, (_, i) => table.begin + i);
  }

  /** What `meftbench show` says of a cell. */
  async detail(cell) {
    const number = Math.floor(cell / this.chunk);
    if (!this.chunks.has(number)) this.chunks.set(number, unpacked(document.getElementById(`details-${number}`)));
    return (await this.chunks.get(number))[cell % this.chunk];
  }
}

/** An element with attributes, listeners (on...) and children, which are elements or text. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  fill(made, ...children);
  return made;
}

/** Put children into an element in place of those it has; null and undefined are none. */
function fill(element, ...children) {
  element.replaceChildren(...children.filter(child => child !== null && child !== undefined));
}

/** A labelled select; choices: [value, text], or [group, [[value, text], ...]]. */
function chooser(label, choices, chosen, changed) {
  const option = ([value, text]) => el("option", { value, selected: value === chosen }, text);
  const select = el("select", { onchange: () => changed(select.value) }, ...choices.map(choice =>
    Array.isArray(choice[1]) ? el("optgroup", { label: choice[0] }, ...choice[1].map(option)) : option(choice)));
  return el("label", {}, `${label} `, select);
}

function ticked(label, on, changed) {
  const box = el("input", { type: "checkbox", onchange: () => changed(box.checked) });
  box.checked = on;
  return el("label", {}, box, ` ${label}`);
}

/** Parts that scroll within themselves only where they are wider than the page. Otherwise the page scrolls them, and the
 * head of a table stays at the top of the screen. */
const fitting = new ResizeObserver(changes => {
  for (const box of new Set(changes.map(({ target }) => target.closest(".scroll")))) {
    if (!box) continue;
    box.classList.add("fits");
    box.classList.toggle("fits", box.scrollWidth <= box.clientWidth);
  }
});

function fitted(box) {
  fitting.observe(box);
  for (const inner of box.children) fitting.observe(inner);
  return box;
}

function scrolling(label, ...children) {
  return fitted(el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, ...children));
}

/** How numbers of a unit are shown: divided by `size`, with the unit's name. */
function unitFor(unit, largest) {
  if (unit === "byte") return largest >= 10 * 2 ** 30 ? { size: 2 ** 30, name: "GiB" } : { size: 2 ** 20, name: "MiB" };
  if (unit === "second") return largest >= 10 ? { size: 1, name: "s" } : { size: 1e-3, name: "ms" };
  const inHeading = ["count", "ratio", "score", "loss", "absolute", "cosine", "token/second", "sample/second"];
  return { size: 1, name: inHeading.includes(unit) ? "" : unit };
}

function shown(value) {
  if (value === null) return "-";
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "-∞";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 0.01) return Number(value.toPrecision(4)).toString();
  return value.toExponential(1);
}

/** A number of a cell with its unit and source, such as `412 MiB (counted)`. */
function said(data, name, cell) {
  const value = data.number(name, cell);
  if (value === null) return "not taken";
  const unit = unitFor(data.metrics[name]?.unit ?? "", Math.abs(value));
  const source = data.source(name, cell);
  return `${shown(value / unit.size)}${unit.name ? " " + unit.name : ""}${source ? ` (${source})` : ""}`;
}

/** What a number is called, as report/columns.py has it. */
function heading(data, name) {
  return data.headings[name] ?? name.replaceAll("_", " ");
}

/** A choice of a number: its heading with the unit in which it is shown. */
function choiceOf(data, name) {
  const largest = (data.numbers[name] ?? []).reduce((most, value) => Math.max(most, Math.abs(Number(value ?? 0)) || 0), 0);
  const unit = unitFor(data.metrics[name]?.unit ?? "", largest).name;
  return [name, unit ? `${heading(data, name)} (${unit})` : heading(data, name)];
}

/** A number at an axis, short. */
function tick(value) {
  const size = Math.abs(value);
  if (size >= 1e6 || (size && size < 1e-3)) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  return shown(value);
}

/** A file that the browser saves. */
function save(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** A field of a CSV file; a spreadsheet takes none of them for a formula. */
function field(value) {
  const text = typeof value === "number" ? String(value) : String(value ?? "").replace(/^[=+\-@\t\r]/, "'$&");
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A method's colour on the page's background: in the dark, lighter. */
function colourOf(data, cell) {
  const colour = data.colours[data.word("method_name", cell)] ?? "#5B3A29";
  if (colour === "#000000") return css("--text");
  if (!matchMedia("(prefers-color-scheme: dark)").matches) return colour;
  const parts = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
  const light = (0.3 * parts[0] + 0.59 * parts[1] + 0.11 * parts[2]) / 255;
  const share = light < 0.45 ? 0.6 : 0.15;
  return `rgb(${parts.map(part => Math.round(part + (255 - part) * share)).join(",")})`;
}
