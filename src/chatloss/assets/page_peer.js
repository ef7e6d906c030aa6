// Two masks: what another tool trains in the same rows, beside ours. A line under a token is ours, one over it theirs.

const KINDS = {
  ours: `only chatloss`, theirs: `only ${D.peer}`, other: "other weight", both: "both train", none: "neither trains",
};
const DIFFERENT = ["ours", "theirs", "other"];

/** [end, kind, their weight] of every stretch of tokens on which neither mask changes; nothing for a row without. */
function stretches(row) {
  const out = [];
  if (!row.l) return out;
  for (let at = 0, ours = 0, theirs = 0; at < row.n;) {
    const end = Math.min(row.p[ours], row.l[theirs]), weight = row.p[ours + 2], their = row.l[theirs + 1];
    const kind = weight && their ? (weight === their ? "both" : "other") : weight ? "ours" : their ? "theirs" : "none";
    out.push([end, kind, their]);
    if (row.p[ours] === end) ours += 4;
    if (row.l[theirs] === end) theirs += 2;
    at = end;
  }
  return out;
}

for (const row of rows) {
  row.kinds = { ours: 0, theirs: 0, other: 0, both: 0, none: 0 };
  let at = 0;
  for (const [end, kind] of stretches(row)) {
    row.kinds[kind] += end - at;
    at = end;
  }
  row.different = DIFFERENT.reduce((sum, kind) => sum + row.kinds[kind], 0);
}

/** Says of each run of a row what the other tool does with it; a run of several tokens differs if one of them does. */
function compare(row, runs) {
  const parts = stretches(row);
  let part = 0;
  for (const run of runs) {
    if (!parts.length) return;
    while (parts[part][0] <= run.start) part += 1;
    run.kind = parts[part][1];
    run.theirs = parts[part][2];
    for (let i = part; !DIFFERENT.includes(run.kind) && parts[i][0] < run.end; i += 1) run.kind = parts[i + 1][1];
  }
}

/** The other tool's lane above ours in the strip of a row. */
function lane(row, svg) {
  for (let i = 0, start = 0; i < row.l.length; start = row.l[i], i += 2) {
    if (row.l[i + 1]) svg.append(el("svg:rect", { class: "peer", x: start, y: 0, width: row.l[i] - start, height: 1 }));
  }
}

function agreement(row) {
  if (!row.l) return el("span", { class: "agree" }, `not in ${D.peer}`);
  const told = DIFFERENT.filter((kind) => row.kinds[kind]).map((kind) => `${KINDS[kind]} ${count(row.kinds[kind])}`);
  return el("span", { class: told.length ? "agree odd" : "agree" }, [...told, `both ${count(row.kinds.both)}`].join(", "));
}

/** How to read two masks, with the number of tokens of each kind. */
function legend() {
  const total = (kind) => rows.reduce((sum, row) => sum + row.kinds[kind], 0);
  const sample = (kind) => el("span", { class: `t ${kind}` }, "token");
  const say = {
    both: "a line under and a line over it", ours: "a line under it", theirs: "a line over it",
    other: "both lines, the weights differ", none: "no line",
  };
  const body = ["both", ...DIFFERENT, "none"].filter((kind) => kind === "both" || total(kind)).map((kind) => el("tr", {},
    el("td", {}, el("span", { class: kind === "none" || kind === "theirs" ? "span off" : "span on content" }, sample(kind))),
    el("td", {}, KINDS[kind]), el("td", {}, say[kind]), el("td", { class: "num" }, plural(total(kind), "token"))));
  const differ = rows.filter((row) => row.different).length;
  panel(`chatloss beside ${D.peer}`, null, true, el("p", { class: "hint" }, differ
    ? `The masks differ in ${count(differ)} of ${plural(rows.length, "row")}. The bar of a row has two lanes: ${D.peer} above, chatloss below. The keys d and D lead from one difference to the next.`
    : "The masks are the same in every row."), el("table", { class: "legend" }, el("tbody", {}, ...body)));
}

const KIND_FILTERS = {
  differ: ["that differ", (row) => row.different > 0],
  ours: ["only chatloss trains some", (row) => row.kinds.ours > 0],
  theirs: [`only ${D.peer} trains some`, (row) => row.kinds.theirs > 0],
  other: ["other weights", (row) => row.kinds.other > 0],
  same: ["that agree", (row) => row.l && !row.different],
};
