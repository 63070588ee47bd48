// The tables of cells: sorted, filtered, shown a hundred rows at a time, on a telephone twenty.

const PAGE = matchMedia("(max-width: 640px)").matches ? 20 : 100;

class CellTable {
  constructor(data, table, place) {
    Object.assign(this, { data, table, place });
    this.cells = data.cellsOf(table);
    this.oneModel = data.wordsOf("model", this.cells).length === 1;
    this.filters = new Map();
    this.sorted = null;
    this.first = 0;
    this.open = new Set();
    this.build();
    this.show();
  }

  build() {
    const { data, table } = this;
    const search = el("input", { type: "search", placeholder: "words of the label",
      oninput: () => this.filtered("text", search.value) });
    const choosers = table.filters.map(name => {
      const words = data.wordsOf(name, this.cells);
      return chooser(name.replace("setting ", "").replace("_requested", "").replaceAll("_", " "), [["", "all"], ...words.map(word => [word, word || "none"])], "",
        value => this.filtered(name, value));
    });
    this.said = el("span", { role: "status" });
    const turn = (text, where) => el("button", { type: "button", onclick: () => this.turned(where()) }, text);
    this.pages = el("span", { class: "pages" }, turn("first", () => 0), turn("previous", () => this.first - PAGE),
      turn("next", () => this.first + PAGE));
    const csv = el("button", { type: "button", onclick: () => this.saved() }, "CSV of what is shown");
    const bar = el("div", { class: "controls" }, el("label", {}, "filter ", search), ...choosers, csv, this.said, this.pages);
    this.body = el("tbody");
    this.heads = table.columns.map(column => {
      const button = el("button", { type: "button", title: column.meaning, onclick: () => this.sortedBy(column.key) },
        column.heading, column.unit ? el("small", {}, column.unit) : null);
      return el("th", { scope: "col", class: column.numeric ? "n" : null }, button);
    });
    const whole = el("table", { class: "cells" }, el("thead", {}, el("tr", {}, ...this.heads)), this.body);
    this.place.replaceChildren(bar, scrolling(table.title, whole));
  }

  filtered(name, value) {
    if (value) this.filters.set(name, value);
    else this.filters.delete(name);
    this.first = 0;
    this.show();
  }

  sortedBy(key) {
    this.sorted = { key, up: this.sorted?.key === key ? !this.sorted.up : true };
    this.first = 0;
    this.show();
  }

  turned(first) {
    this.first = Math.max(0, first >= this.order.length ? this.first : first);
    this.show();
  }

  /** What words are looked for in: the label, without a model that all cells have. */
  searched(cell) {
    const label = this.data.word("label", cell).toLowerCase();
    return this.oneModel ? label.slice(this.data.word("model", cell).length) : label;
  }

  chosen() {
    const { data } = this;
    const words = (this.filters.get("text") ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    const others = [...this.filters].filter(([name]) => name !== "text");
    const cells = this.cells.filter(cell => others.every(([name, value]) => data.word(name, cell) === value) &&
      (!words.length || words.every(word => this.searched(cell).includes(word))));
    if (!this.sorted) return cells;
    const { key, up } = this.sorted;
    const column = this.table.columns.find(each => each.key === key);
    const sign = up ? 1 : -1;
    if (!column.numeric) return cells.sort((a, b) => sign * data.word(key, a).localeCompare(data.word(key, b), "en", { numeric: true }));
    const rank = cell => {
      const value = data.number(column.sort, cell);
      return Number.isNaN(value) ? null : value;
    };
    return cells.sort((a, b) => {  // what was not taken comes last, either way
      const [x, y] = [rank(a), rank(b)];
      return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);
    });
  }

  show() {
    this.order = this.chosen();
    const cells = this.order.slice(this.first, this.first + PAGE);
    const none = el("tr", {}, el("td", { colspan: this.heads.length }, "no cell matches"));
    fill(this.body, ...(cells.length ? cells.flatMap(cell => this.row(cell)) : [none]));
    this.heads.forEach((head, index) => {
      const is = this.sorted?.key === this.table.columns[index].key;
      if (is) head.setAttribute("aria-sort", this.sorted.up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    const last = Math.min(this.first + PAGE, this.order.length);
    const range = this.order.length > PAGE ? `${this.first + 1} to ${last} of ` : "";
    this.said.textContent = `${range}${this.order.length.toLocaleString("en")} ${this.order.length === 1 ? "cell" : "cells"}`;
    this.pages.hidden = this.order.length <= PAGE;
  }

  row(cell) {
    const { data } = this;
    const isOpen = this.open.has(cell);
    const parts = this.table.columns.map((column, index) => {
      const text = data.word(column.key, cell);
      const source = column.numeric ? data.source(column.sort, cell) : "";
      const mark = source ? el("small", { class: source }, source) : null;
      const label = [column.heading, column.unit].filter(Boolean).join(" ");
      if (index === 0) {
        const button = el("button", { type: "button", class: "open", "aria-expanded": String(isOpen),
          onclick: () => this.toggled(cell) }, text);
        const parameters = data.word("parameters", cell);
        return el("th", { scope: "row", class: "m", "data-label": label }, button,
          parameters ? el("small", {}, parameters) : null);
      }
      const bad = column.key === "status" && text !== "ok";
      const kinds = [column.numeric ? "n" : "", bad ? "bad" : ""].join(" ").trim() || null;
      const why = bad ? data.word("detail", cell) : null;
      return el("td", { class: kinds, "data-label": label, title: why }, text, mark);
    });
    const row = el("tr", { id: data.word("anchor", cell) }, ...parts);
    if (!isOpen) return [row];
    const place = el("td", { colspan: this.table.columns.length }, "…");
    detailOf(data, cell).then(box => place.replaceChildren(box));
    return [row, el("tr", { class: "opened" }, place)];
  }

  toggled(cell) {
    if (!this.open.delete(cell)) this.open.add(cell);
    const opened = this.open.has(cell);
    history.replaceState(null, "", opened ? `#${this.data.word("anchor", cell)}` : location.pathname);
    this.show();
    document.getElementById(this.data.word("anchor", cell))?.querySelector("button")?.focus();
  }

  /** Open a cell's row, on whichever page it stands. */
  reveal(cell) {
    this.filters.clear();
    for (const field of this.place.querySelectorAll("input[type=search]")) field.value = "";
    for (const field of this.place.querySelectorAll("select")) field.value = "";
    this.open.add(cell);
    const at = this.chosen().indexOf(cell);
    this.first = Math.floor(at / PAGE) * PAGE;
    this.show();
    document.getElementById(this.data.word("anchor", cell))?.scrollIntoView({ block: "center" });
  }

  saved() {
    const { data, table } = this;
    const unit = name => data.metrics[name] ? `${name} [${data.metrics[name].unit}]` : name;
    const lines = [["label", ...table.columns.flatMap(c => c.numeric ? [unit(c.sort), `${c.sort}_source`] : [c.key])]];
    for (const cell of this.order) {
      lines.push([data.word("label", cell), ...table.columns.flatMap(c =>
        c.numeric ? [data.number(c.sort, cell) ?? "", data.source(c.sort, cell)] : [data.word(c.key, cell)])]);
    }
    save("cells.csv", new Blob([lines.map(line => line.map(field).join(",")).join("\n") + "\n"], { type: "text/csv" }));
  }
}

/** Tables that stand in the page as they are can be sorted, too. */
function sortable(table) {
  for (const [index, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = el("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = row => row.cells[index]?.textContent.trim() ?? "";
      const numeric = text => Number(text.replace(/[,%+]/g, "").split(/[\s(±]/)[0]);
      const sign = up ? 1 : -1;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (/^(|-)$/.test(x) || /^(|-)$/.test(y)) return /^(|-)$/.test(x) - /^(|-)$/.test(y);
        return sign * (Number.isNaN(numeric(x)) || Number.isNaN(numeric(y)) ? x.localeCompare(y) : numeric(x) - numeric(y));
      });
      table.tBodies[0].append(...rows);
    });
  }
}
