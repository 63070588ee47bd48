// What is known of one cell, below its row: how it ended, how to run it again, and every number of its record.

/** In which boxes a buffer lies: category, then each step of its module's path, then the operator with what it made. In
 * records that do not name modules: category, place in the code, operator. Steps have a kind, so that an operator is not
 * taken for a module of its name. */
function boxesOf(buffer, byModule) {
  const operator = ["operator", `${buffer.op} ${buffer.shape.join(" × ") || "one"} ${buffer.dtype}`];
  if (!byModule) return [["category", buffer.category], ["place", buffer.place], operator];
  const path = buffer.module ? buffer.module.split(".") : [buffer.module === "" ? "the model itself" : "no module"];
  return [["category", buffer.category], ...path.map(step => ["module", step]), operator];
}

/** Boxes within boxes; a module that has nothing but one module in it stands in one box with that. */
function nested(buffers, byModule) {
  const root = { name: "", kind: "", bytes: 0, inner: new Map() };
  for (const buffer of buffers) {
    let box = root;
    for (const [kind, name] of boxesOf(buffer, byModule)) {
      const key = `${kind} ${name}`;
      if (!box.inner.has(key)) box.inner.set(key, { name, kind, bytes: 0, count: 0, places: new Set(), inner: new Map() });
      box = box.inner.get(key);
      box.bytes += buffer.bytes;
      box.count += buffer.count ?? 1;
      box.places.add(buffer.place);
    }
  }
  const joined = box => {
    let inner = [...box.inner.values()];
    while (box.kind === "module" && inner.length === 1 && inner[0].kind === "module") {
      box.name += `.${inner[0].name}`;
      inner = [...inner[0].inner.values()];
    }
    box.inner = inner.map(joined).sort((a, b) => b.bytes - a.bytes);
    return box;
  };
  return joined(root).inner;
}

/** Buffers that are alive at the peak, as a flame graph: by category, module (or place in the code) and operator. */
function flame(data, buffers) {
  const total = buffers.reduce((sum, buffer) => sum + buffer.bytes, 0);
  const byModule = namesModules(buffers);
  const what = `by category, ${byModule ? "module" : "place"} and operator`;
  const said = `Buffers at the peak of forward and backward, ${shown(total / 2 ** 20)} MiB, ${what}; the tables have their numbers`;
  const box = el("div", { class: "flame", role: "img", "aria-label": said });
  const add = (parent, boxes, above, colour) => {
    for (const each of boxes) {
      const shade = colour || (data.categories[`${each.name}_bytes`] ?? "#7F7F7F");
      const share = `${(100 * each.bytes / total).toPrecision(2)} %`;
      const text = `${each.name}: ${shown(each.bytes / 2 ** 20)} MiB, ${share}`;
      const path = each.kind === "module" && above ? `${above}.${each.name}` : each.name;
      const where = each.kind === "operator" ? `, ${each.count} of them, ${above ? `of ${above}, ` : ""}in ${[...each.places].join(", ")}` : "";
      const inner = el("div", { class: "within" });
      const part = el("div", { class: "part", title: `${path}: ${shown(each.bytes / 2 ** 20)} MiB, ${share} of these buffers${where}`,
        style: `flex: ${each.bytes} 0 0; --share: ${100 * each.bytes / total}%; --shade: ${shade}` }, el("span", {}, text), inner);
      add(inner, each.inner, each.kind === "module" ? path : above, shade);
      parent.append(part);
    }
  };
  add(box, nested(buffers, byModule), "", "");
  return box;
}

function namesModules(buffers) {
  return buffers.some(buffer => typeof buffer.module === "string");
}

/** The levels of one step over time, stacked by category. */
function timeline(data, points) {
  const names = [...new Set(points.flatMap(point => Object.keys(point.bytes)))];
  const colour = name => data.categories[`${name}_bytes`] ?? "#7F7F7F";
  const most = Math.max(...points.map(point => Object.values(point.bytes).reduce((a, b) => a + b, 0)), 1);
  const box = el("div", { class: "timeline", role: "img",
    "aria-label": `Live bytes through one step, by category; at most ${shown(most / 2 ** 20)} MiB` });
  let phase = "";
  for (const point of points) {
    const column = el("div", { class: "moment", title: `${point.phase}: ` + names.filter(name => point.bytes[name])
      .map(name => `${name} ${shown(point.bytes[name] / 2 ** 20)} MiB`).join(", ") });
    for (const name of names) {
      const height = 100 * (point.bytes[name] ?? 0) / most;
      if (height) column.append(el("i", { style: `height: ${height}%; background: ${colour(name)}` }));
    }
    if (point.phase !== phase) {
      const late = box.children.length > 0.8 * points.length;
      column.append(el("b", { class: late ? "late" : null }, point.phase));
    }
    phase = point.phase;
    box.append(column);
  }
  const key = el("p", { class: "key" }, ...names.map(name =>
    el("span", {}, el("i", { style: `background: ${colour(name)}` }), ` ${name} `)));
  const top = `From the first event of a step to the last; the top is ${shown(most / 2 ** 20)} MiB.`;
  return el("div", {}, el("p", {}, top), box, key);
}

async function detailOf(data, cell) {
  const box = el("div", { class: "detail", role: "region", "aria-label": `Details of ${data.word("label", cell)}` });
  for (const repeat of await data.detail(cell)) {
    if (repeat.repeat) box.append(el("h3", {}, `Repeat ${repeat.repeat}`));
    box.append(...repeat.headline.filter(Boolean).map(line => el("p", {}, line)));
    box.append(...repeat.warnings.map(line => el("p", { class: "bad" }, `Warning: ${line}.`)));
    const button = el("button", { type: "button", onclick: () => navigator.clipboard?.writeText(repeat.command) }, "Copy");
    box.append(el("p", {}, "Again: ", el("code", {}, repeat.command), " ", button));
    if (repeat.timeline) box.append(el("h3", {}, "One step"), timeline(data, repeat.timeline));
    if (repeat.buffers.length) {
      const middle = namesModules(repeat.buffers) ? "module of the model" : "place";
      box.append(el("h3", {}, `Buffers at the peak, by category, ${middle} and operator`), flame(data, repeat.buffers));
    }
    for (const [title, rows] of repeat.sections) {
      const body = el("tbody", {}, ...rows.map(([name, value, meaning]) => el("tr", {},
        el("th", { scope: "row" }, name), el("td", {}, value),
        el("td", { class: "dim" }, meaning ?? data.metrics[name]?.meaning ?? ""))));
      box.append(el("h3", {}, title), scrolling(title, el("table", {}, body)));
    }
    const facts = data.environments[repeat.environment];
    if (facts) {
      const rows = facts.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)));
      const table = el("table", {}, el("tbody", {}, ...rows));
      box.append(el("details", {}, el("summary", {}, `Environment ${repeat.environment}`), scrolling("Environment", table)));
    }
    if (repeat.traceback) box.append(el("pre", { tabindex: "0" }, repeat.traceback));
  }
  return box;
}
