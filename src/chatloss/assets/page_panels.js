// What stands above the rows: findings, what is trained nowhere, what was rejected, and further sections.

const FOUND = 6; // findings that are open at once

function panel(title, n, open, ...inside) {
  const node = el("details", { class: "panel" }, el("summary", {}, title, n === null ? null : el("span", { class: "n" }, count(n))),
    el("div", { class: "inside" }, ...inside));
  node.open = open;
  $("before").append(node);
}

function table(head, body) {
  const cells = (tag, row) => el("tr", {}, ...row.map((cell) => show(el(tag), String(cell))));
  return el("table", {}, el("thead", {}, cells("th", head)), el("tbody", {}, ...body.map((row) => cells("td", row))));
}

function panels() {
  if (D.peer !== null) legend();
  for (const part of D.sections) {
    panel(part.title, null, true, part.text ? show(el("div", { class: "prose" }), part.text) : null,
      part.curve.length ? curve(part.curve) : null, part.table.length ? table(part.table[0], part.table.slice(1)) : null);
  }
  const found = D.findings.map((finding, i) => el("div", { class: "finding" },
    el("span", { class: `sev ${finding.severity}` }, finding.severity), show(el("p"), finding.cause),
    el("span", {}, finding.count === null ? "" : count(finding.count) + "×"),
    finding.remedy ? show(el("p", { class: "remedy" }), finding.remedy) : null,
    finding.example || finding.rows.length ? el("p", { class: "example" }, show(el("span"), finding.example), " ",
      finding.rows.length ? el("button", { type: "button", class: "link", click: () => {
        filters.finding = new Set([i + 1]);
        sync();
        apply();
        $("content").querySelector(".bar").scrollIntoView();
      } }, `show ${plural(finding.rows.length, "row")}`) : null) : null));
  const rest = found.splice(found.length > FOUND + 2 ? FOUND : found.length);
  if (D.findings.length) panel("Findings", D.findings.length, true, ...found,
    rest.length ? el("details", { class: "rest" }, el("summary", {}, plural(rest.length, "more finding")), ...rest) : null);
  untrained();
  if (D.rejects.total) panel("Rejected rows", D.rejects.total, false, table(["row", "field", "what", "remedy"], D.rejects.list.map(
    ([where, ...rest]) => [...apart(where), ...rest])), listed(D.rejects));
}

const listed = ({ total, list }) => (total > list.length ? el("p", { class: "hint" }, `The first ${count(list.length)} are listed.`) : null);

/** ``file:row path`` -> [file:row, path]. */
const apart = (where) => (/^(.*?:\d+) (.*)$/s.exec(where) || [where, where, ""]).slice(1);

/** Turns that no row trains: why, how many, and where each of them is. */
function untrained() {
  const { counts, total, list } = D.untrained;
  if (!counts.length) return;
  const cause = ([why, n]) => el("tr", {}, el("td", { class: "num" }, count(n)),
    el("td", { class: FINE.includes(why) ? "" : "odd" }, words(why)), el("td", {}, D.outcomes[why] || ""));
  const turn = ([source, message, why, row, role]) => el("tr", {}, show(el("td"), source),
    show(el("td", {}, `#${message} `), role), el("td", {}, words(why)),
    el("td", {}, row < 0 ? "no row" : el("a", { href: `#row-${row + 1}` }, `row ${row + 1}`)));
  panel("Turns trained nowhere", counts.reduce((sum, [, n]) => sum + n, 0), false,
    el("table", { class: "fit" }, el("tbody", {}, ...counts.map(cause))),
    list.length ? el("table", {}, el("thead", {}, el("tr", {}, ...["conversation", "turn", "why", "seen in"].map((name) => el("th", {}, name)))),
      el("tbody", {}, ...list.map(turn))) : null, listed({ total, list }));
}
