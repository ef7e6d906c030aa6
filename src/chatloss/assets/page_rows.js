"use strict";
// The rows: data -> runs of tokens -> DOM, drawn as they scroll into view. All text enters as text nodes.

const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const count = (n) => n.toLocaleString("en");
const percent = (part, whole) => (whole ? ((100 * part) / whole).toFixed(1) : "0.0") + "%";
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const words = (name) => name.replaceAll("_", " ");
const FINE = ["exact", "split", "switched_off"]; // nothing to worry about

// What would be invisible, move the text, or turn its direction is shown as its code point; joiners stay inside words.
const SPECIAL = new RegExp(
  "[ \\n\\t]|(?!(?<=[^\\p{C}\\p{Z}])[\\u200c\\u200d][^\\p{C}\\p{Z}])[\\p{C}\\p{Z}\\u034f\\u115f\\u1160\\u17b4\\u17b5" +
  "\\u180b-\\u180f\\u2800\\u3164\\uffa0\\ufe00-\\ufe0d\\u{e0100}-\\u{e01ef}]", "gu");
const WHITE = { " ": "sp", "\n": "nl", "\t": "tab" };
const code = (char) => "U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
const plain = (text) => String(text).replace(SPECIAL, (char) => (WHITE[char] ? char : code(char)));

function el(tag, props, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, plain(value));
  }
  for (const child of children) {
    if (child !== undefined && child !== null) node.append(child instanceof Node ? child : plain(child));
  }
  return node;
}

function show(node, text) {
  let from = 0;
  for (const match of text.matchAll(SPECIAL)) {
    const char = match[0], name = WHITE[char];
    if (match.index > from) node.append(text.slice(from, match.index));
    node.append(name
      ? el("span", { class: name }, char)
      : el("span", { class: "esc" }, code(char)));
    from = match.index + char.length;
  }
  if (from < text.length) node.append(text.slice(from));
  return node;
}

const rows = D.rows.map((row, i) => {
  const out = { ...row, index: i, n: row.k.length, trained: 0, reasons: new Set(), outcomes: new Set() };
  for (let s = 0, start = 0; s < row.p.length; start = row.p[s], s += 4) {
    if (row.p[s + 2]) out.trained += row.p[s] - start;
    out.reasons.add(row.p[s + 3]);
  }
  for (const [, outcome] of row.o) out.outcomes.add(outcome);
  return out;
});

function runsOf(row) {
  const out = [], { k, x, p } = row;
  for (let at = 0, exception = 0, span = 0, end = 0; at < k.length; at = end) {
    let text = D.texts[k[at]];
    end = at + 1;
    if (x[exception] === at) {
      [end, text] = [x[exception + 1], x[exception + 2]];
      exception += 3;
    }
    while (p[span] <= at) span += 4;
    out.push({ start: at, end, text, span, message: p[span + 1], weight: p[span + 2], reason: p[span + 3] });
  }
  compare(row, out);
  return out;
}

// Where a turn is trained, for the rows that hold it as context only.
const homes = new Map();
for (const row of rows) {
  for (let s = 0; s < row.p.length; s += 4) if (row.p[s + 2] && row.s) homes.set(`${row.p[s + 1]} ${row.s}`, row);
}

const idsOf = (row, run) => row.k.slice(run.start, run.end).map((rank) => D.ids[rank]);
const roleOf = (row, message) =>
  (row.m && row.m[message]) || (row.o.some(([turn]) => turn === message) ? "assistant" : "");
const outcomeOf = (row, message) => (row.o.find(([turn]) => turn === message) || [])[1];

/** The text of a row in lower case, with the offset at which each run begins in it. */
function haystack(row) {
  if (!row.lower) {
    const offsets = [];
    let length = 0;
    const parts = (row.state ? row.state.runs : runsOf(row)).map((run) => {
      offsets.push(length);
      const lower = run.text.toLowerCase();
      length += lower.length;
      return lower;
    });
    row.lower = parts.join("");
    row.offsets = offsets;
  }
  return row.lower;
}

/** Runs of the row that the search text touches. */
function hitsOf(row, query) {
  const hits = new Set();
  if (!query) return hits;
  const runs = row.state.runs, wanted = /^id:(\d+)$/.exec(query);
  if (wanted) {
    runs.forEach((run, i) => idsOf(row, run).includes(Number(wanted[1])) && hits.add(i));
    return hits;
  }
  const text = haystack(row);
  let run = 0;
  for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
    while (run + 1 < runs.length && row.offsets[run + 1] <= at) run += 1;
    for (let i = run; i < runs.length && row.offsets[i] < at + query.length; i += 1) hits.add(i);
  }
  return hits;
}

const CHUNK = 1500; // tokens of one row drawn at a time
let query = "";

function strip(row) {
  const ours = row.l ? 1.4 : 0; // the other tool's lane is above
  const svg = el("svg:svg", { class: row.l ? "strip two" : "strip", viewBox: `0 0 ${row.n} ${ours + 1}`, preserveAspectRatio: "none",
    "aria-hidden": "true" });
  if (row.l) lane(row, svg);
  for (let s = 0, start = 0; s < row.p.length; start = row.p[s], s += 4) {
    if (!row.p[s + 2]) continue;
    const name = D.reasons[row.p[s + 3]][0];
    svg.append(el("svg:rect", { class: name, x: start, y: ours, width: row.p[s] - start, height: 1 }));
  }
  return svg;
}

function turns(row) {
  const node = el("span", { class: "turns" });
  const names = [...new Set(row.o.map(([, outcome]) => outcome))];
  names.forEach((name, i) => {
    const where = row.o.filter(([, outcome]) => outcome === name).map(([turn]) => "#" + turn).join(" ");
    node.append(i ? ", " : "", where + " ");
    node.append(el("span", { class: FINE.includes(name) ? "" : "odd", title: D.outcomes[name] || "" }, words(name)));
  });
  return node;
}

function draw(row) {
  if (row.state) return;
  const id = `row-${row.index + 1}`;
  row.state = { runs: runsOf(row), nodes: [], next: 0, span: -1, message: null, kind: "none" };
  row.state.hits = hitsOf(row, query);
  const source = show(el("span"), row.s);
  row.node.replaceChildren(
    el("div", { class: "rowhead" },
      el("h3", { id: id + "-name" }, el("a", { href: "#" + id, "aria-label": `Link to row ${row.index + 1}` }, `${row.index + 1}`), source),
      el("span", {}, `${plural(row.n, "token")}, ${count(row.trained)} trained (${percent(row.trained, row.n)})`),
      D.peer === null ? null : agreement(row), turns(row)),
    strip(row), el("div", { class: "msgs" }));
  row.state.list = row.node.lastChild;
  row.node.setAttribute("aria-labelledby", id + "-name");
  row.node.style.minHeight = "";
  drawMore(row, CHUNK);
}

function drawMore(row, many) {
  const s = row.state, stop = Math.min(s.runs.length, s.next + many);
  if (s.more) {
    growing.unobserve(s.more);
    s.more.remove();
    s.more = null;
  }
  for (; s.next < stop; s.next += 1) {
    const run = s.runs[s.next];
    if (run.message !== s.message) openMessage(row, run);
    if (run.span !== s.span) openSpan(row, run);
    if (run.kind && run.kind !== s.kind) {
      s.kind = run.kind;
      if (DIFFERENT.includes(run.kind)) s.inner.append(el("b", { class: `diff ${run.kind}` }, KINDS[run.kind]));
    }
    s.inner.append(tokenNode(row, run, s.next));
  }
  if (!s.runs.length) s.list.append(el("p", { class: "more" }, "This row is empty."));
  if (s.next < s.runs.length) {
    s.more = el("p", { class: "more" }, `${plural(s.runs.length - s.next, "more piece")} below`);
    s.list.append(s.more);
    growing.observe(s.more);
  }
}

function openMessage(row, run) {
  const s = row.state, role = roleOf(row, run.message), outcome = outcomeOf(row, run.message);
  const who = el("div", { class: "who" });
  if (run.message >= 0) who.append(show(el("b"), role || "message"), `#${run.message}`);
  else who.append("template");
  if (outcome && outcome !== "exact") {
    who.append(el("span", { class: FINE.includes(outcome) ? "note" : "note odd", title: D.outcomes[outcome] || "" }, words(outcome)));
  }
  const home = homes.get(`${run.message} ${row.s}`);
  if (outcome && home && home !== row) who.append(el("a", { class: "note", href: `#row-${home.index + 1}` }, `row ${home.index + 1}`));
  s.message = run.message;
  s.body = el("div", { class: "body", dir: "auto" });
  s.list.append(el("div", { class: "msg" }, who, s.body));
}

function openSpan(row, run) {
  const s = row.state, [name] = D.reasons[run.reason];
  s.span = run.span;
  s.inner = el("span", { class: `span ${name} ${run.weight ? "on" : "off"}` });
  s.inner.append(el("b", { class: "why" }, words(name) + (run.weight ? "" : ", not trained")));
  if (run.weight) s.inner.append(el("b", { class: run.weight === 1 ? "wt one" : "wt" }, `×${run.weight}`));
  s.body.append(s.inner);
}

function tokenNode(row, run, i) {
  const ids = idsOf(row, run).join("+"), stem = run.text.replace(/\n+$/, "");
  const node = el("span", { class: `t${i % 2 ? " o" : ""}${run.kind ? " " + run.kind : ""}`, tabindex: "-1" });
  node.run = run;
  row.state.nodes.push(node);
  if (row.state.hits.has(i)) node.classList.add("hit");
  if (run.text) show(node, stem);
  else node.append(el("span", { class: "esc" }, "#" + ids));
  if (stem === run.text) node.dataset.i = ids;
  else {
    node.append(el("span", { class: "id", "data-i": ids })); // before the line ends
    show(node, run.text.slice(stem.length));
  }
  return node;
}

function undraw(row, height) {
  if (!row.state || row.node.contains(document.activeElement)) return;
  if (row.state.more) growing.unobserve(row.state.more);
  if (height) row.node.style.minHeight = height + "px";
  row.state = row.lower = row.offsets = null;
  row.node.replaceChildren();
}

function placeholder(row) {
  const id = `row-${row.index + 1}`;
  row.node = el("article", { class: "row", id, tabindex: "-1", "aria-label": `Row ${row.index + 1}` });
  row.node.row = row;
  row.node.style.minHeight = 90 + 24 * Math.ceil(row.n / 16) + "px";
  return row.node;
}

const growing = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const row = entry.isIntersecting && entry.target.closest(".row").row;
    if (row && row.state && row.state.more === entry.target) drawMore(row, CHUNK);
  }
}, { rootMargin: "1200px 0px" });
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target.row);
}, { rootMargin: "1000px 0px" });
const far = new IntersectionObserver((entries) => {
  for (const entry of entries) if (!entry.isIntersecting) undraw(entry.target.row, entry.boundingClientRect.height);
}, { rootMargin: "6000px 0px" });
