// A chart of any two numbers: a series per method, axes to choose, provenance in the marks and under the pointer.

const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "wedge", "bar", "upright"];
const MANY = 12;  // lines from which on the smallest of each method is shown first
const OF_SHAPE = ["batch_size", "sequence_length"];

/** Corners of a mark of half-width 1 around (0, 0). */
const CORNERS = {
  square: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
  triangle: [[0, -1.2], [1.1, 0.8], [-1.1, 0.8]],
  wedge: [[0, 1.2], [1.1, -0.8], [-1.1, -0.8]],
  bar: [[-1.3, -0.5], [1.3, -0.5], [1.3, 0.5], [-1.3, 0.5]],
  upright: [[-0.5, -1.3], [0.5, -1.3], [0.5, 1.3], [-0.5, 1.3]],
  diamond: [[0, -1.3], [1.1, 0], [0, 1.3], [-1.1, 0]],
  cross: [[-1.2, -0.4], [-0.4, -0.4], [-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4],
    [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4], [-1.2, 0.4]],
};

/** A mark of half-width r around (x, y). */
function mark(path, shape, x, y, r) {
  if (shape === "circle") {
    path.moveTo(x + r, y);
    path.arc(x, y, r, 0, 2 * Math.PI);
  } else {
    CORNERS[shape].forEach(([dx, dy], index) => path[index ? "lineTo" : "moveTo"](x + r * dx, y + r * dy));
    path.closePath();
  }
}

class Chart {
  constructor(data, place, opened) {
    Object.assign(this, { data, place, opened });
    this.hidden = new Set();
    this.selected(0);
    const lines = data.wordsOf("line", Array.from({ length: data.count }, (_, cell) => cell));
    if (lines.length > MANY) this.hidden = new Set(lines.filter(name => !this.smallest().has(name)));
    this.build();
    addEventListener("resize", () => { clearTimeout(this.timer); this.timer = setTimeout(() => this.draw(), 150); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  selected(number) {
    const preset = this.data.presets[number];
    Object.assign(this, { preset: number, x: preset.x, y: preset.y, shape: preset.shape, logX: preset.log, logY: preset.log });
    this.joined = OF_SHAPE.includes(this.x);
  }

  build() {
    const { data } = this;
    const axes = data.axes.map(([group, names]) => [group, names.map(name => choiceOf(data, name))]);
    const again = () => { this.controls(axes); this.draw(); };
    this.again = again;
    const presets = el("div", { class: "controls" }, ...data.presets.map((preset, number) =>
      el("button", { type: "button", onclick: () => { this.selected(number); again(); } }, preset.title)));
    this.presets = presets;
    this.bar = el("div", { class: "controls" });
    this.canvas = el("div", { class: "canvas" });
    this.legend = el("div", { class: "legend" });
    this.note = el("p", { class: "dim", role: "status" });
    this.tip = el("div", { class: "tip", hidden: true });
    const key = el("p", { class: "dim" }, "The fill of a mark says where the number up comes from: a filled one is measured, ",
      "a half-filled one counted, a hollow one predicted. Struck through: the gradient is wrong.");
    this.place.replaceChildren(presets, this.bar, this.canvas, this.tip, this.legend, this.note, key);
    again();
  }

  controls(axes) {
    const set = (name, value) => {
      this[name] = value;
      if (name === "x") Object.assign(this, { joined: OF_SHAPE.includes(value), logX: OF_SHAPE.includes(value) });
      if (name === "y") this.logY = false;
      this.preset = null;
      this.again();
    };
    const shapes = [["", "all shapes"], ...this.data.shapes.map(shape => [shape, shape])];
    [...this.presets.children].forEach((button, number) => button.setAttribute("aria-pressed", String(number === this.preset)));
    this.bar.replaceChildren(
      chooser("across", axes, this.x, value => set("x", value)),
      chooser("up", axes, this.y, value => set("y", value)),
      chooser("at", shapes, this.shape, value => set("shape", value)),
      ticked("logarithmic across", this.logX, on => set("logX", on)),
      ticked("logarithmic up", this.logY, on => set("logY", on)),
      el("button", { type: "button", onclick: () => this.saved() }, "CSV"),
      el("button", { type: "button", onclick: () => this.pictured() }, "PNG"));
  }

  /** The points of each method: cells that have both numbers, where these have a place on the axes. */
  series() {
    const { data } = this;
    const listed = new Map();
    this.leftOut = 0;
    this.failed = [];
    for (let cell = 0; cell < data.count; cell++) {
      if (this.shape && data.word("shape", cell) !== this.shape) continue;
      const [x, y] = [data.number(this.x, cell), data.number(this.y, cell)];
      if (data.word("status", cell) !== "ok" && OF_SHAPE.includes(this.x)) this.failed.push(cell);
      if (x === null || y === null || (data.word("task", cell) && !data.word("result", cell))) continue;
      if (!Number.isFinite(x) || !Number.isFinite(y) || (this.logX && x <= 0) || (this.logY && y <= 0)) {
        this.leftOut++;
        continue;
      }
      const name = data.word("line", cell);
      if (!listed.has(name)) listed.set(name, []);
      listed.get(name).push({ x, y, cell, path: this.pathOf(cell) });
    }
    for (const [name, points] of listed) listed.set(name, this.means(points).sort((a, b) => a.x - b.x));
    return listed;
  }

  /** Of what else, beside the axis, the cells of a line that is drawn through have the same. */
  pathOf(cell) {
    const { data } = this;
    const micro = data.number("micro_batch_size", cell);
    const batch = data.number("batch_size", cell);
    const size = this.x === "batch_size" ? data.number("sequence_length", cell) : `${batch} ${micro}`;
    return [data.word("group", cell), data.word("run", cell), size, micro === batch ? "" : micro].join(" · ");
  }

  /** Seeds of a training as one point, with their standard deviation. */
  means(points) {
    const { data } = this;
    const by = new Map();
    for (const point of points) {
      const key = data.word("result", point.cell) || `cell ${point.cell}`;
      by.set(key, [...(by.get(key) ?? []), point]);
    }
    return [...by.values()].map(seeds => {
      const mean = axis => seeds.reduce((sum, seed) => sum + seed[axis], 0) / seeds.length;
      const [x, y] = [mean("x"), mean("y")];
      const squares = seeds.reduce((sum, seed) => sum + (seed.y - y) ** 2, 0);
      return { ...seeds[0], x, y, seeds: seeds.length, deviation: seeds.length > 1 ? Math.sqrt(squares / (seeds.length - 1)) : 0 };
    });
  }

  draw() {
    const { data } = this;
    const listed = this.series();
    const visible = [...listed].filter(([name]) => !this.hidden.has(name));
    this.points = visible.flatMap(([name, points]) => points.map(point => ({ ...point, name })));
    const largest = axis => this.points.reduce((most, point) => Math.max(most, Math.abs(point[axis])), 0);
    const unitOf = axis => unitFor(data.metrics[this[axis]]?.unit ?? "", largest(axis));
    this.units = { x: unitOf("x"), y: unitOf("y") };
    this.legendOf(listed);
    const said = [];
    if (this.leftOut) {
      said.push(`${this.leftOut} points are left out: zero and what is not finite has no place on these axes`);
    }
    const failed = this.failed.filter(cell => !this.hidden.has(data.word("line", cell)));
    if (failed.length) said.push(`${failed.length} cells did not end ok: crosses at the top`);
    if (!this.points.length && !this.leftOut) said.push(listed.size ? "every method is hidden" : "no cell has both numbers");
    this.note.textContent = said.join("; ");
    this.canvas.setAttribute("role", "img");
    const what = `${heading(data, this.y)} against ${heading(data, this.x)}`;
    const count = `${this.points.length} points of ${visible.length} methods`;
    this.canvas.setAttribute("aria-label", `${what}, ${count}; the table has their numbers`);
    this.plot?.destroy();
    this.plot = this.points.length ? this.plotted(visible, failed) : null;
  }

  plotted(visible, failed) {
    const width = this.canvas.clientWidth || 300;
    const scale = (name, log) => ({
      time: false, distr: log ? 3 : 1, log: OF_SHAPE.includes(name) ? 2 : 10,
      range: (u, low, high) => this.range(...this.reached(name, low, high), log),
    });
    const axis = (name, size) => ({
      stroke: css("--text"), grid: { stroke: css("--line"), width: 1, filter: (u, splits) => this.gridOf(u, name, splits) }, ticks: { stroke: css("--line") }, size,
      label: this.labelOf(name), labelSize: 22,
      values: (u, splits) => splits.map(value => value === null ? "" : tick(value)),
    });
    const series = one => ({
      facets: [{ scale: "x", auto: true }, { scale: "y", auto: true }], paths: u => this.paint(u, one),
    });
    const values = (points, name) => points.map(point => point[name] / this.units[name].size);
    const plot = new uPlot({
      mode: 2, width, height: Math.round(Math.min(480, Math.max(280, width * 0.55))),
      legend: { show: false }, cursor: { drag: { x: true, y: true }, points: { show: false } },
      scales: { x: scale(this.x, this.logX), y: scale(this.y, this.logY) },
      axes: [axis("x", 50), axis("y", 64)],
      series: [{}, ...visible.map(series)],
      hooks: { draw: [u => this.frontier(u), u => this.crosses(u, failed)] },
    }, [null, ...visible.map(([, points]) => [values(points, "x"), values(points, "y")])], this.canvas);
    plot.over.addEventListener("pointermove", event => this.pointed(event));
    plot.over.addEventListener("pointerdown", event => this.pointed(event));
    plot.over.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    plot.over.addEventListener("click", () => { if (!this.tip.hidden) this.opened(this.near.cell); });
    return plot;
  }

  /** What an axis shows, in which unit, and where its numbers come from. */
  labelOf(axis) {
    const sources = [...new Set(this.points.map(point => this.data.source(this[axis], point.cell)).filter(Boolean))];
    const narrow = this.canvas.clientWidth < 500;
    const besides = [this.units[axis].name, narrow ? "" : sources.join(" and ")].filter(Boolean).join(", ");
    return `${heading(this.data, this[axis])}${besides ? ` (${besides})` : ""}`;
  }

  /** Of a logarithmic axis over many decades, the powers of ten alone. */
  gridOf(u, name, splits) {
    const { min, max, distr } = u.scales[name];
    if (distr !== 3 || max / min < 1e3 || OF_SHAPE.includes(this[name])) return splits;
    return splits.map(value => value !== null && Math.abs(Math.log10(value) % 1) < 1e-9 ? value : null);
  }

  /** The lowest and the highest value on an axis, with the bars of those that have a deviation. */
  reached(name, low, high) {
    if (name !== this.y || low === null) return [low, high];
    const ends = sign => this.points.map(point => (point.y + sign * point.deviation) / this.units.y.size);
    return [ends(-1).reduce((a, b) => Math.min(a, b), low), ends(1).reduce((a, b) => Math.max(a, b), high)];
  }

  range(low, high, log) {
    if (low === null || high === null) return log ? [1, 10] : [0, 1];
    if (log) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [low >= 0 && low < 0.4 * high ? 0 : low - room, high + room];
  }

  place_of(u, point) {
    return [u.valToPos(point.x / this.units.x.size, "x", true), u.valToPos(point.y / this.units.y.size, "y", true)];
  }

  paint(u, [name, points]) {
    const { ctx } = u;
    const colour = colourOf(this.data, points[0].cell);
    const shape = this.shapeOf(name);
    const radius = 5 * devicePixelRatio;
    ctx.save();
    if (this.joined) {
      const line = new Path2D();
      const paths = new Map();
      for (const point of points) paths.set(point.path, [...(paths.get(point.path) ?? []), point]);
      for (const each of paths.values()) {
        each.forEach((point, index) => line[index ? "lineTo" : "moveTo"](...this.place_of(u, point)));
      }
      ctx.strokeStyle = colour;
      ctx.lineWidth = 1.5 * devicePixelRatio;
      ctx.stroke(line);
    }
    for (const point of points) {
      const [x, y] = this.place_of(u, point);
      const path = new Path2D();
      mark(path, shape, x, y, radius);
      ctx.strokeStyle = ctx.fillStyle = colour;
      ctx.lineWidth = 1.5 * devicePixelRatio;
      const source = this.data.source(this.y, point.cell);
      if (source === "measured" || !source) ctx.fill(path);
      if (source === "counted") {
        ctx.save();
        ctx.clip(path);
        ctx.fillRect(x - 2 * radius, y, 4 * radius, 2 * radius);
        ctx.restore();
      }
      ctx.stroke(path);
      const besides = new Path2D();
      if (point.deviation) {
        for (const sign of [-1, 1]) {
          const end = u.valToPos((point.y + sign * point.deviation) / this.units.y.size, "y", true);
          besides.moveTo(x, y);
          besides.lineTo(x, end);
        }
      }
      if (this.data.word("wrong", point.cell)) {
        besides.moveTo(x - 1.8 * radius, y + 1.8 * radius);
        besides.lineTo(x + 1.8 * radius, y - 1.8 * radius);
      }
      ctx.stroke(besides);
    }
    ctx.restore();
    return null;
  }

  /** Different marks for methods of one colour, which differ in levers or settings. */
  shapeOf(name) {
    const { data } = this;
    if (!this.shapesOf) {
      this.shapesOf = new Map();
      const seen = new Map();
      for (let cell = 0; cell < data.count; cell++) {
        const method = data.word("line", cell);
        if (this.shapesOf.has(method)) continue;
        const family = data.word("method_name", cell);
        seen.set(family, (seen.get(family) ?? -1) + 1);
        this.shapesOf.set(method, SHAPES[seen.get(family) % SHAPES.length]);
      }
    }
    return this.shapesOf.get(name);
  }

  /** Of each method and run the line whose smallest peak is smallest. */
  smallest() {
    const { data } = this;
    const best = new Map();
    for (let cell = 0; cell < data.count; cell++) {
      const family = `${data.word("method_name", cell)} · ${data.word("run", cell)}`;
      const peak = data.number("peak_allocated_bytes", cell) ?? Infinity;
      if (!best.has(family) || peak < best.get(family).peak) best.set(family, { name: data.word("line", cell), peak });
    }
    return new Set([...best.values()].map(({ name }) => name));
  }

  legendOf(listed) {
    const set = names => { this.hidden = new Set(names); this.draw(); };
    const chips = [...listed].map(([name, points]) => {
      const size = 14;
      const picture = el("canvas", { width: 2 * size, height: 2 * size, style: `width:${size}px;height:${size}px` });
      const ctx = picture.getContext("2d");
      const path = new Path2D();
      mark(path, this.shapeOf(name), size, size, 9);
      ctx.fillStyle = colourOf(this.data, points[0].cell);
      ctx.fill(path);
      return el("button", { type: "button", "aria-pressed": String(!this.hidden.has(name)), onclick: () => {
        if (!this.hidden.delete(name)) this.hidden.add(name);
        this.draw();
      } }, picture, ` ${name}`);
    });
    const kept = this.smallest();
    this.legend.replaceChildren(
      el("button", { type: "button", onclick: () => set([]) }, "all"),
      el("button", { type: "button", onclick: () => set(listed.keys()) }, "none"),
      el("button", { type: "button", onclick: () => set([...listed.keys()].filter(name => !kept.has(name))) }, "of each method the smallest"),
      ...chips);
  }

  /** A line through the points that no other beats in both numbers; of one source, and with right gradients. */
  frontier(u) {
    const better = ["x", "y"].map(axis => this.data.metrics[this[axis]]?.better);
    if (this.joined || better.some(each => each !== "lower" && each !== "higher")) return;
    const [signX, signY] = better.map(each => each === "lower" ? 1 : -1);
    const source = p => [this.data.word("run", p.cell), this.data.source(this.x, p.cell), this.data.source(this.y, p.cell)].join();
    const right = this.points.filter(p => !this.data.word("wrong", p.cell));
    const shapes = new Set(right.map(point => this.data.word("shape", point.cell)));
    if (new Set(right.map(source)).size !== 1 || shapes.size !== 1) return;
    const best = [];
    for (const point of right.sort((a, b) => signX * (a.x - b.x) || signY * (a.y - b.y))) {
      const noise = Math.max(point.deviation, best.at(-1)?.deviation ?? 0);
      if (!best.length || signY * (point.y - best.at(-1).y) < -noise) best.push(point);
    }
    const line = new Path2D();
    best.forEach((point, index) => {
      const [x, y] = this.place_of(u, point);
      if (index) line.lineTo(x, this.place_of(u, best[index - 1])[1]);
      line[index ? "lineTo" : "moveTo"](x, y);
    });
    u.ctx.save();
    u.ctx.strokeStyle = css("--dim");
    u.ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    u.ctx.lineWidth = devicePixelRatio;
    u.ctx.stroke(line);
    u.ctx.restore();
  }

  crosses(u, failed) {
    const { ctx } = u;
    const stacked = new Map();
    ctx.save();
    ctx.lineWidth = 2 * devicePixelRatio;
    for (const cell of failed) {
      const size = this.data.number(this.x, cell);
      const depth = stacked.get(size) ?? 0;
      if (depth > 8) continue;
      stacked.set(size, depth + 1);
      const x = u.valToPos(size, "x", true);
      const y = u.bbox.top + (10 + 11 * depth) * devicePixelRatio;
      const r = 4 * devicePixelRatio;
      if (x < u.bbox.left - 1 || x > u.bbox.left + u.bbox.width + 1) continue;
      ctx.strokeStyle = colourOf(this.data, cell);
      ctx.beginPath();
      ctx.moveTo(x - r, y - r); ctx.lineTo(x + r, y + r);
      ctx.moveTo(x + r, y - r); ctx.lineTo(x - r, y + r);
      ctx.stroke();
    }
    ctx.restore();
  }

  pointed(event) {
    const box = this.plot.over.getBoundingClientRect();
    const [atX, atY] = [event.clientX - box.left, event.clientY - box.top];
    let [near, distance] = [null, 20];
    for (const point of this.points) {
      const [x, y] = ["x", "y"].map(axis => this.plot.valToPos(point[axis] / this.units[axis].size, axis));
      const apart = Math.hypot(x - atX, y - atY);
      if (apart < distance) [near, distance] = [point, apart];
    }
    this.tip.hidden = !near;
    if (!near) return;
    this.near = near;
    const { data } = this;
    const wrong = data.word("wrong", near.cell);
    const [x, y] = [this.x, this.y].map(name => `${heading(data, name)}: ${said(data, name, near.cell)}`);
    const spread = near.deviation ? ` ± ${shown(near.deviation / this.units.y.size)}` : "";
    const mean = `${heading(data, this.y)}: ${shown(near.y / this.units.y.size)}${spread}, the mean of ${near.seeds} seeds`;
    fill(this.tip, el("strong", {}, data.word("label", near.cell)),
      el("div", {}, x), el("div", {}, near.seeds > 1 ? `${mean} (${data.source(this.y, near.cell)})` : y),
      wrong ? el("div", { class: "bad" }, wrong) : null);
    const frame = this.place.getBoundingClientRect();
    const left = Math.min(event.clientX - frame.left + 14, frame.width - this.tip.offsetWidth - 4);
    this.tip.style.left = `${Math.max(0, left)}px`;
    this.tip.style.top = `${event.clientY - frame.top + 14}px`;
  }

  /** The chart as a picture to post: with what it shows above it, and its legend below. */
  pictured() {
    const drawn = this.canvas.querySelector("canvas");
    if (!drawn) return;
    const ratio = devicePixelRatio;
    const line = 18 * ratio;
    const names = [...this.series()].filter(([name, points]) => !this.hidden.has(name) && points.length);
    const whole = el("canvas", { width: drawn.width, height: drawn.height + (names.length + 3) * line });
    const ctx = whole.getContext("2d");
    ctx.fillStyle = css("--back");
    ctx.fillRect(0, 0, whole.width, whole.height);
    ctx.drawImage(drawn, 0, 2 * line);
    ctx.fillStyle = css("--text");
    ctx.font = `bold ${13 * ratio}px system-ui, sans-serif`;
    const title = `${document.querySelector("h1").textContent}: ${heading(this.data, this.y)} against ${heading(this.data, this.x)}`;
    ctx.fillText(`${title}, at ${this.shape || "all shapes"}`, 8 * ratio, line);
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    names.forEach(([name, points], index) => {
      const y = drawn.height + (index + 3) * line;
      const path = new Path2D();
      mark(path, this.shapeOf(name), 16 * ratio, y - 4 * ratio, 5 * ratio);
      ctx.fillStyle = colourOf(this.data, points[0].cell);
      ctx.fill(path);
      ctx.fillStyle = css("--text");
      ctx.fillText(name, 30 * ratio, y);
    });
    whole.toBlob(blob => save("chart.png", blob));
  }

  saved() {
    const { data } = this;
    const unit = name => data.metrics[name]?.unit ? `${name} [${data.metrics[name].unit}]` : name;
    const lines = [["label", unit(this.x), `${this.x}_source`, unit(this.y), `${this.y}_source`]];
    for (const p of this.points) {
      lines.push([data.word("label", p.cell), p.x, data.source(this.x, p.cell), p.y, data.source(this.y, p.cell)]);
    }
    save("chart.csv", new Blob([lines.map(line => line.map(field).join(",")).join("\n") + "\n"], { type: "text/csv" }));
  }
}
