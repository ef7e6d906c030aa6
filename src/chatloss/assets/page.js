// Putting it together: keyboard, the card of a token, switches, and the first rows.

let current = null; // the row that keys act on
const shownRows = () => rows.filter((row) => !row.node.hidden);

function enter(row, focus) {
  if (current && current !== row) current.node.classList.remove("current");
  current = row;
  row.node.classList.add("current");
  if (focus) row.node.focus({ preventScroll: true });
}

function go(row) {
  if (!row) return;
  if (row.node.hidden) clear();
  draw(row);
  for (const other of [rows[row.index - 1], rows[row.index + 1]]) if (other && !other.node.hidden) draw(other);
  enter(row, true);
  row.node.scrollIntoView({ block: "start" });
  // Rows above may have been drawn by now, at other heights than was guessed.
  requestAnimationFrame(() => requestAnimationFrame(() => row.node.scrollIntoView({ block: "start" })));
  linked = row;
  link();
}

function step(by) {
  const list = shownRows();
  if (!current || current.node.hidden) {
    const top = list.findIndex((row) => row.node.getBoundingClientRect().bottom > 120);
    go(list[Math.max(0, by < 0 ? top - 1 : top)]);
  } else go(list[list.indexOf(current) + by]);
}

function goToken(to) {
  const state = current && current.state;
  if (!state || to < 0 || to >= state.runs.length) return;
  if (to >= state.next) drawMore(current, to - state.next + CHUNK);
  state.nodes[to].focus();
}

function token(by) {
  if (!current) step(1);
  const here = document.activeElement.run ? current.state.nodes.indexOf(document.activeElement) : -1;
  goToken(here < 0 ? 0 : here + by);
}

function trained(by) {
  if (!current) step(1);
  const { runs, nodes } = current.state;
  const here = document.activeElement.run ? nodes.indexOf(document.activeElement) : by > 0 ? -1 : runs.length;
  const span = here >= 0 && here < runs.length ? runs[here].span : null;
  const starts = (i) => runs[i].weight && (i === 0 || runs[i - 1].span !== runs[i].span);
  for (let i = here + by; i >= 0 && i < runs.length; i += by) if (starts(i) && runs[i].span !== span) return goToken(i);
}

/** The next or previous stretch on which the masks differ, in this row or the nearest that has one. */
function difference(by) {
  if (D.peer === null) return;
  const list = shownRows(), from = current && !current.node.hidden ? list.indexOf(current) : by > 0 ? -1 : list.length;
  const state = current && current.state, node = document.activeElement.run && document.activeElement;
  const here = from >= 0 && node && state ? state.nodes.indexOf(node) : by > 0 ? -1 : Infinity;
  for (let r = Math.max(0, from); r >= 0 && r < list.length; r += by) {
    if (!list[r].different) continue;
    draw(list[r]);
    const { runs } = list[r].state;
    const starts = (i) => DIFFERENT.includes(runs[i].kind) && (i === 0 || runs[i - 1].kind !== runs[i].kind);
    const first = list[r] !== current ? (by > 0 ? 0 : runs.length - 1) : Math.min(here + by, runs.length - 1);
    for (let i = first; i >= 0 && i < runs.length; i += by) {
      if (!starts(i)) continue;
      if (list[r] !== current) go(list[r]);
      goToken(i);
      return;
    }
  }
}

function place(node) {
  const card = $("card"), box = node.getClientRects()[0];
  if (!box) return;
  card.hidden = false;
  const { width, height } = card.getBoundingClientRect();
  card.style.left = Math.max(12, Math.min(box.left, innerWidth - width - 12)) + "px";
  card.style.top = (box.bottom + 8 + height < innerHeight ? box.bottom + 8 : Math.max(8, box.top - height - 8)) + "px";
}

function weightUnder(row, reduction, at) {
  const pairs = row.w[reduction];
  for (let i = 0; i < pairs.length; i += 2) if (at < pairs[i]) return pairs[i + 1];
  return 0;
}

function describe(node) {
  const run = node.run, row = node.closest(".row").row, [name, explanation] = D.reasons[run.reason];
  const ids = idsOf(row, run), role = roleOf(row, run.message), outcome = outcomeOf(row, run.message);
  const list = el("dl");
  const line = (term, ...text) => list.append(el("dt", {}, term), el("dd", {}, ...text));
  line(ids.length > 1 ? "ids" : "id", ids.join(" + "));
  line("reason", el("span", { class: `swatch ${name} ${run.weight ? "on" : "off"}` }, words(name)));
  if (run.kind) {
    line("weight", `${run.weight} in chatloss, ${run.theirs} in ${D.peer}`);
    line("masks", el("span", { class: DIFFERENT.includes(run.kind) ? "odd" : "" }, KINDS[run.kind]));
  } else line("weight", String(run.weight));
  if (run.weight) D.reductions.forEach((reduction, r) => line(`weight (${reduction})`, weightUnder(row, r, run.start).toPrecision(3)));
  if (run.message >= 0) line("message", `#${run.message}`, role ? show(el("span"), " " + role) : "", outcome ? `, ${words(outcome)}` : "");
  line("place", `${count(run.start + 1)} of ${count(row.n)}`);
  const text = el("div", { class: "text show-space", dir: "auto" });
  if (run.text) show(text, run.text.slice(0, 400));
  else text.append(ids.length ? "no text of its own" : "");
  const card = $("card");
  card.replaceChildren(text, list, el("p", { class: "why-text" }, explanation + (run.weight || !D.reasons[run.reason][2] ? "" : " (but its weight is 0)")));
  place(node);
}

const hideCard = () => { $("card").hidden = true; };
const tokenAt = (target) => target instanceof Element && target.closest(".t");

$("rows").addEventListener("pointerover", (event) => {
  const node = tokenAt(event.target);
  if (node) describe(node); else hideCard();
});
$("rows").addEventListener("pointerleave", hideCard);
$("rows").addEventListener("focusin", (event) => {
  const node = tokenAt(event.target), row = event.target.closest(".row");
  if (row) enter(row.row, false);
  if (!node) return;
  describe(node);
  $("say").textContent = [...$("card").querySelectorAll("dt")].map((term) => `${term.textContent} ${term.nextSibling.textContent}`)
    .join(", ") + ". " + $("card").lastChild.textContent;
});
$("rows").addEventListener("focusout", hideCard);
addEventListener("scroll", () => {
  if (document.activeElement.run) place(document.activeElement); else hideCard();
}, { passive: true });

const toggles = {};
for (const button of document.querySelectorAll("[data-toggle]")) {
  toggles[button.dataset.toggle] = () => {
    const on = document.body.classList.toggle("show-" + button.dataset.toggle);
    button.setAttribute("aria-pressed", String(on));
    link();
  };
  button.addEventListener("click", toggles[button.dataset.toggle]);
}

const THEMES = { auto: ["◐", "automatic"], light: ["○", "light"], dark: ["●", "dark"] };
function setTheme(name) {
  if (!THEMES[name]) name = "auto";
  document.documentElement.dataset.theme = name;
  $("theme").textContent = THEMES[name][0];
  $("theme").setAttribute("aria-label", `Theme: ${THEMES[name][1]}`);
  try {
    localStorage.setItem("chatloss-theme", name);
  } catch {
    // Storage is off: the choice lasts as long as the page.
  }
}
function nextTheme() {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
}
$("theme").addEventListener("click", nextTheme);
$("ask").addEventListener("click", () => $("help").showModal());
$("clear").addEventListener("click", clear);
$("drawer").addEventListener("click", () => {
  const open = document.querySelector("aside").classList.toggle("open");
  $("drawer").setAttribute("aria-expanded", String(open));
});

let typing = 0;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => { search($("search").value); apply(); }, 150);
});

const KEYS = {
  j: () => step(1), k: () => step(-1), Home: () => go(shownRows()[0]), End: () => go(shownRows().at(-1)),
  ArrowRight: () => token(1), ArrowLeft: () => token(-1), n: () => trained(1), p: () => trained(-1),
  d: () => difference(1), D: () => difference(-1),
  w: () => toggles.space(), i: () => toggles.ids(), r: () => toggles.reasons(), e: () => toggles.weights(),
  c: clear, t: nextTheme, "/": () => $("search").select(), "?": () => $("help").showModal(),
  Escape: () => { if (document.activeElement.run) current.node.focus({ preventScroll: true }); hideCard(); },
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target === $("search")) {
    if (event.key !== "Escape" && event.key !== "Enter") return;
    event.preventDefault(); // Escape would empty the field
    $("search").blur();
    return;
  }
  const action = KEYS[event.key];
  if (!action || (event.target.matches("input") && event.key.length > 1)) return;
  event.preventDefault();
  action();
});

document.addEventListener("click", (event) => {
  const to = event.target instanceof Element && event.target.closest("a[href^='#row-']");
  if (!to || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault(); // the filters stay
  go(rows[Number(to.hash.slice(5)) - 1]);
});

function facts() {
  const sum = (pick) => rows.reduce((total, row) => total + pick(row), 0);
  const tokens = sum((row) => row.n), on = sum((row) => row.trained);
  const parts = [plural(rows.length, "row"), plural(tokens, "token"), `${percent(on, tokens)} trained`];
  $("facts").textContent = plain([...parts, ...D.summary.map(([name, value]) => `${name} ${value}`)].join(" · "));
}

function sidebar() {
  const tally = (pick) => {
    const out = new Map();
    for (const row of rows) for (const key of pick(row)) out.set(key, (out.get(key) || 0) + 1);
    return out;
  };
  picks("reason", "Rows with tokens that are", [...tally((row) => row.reasons)].sort((a, b) => a[0] - b[0]).map(([reason, n]) => {
    const [name, hint, on] = D.reasons[reason];
    return [reason, el("span", { class: "label" }, el("span", { class: `swatch ${name} ${on ? "on" : "off"}` }, words(name))), n, hint];
  }));
  const outcomes = [...tally((row) => row.outcomes)];
  if (outcomes.length) picks("outcome", "Rows with turns that are", outcomes.map(([name, n]) => [
    name, el("span", { class: "label" }, el("span", { class: FINE.includes(name) ? "" : "odd" }, words(name))), n, D.outcomes[name]]));
  if (D.peer !== null) {
    const kept = Object.entries(KIND_FILTERS).map(([name, [title, test]]) => [name, el("span", { class: "label" }, title), rows.filter(test).length]);
    picks("peer", `Rows beside ${D.peer}`, kept.filter(([, , n]) => n));
  }
  picks("finding", "Rows with findings", D.findings.map((finding, i) =>
    [i + 1, el("span", { class: "label" }, finding.cause.split(":")[0].slice(0, 80)), finding.rows.length, finding.cause]).filter(([, , n]) => n));
  const sources = [...tally((row) => [fileOf(row)])];
  if (sources.length > 1) picks("source", "From", sources.slice(0, 30).map(([name, n]) => [name, show(el("span", { class: "label" }), name), n, name]));
}

let stored = null;
try {
  stored = localStorage.getItem("chatloss-theme");
} catch {
  stored = null;
}
setTheme(stored);
facts();
const header = document.querySelector(".top");
new ResizeObserver(() => document.documentElement.style.setProperty("--top", header.offsetHeight + 16 + "px")).observe(header);
for (const row of rows) row.bins = {};
panels();
$("rows").append(...rows.map(placeholder));
rows.slice(0, 2).forEach(draw);
document.documentElement.dataset.firstRow = performance.now().toFixed(0);
if (rows.length) {
  sidebar();
  lengths();
  shares();
  deciles();
}
restore();
for (const row of rows) {
  near.observe(row.node);
  far.observe(row.node);
}
if (linked) go(linked);
addEventListener("hashchange", () => {
  restore();
  if (linked) go(linked);
});
document.documentElement.dataset.ready = "yes";
