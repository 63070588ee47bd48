// What the peak consists of, a bar per method; and memory over batch and length, a field per shape.

class Peaks {
  constructor(data, place, opened) {
    Object.assign(this, { data, place, opened });
    this.shape = data.largest;
    this.draw();
  }

  /** Of each method one cell, as seeds and learning rates take the same memory; one that ended ok where there is one. */
  one(cells) {
    const { data } = this;
    const chosen = new Map();
    for (const cell of cells) {
      const name = data.word("line", cell);
      const ended = each => data.word("status", each) === "ok";
      if (!chosen.has(name) || (!ended(chosen.get(name)) && ended(cell))) chosen.set(name, cell);
    }
    return [...chosen.values()];
  }

  draw() {
    const { data } = this;
    const cells = this.one(data.cellsOf(data.tables[0]).filter(cell => data.word("shape", cell) === this.shape));
    const total = cell => data.number("peak_allocated_bytes", cell) ?? 0;
    const most = Math.max(...cells.map(total), 1);
    const { size, name } = unitFor("byte", most);
    const used = Object.keys(data.categories).filter(part => cells.some(cell => data.number(part, cell)));
    const rows = cells.sort((a, b) => total(b) - total(a)).slice(0, 60).map(cell => {
      const ok = data.word("status", cell) === "ok";
      const parts = used.filter(part => data.number(part, cell) > 0);
      const texts = parts.map(part => `${part.replace("_bytes", "")} ${shown(data.number(part, cell) / size)} ${name}`);
      const bar = el("div", { class: "bar", role: "img", "aria-label": ok ? texts.join(", ") : data.word("status", cell) },
        ...parts.map((part, index) => el("i", { title: texts[index],
          style: `width: ${100 * data.number(part, cell) / most}%; background: ${data.categories[part]}` })));
      const text = ok ? `${shown(total(cell) / size)} ${name}` : data.word("status", cell);
      const source = ok ? data.source("peak_allocated_bytes", cell) : "";
      const button = el("button", { type: "button", class: "open", onclick: () => this.opened(cell) }, data.word("line", cell));
      return el("tr", {}, el("th", { scope: "row" }, button), el("td", { class: "wide" }, bar),
        el("td", { class: ok ? "n" : "n bad" }, text, source ? el("small", { class: source }, source) : null));
    });
    const key = el("p", { class: "key" }, ...used.map(part =>
      el("span", {}, el("i", { style: `background: ${data.categories[part]}` }), ` ${part.replace("_bytes", "")} `)));
    const shapes = data.shapes.map(shape => [shape, shape]);
    this.place.replaceChildren(
      el("div", { class: "controls" }, chooser("at", shapes, this.shape, value => { this.shape = value; this.draw(); })),
      key, scrolling("What the peak of a step consists of", el("table", { class: "bars" }, el("tbody", {}, ...rows))),
      cells.length > 60 ? el("p", { class: "dim" }, `The 60 largest of ${cells.length}.`) : "");
  }
}

class HeatMap {
  constructor(data, place, opened) {
    Object.assign(this, { data, place, opened });
    this.cells = data.cellsOf(data.tables[0]);
    const count = new Map();
    for (const cell of this.cells) count.set(this.nameOf(cell), (count.get(this.nameOf(cell)) ?? 0) + 1);
    this.names = [...count.keys()];
    this.name = [...count].sort((a, b) => b[1] - a[1])[0][0];
    this.metric = "peak_allocated_bytes";
    this.draw();
  }

  nameOf(cell) {
    return `${this.data.word("line", cell)}${this.data.groups > 1 ? ` (${this.data.word("group", cell)})` : ""}`;
  }

  draw() {
    const { data } = this;
    const cells = this.cells.filter(cell => this.nameOf(cell) === this.name &&
      data.number("micro_batch_size", cell) === data.number("batch_size", cell));
    const sizes = name => [...new Set(cells.map(cell => data.number(name, cell)))].sort((a, b) => a - b);
    const at = new Map(cells.map(cell => [`${data.number("batch_size", cell)}×${data.number("sequence_length", cell)}`, cell]));
    const values = cells.map(cell => data.number(this.metric, cell)).filter(value => value > 0 && Number.isFinite(value));
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const { size, name } = unitFor(data.metrics[this.metric].unit, high);
    const lengths = sizes("sequence_length");
    const batches = sizes("batch_size").reverse();
    const fits = cell => cell !== undefined && data.word("status", cell) === "ok";
    const fieldOf = (batch, length) => {
      const cell = at.get(`${batch}×${length}`);
      if (cell === undefined) return el("td", { class: "dim" }, "·");
      const value = data.number(this.metric, cell);
      const right = at.get(`${batch}×${lengths[lengths.indexOf(length) + 1]}`);
      const above = at.get(`${batches[batches.indexOf(batch) - 1]}×${length}`);
      const ends = neighbour => fits(cell) && neighbour !== undefined && data.word("status", neighbour) === "oom";
      const edge = (ends(right) ? " edge-right" : "") + (ends(above) ? " edge-top" : "");
      const open = text => el("button", { type: "button", class: "open", title: data.word("label", cell),
        onclick: () => this.opened(cell) }, text);
      if (!fits(cell) || value === null || !(value > 0)) return el("td", { class: `failed${edge}` }, open(fits(cell) ? shown(value) : data.word("status", cell)));
      const share = high > low ? (Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low)) : 0.5;
      const lightness = matchMedia("(prefers-color-scheme: dark)").matches ? 22 + 56 * share : 94 - 62 * share;
      const ink = lightness > 58 ? "#111" : "#fff";
      return el("td", { class: `n${edge}`, style: `background: hsl(${205 + 40 * share} 62% ${lightness}%); color: ${ink}` },
        open(shown(value / size)));
    };
    const source = [...new Set(cells.map(cell => data.source(this.metric, cell)).filter(Boolean))].join(" and ");
    const table = el("table", { class: "heat" },
      el("thead", {}, el("tr", {}, el("td"), ...lengths.map(length => el("th", { scope: "col" }, length.toLocaleString("en"))))),
      el("tbody", {}, ...batches.map(batch => el("tr", {}, el("th", { scope: "row" }, String(batch)),
        ...lengths.map(length => fieldOf(batch, length))))));
    const unit = name ? `, ${name}` : "";
    const said = `${heading(data, this.metric)}${unit}${source ? ` (${source})` : ""}: batch size up, tokens a sample across.`;
    const failed = cells.some(cell => data.word("status", cell) === "oom") ? " The thick line is where it stops to fit." : "";
    const again = (which, value) => { this[which] = value; this.draw(); };
    this.place.replaceChildren(
      el("div", { class: "controls" },
        chooser("method", this.names.map(each => [each, each]), this.name, value => again("name", value)),
        chooser("of", data.mapped.map(each => choiceOf(data, each)), this.metric, value => again("metric", value))),
      el("p", { class: "dim" }, said + failed),
      scrolling("Memory over batch size and length", table));
  }
}
