// The address says what is shown: `#row-17&reason=content,call&q=text`. Opened again, it shows the same.

let linked = null; // the row that the address names
let writing = 0;
const DEFAULT = "space"; // what is shown beside the text unless the address says otherwise
const buttons = [...document.querySelectorAll("[data-toggle]")];
const pressed = () => buttons.filter((button) => button.ariaPressed === "true").map((button) => button.dataset.toggle).join(",");

function address() {
  const parts = linked && !linked.node.hidden ? [`row-${linked.index + 1}`] : [];
  const add = (name, values) => parts.push(`${name}=${values.map((value) => encodeURIComponent(String(value).toWellFormed())).join(",")}`);
  for (const kind of KINDS_OF_PICKS) {
    if (filters[kind].size) add(kind, [...filters[kind]].map((key) => (kind === "reason" ? D.reasons[key][0] : key)));
  }
  for (const { name } of plots) if (filters.plots[name]) add(name, [...filters.plots[name]]);
  if (query) add("q", [query]);
  if (pressed() !== DEFAULT) add("show", pressed().split(","));
  return parts.join("&");
}

/** Writes the address soon: browsers slow a page down that does so at every key. */
function link() {
  clearTimeout(writing);
  writing = setTimeout(() => {
    try {
      history.replaceState(null, "", "#" + address());
    } catch {
      // Some browsers forbid it for local files: the link in the row's heading still works.
    }
  }, 60);
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Shows what the address says; what it names and this page does not have is left out. */
function restore() {
  clearTimeout(writing);
  empty();
  linked = null;
  const said = new Map();
  for (const part of location.hash.slice(1).split("&")) {
    const [name, values] = part.split("=");
    if (values !== undefined) said.set(name, values.split(",").map(decoded));
    else if (/^row-\d+$/.test(name)) linked = rows[Number(name.slice(4)) - 1] || null;
  }
  const known = new Set([...document.querySelectorAll(".pick input")].map((box) => `${box.kind}=${box.key}`));
  const reasons = new Map(Object.entries(D.reasons).map(([reason, [name]]) => [name, Number(reason)]));
  for (const kind of KINDS_OF_PICKS) for (const value of said.get(kind) || []) {
    const key = kind === "reason" ? reasons.get(value) : kind === "finding" ? Number(value) : value;
    if (known.has(`${kind}=${key}`)) filters[kind].add(key);
  }
  for (const plot of plots) for (const value of said.get(plot.name) || []) {
    const bin = /^\d+$/.test(value) ? Number(value) : -1;
    if (plot.labels[bin] && !filters.plots[plot.name]?.has(bin)) toggleBin(plot.name, bin);
  }
  const shown = said.get("show") || [DEFAULT];
  for (const button of buttons) {
    const on = shown.includes(button.dataset.toggle);
    document.body.classList.toggle("show-" + button.dataset.toggle, on);
    button.setAttribute("aria-pressed", String(on));
  }
  search((said.get("q") || [""])[0]);
  sync();
  apply();
}
