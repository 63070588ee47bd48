// Everything in the page is there without this; it adds charts, tables that sort and filter, and the details of cells.

async function start() {
  const data = new Data(await unpacked(document.getElementById("data")));
  const tables = [];
  const opened = cell => tables.find(({ table }) => cell >= table.begin && cell < table.end)?.reveal(cell);
  for (const table of data.tables) tables.push(new CellTable(data, table, document.getElementById(`table-${table.name}`)));
  for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
  const later = task => new Promise(done => setTimeout(() => { task(); done(); }));
  const at = (id, make) => { const place = document.getElementById(id); if (place) return later(() => make(place)); };
  const made = {};  // reached from the console of a browser, and by tests
  window.meftbench = made;
  if (data.presets.length) await at("chart", place => { made.chart = new Chart(data, place, opened); });
  await at("peaks", place => new Peaks(data, place, opened));
  await at("heat", place => new HeatMap(data, place, opened));
  document.getElementById("pictures")?.removeAttribute("open");
  for (const table of document.querySelectorAll("table.sortable")) sortable(table);
  for (const box of document.querySelectorAll(".scroll")) fitted(box);
  const follow = () => {
    const id = location.hash.slice(1);
    if (!id.startsWith("cell-")) return;
    const cell = data.words.anchor.at.findIndex(place => data.words.anchor.values[place] === id);
    if (cell >= 0) opened(cell);
  };
  addEventListener("hashchange", follow);
  document.documentElement.dataset.ready = "yes";
  follow();
}

if (typeof DecompressionStream === "undefined") {
  document.getElementById("old").hidden = false;
} else {
  start();
}
