// What is known of one cell, below its row: how it ended, how to run it again, and every number of its record.

/** Buffers that are alive at the peak, as boxes within boxes: category, place in the code, operator. */
function flame(data, buffers) {
  const total = buffers.reduce((sum, buffer) => sum + buffer.bytes, 0);
  const said = `Buffers at the peak of forward and backward, ${shown(total / 2 ** 20)} MiB, by category, place and operator`;
  const box = el("div", { class: "flame", role: "img", "aria-label": said });
  const levels = [b => b.category, b => b.place, b => `${b.op} ${b.shape.join(" × ")} ${b.dtype}`];
  const add = (parent, members, depth, colour) => {
    if (depth === levels.length) return;
    const groups = new Map();
    for (const buffer of members) {
      const name = levels[depth](buffer);
      groups.set(name, [...(groups.get(name) ?? []), buffer]);
    }
    const sized = [...groups].map(([name, group]) => [name, group, group.reduce((sum, b) => sum + b.bytes, 0)]);
    for (const [name, group, bytes] of sized.sort((a, b) => b[2] - a[2])) {
      const shade = depth ? colour : data.categories[`${name}_bytes`] ?? "#7F7F7F";
      const text = `${name}: ${shown(bytes / 2 ** 20)} MiB`;
      const inner = el("div", { class: "within" });
      const part = el("div", { class: "part", style: `flex: ${bytes} 0 0`, title: text },
        el("span", { style: `border-color: ${shade}` }, text), inner);
      add(inner, group, depth + 1, shade);
      parent.append(part);
    }
  };
  add(box, buffers, 0, "");
  return box;
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
      box.append(el("h3", {}, "Buffers at the peak, by category, place and operator"), flame(data, repeat.buffers));
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
