// Which rows are shown: filters, search, and the chips that name what is on.

const filters = { reason: new Set(), outcome: new Set(), source: new Set(), peer: new Set(), finding: new Set(), plots: {} };
const KINDS_OF_PICKS = ["reason", "outcome", "source", "peer", "finding"];
for (const finding of D.findings) finding.places = new Set(finding.rows);
const fileOf = (row) => row.s.replace(/:\d+$/, "");

function matches(row, skip) {
  if (filters.reason.size && ![...filters.reason].some((reason) => row.reasons.has(reason))) return false;
  if (filters.outcome.size && ![...filters.outcome].some((outcome) => row.outcomes.has(outcome))) return false;
  if (filters.source.size && !filters.source.has(fileOf(row))) return false;
  if (filters.peer.size && ![...filters.peer].some((name) => KIND_FILTERS[name][1](row))) return false;
  if (filters.finding.size && ![...filters.finding].some((number) => D.findings[number - 1].places.has(row.index))) return false;
  for (const [name, bins] of Object.entries(filters.plots)) if (name !== skip && !bins.has(row.bins[name])) return false;
  if (!query) return true;
  const id = /^id:(\d+)$/.exec(query);
  if (id) return row.k.some((rank) => D.ids[rank] === Number(id[1]));
  return row.s.toLowerCase().includes(query) || haystack(row).includes(query);
}

function apply() {
  let shown = 0;
  for (const row of rows) {
    const hide = !matches(row);
    if (row.node.hidden !== hide) row.node.hidden = hide;
    shown += !hide;
  }
  $("count").textContent = shown === rows.length ? plural(shown, "row") : `${count(shown)} of ${plural(rows.length, "row")}`;
  $("none").hidden = shown > 0 || !rows.length;
  $("active").replaceChildren(...chips());
  for (const plot of plots) plot.update();
  link();
}

function toggleBin(name, bin) {
  const bins = (filters.plots[name] ||= new Set());
  if (!bins.delete(bin)) bins.add(bin);
  if (!bins.size) delete filters.plots[name];
}

function chips() {
  const out = [];
  const chip = (text, undo) => out.push(el("button", { type: "button", class: "chip", title: "Remove this filter",
    click: () => { undo(); sync(); apply(); } }, text + " ×"));
  for (const reason of filters.reason) chip(words(D.reasons[reason][0]), () => filters.reason.delete(reason));
  for (const outcome of filters.outcome) chip("turns " + words(outcome), () => filters.outcome.delete(outcome));
  for (const source of filters.source) chip(source, () => filters.source.delete(source));
  for (const name of filters.peer) chip(`${D.peer}: ${KIND_FILTERS[name][0]}`, () => filters.peer.delete(name));
  for (const plot of plots) {
    for (const bin of filters.plots[plot.name] || []) chip(plot.labels[bin], () => toggleBin(plot.name, bin));
  }
  for (const number of filters.finding) chip(D.findings[number - 1].cause.slice(0, 60), () => filters.finding.delete(number));
  if (query) chip(`“${query.slice(0, 40)}”`, () => search(""));
  return out;
}

/** Check boxes and the search field say again what the filters are. */
function sync() {
  for (const box of document.querySelectorAll(".pick input")) box.checked = filters[box.kind].has(box.key);
  if ($("search").value.trim().toLowerCase() !== query) $("search").value = query;
}

function search(text) {
  query = text.trim().toLowerCase();
  for (const row of rows) {
    if (!row.state) continue;
    row.state.hits = hitsOf(row, query);
    row.state.nodes.forEach((node, i) => node.classList.toggle("hit", row.state.hits.has(i)));
  }
}

function empty() {
  for (const kind of KINDS_OF_PICKS) filters[kind].clear();
  filters.plots = {};
}

function clear() {
  empty();
  search("");
  sync();
  apply();
}

function picks(kind, title, options) {
  if (!options.length) return;
  const group = el("fieldset", { class: "group" }, el("legend", {}, title));
  for (const [key, label, n, hint] of options) {
    const box = el("input", { type: "checkbox", change: () => {
      if (box.checked) filters[kind].add(key); else filters[kind].delete(key);
      apply();
    } });
    Object.assign(box, { kind, key });
    group.append(el("label", { class: "pick", title: hint }, box, label, el("span", { class: "n" }, count(n))));
  }
  $("filters").append(group);
}
