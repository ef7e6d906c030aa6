// Plots whose bars keep only their rows, and curves.

const plots = [];

/** A row of bars, one per bin; a bar is a button that keeps only its rows. One Tab stop, arrows move inside. */
function plot(name, title, labels, draw) {
  const W = 256, H = 58, step = W / labels.length;
  const svg = el("svg:svg", { class: "plot", viewBox: `0 -2 ${W} ${H + 18}`, role: "group", "aria-label": title });
  const group = el("div", { class: "group" }, el("h2", {}, title), svg);
  const bins = labels.map((label, i) => {
    const hit = el("svg:rect", { class: "hit", x: i * step, y: -2, width: step, height: H + 2, rx: 3 });
    const all = el("svg:rect", { class: "all", x: i * step + 1, width: step - 2, rx: 1.5 });
    const some = el("svg:rect", { class: "some", x: i * step + 1, width: step - 2, rx: 1.5 });
    const tip = el("svg:title", {});
    const toggle = () => {
      toggleBin(name, i);
      apply();
    };
    const node = el("svg:g", { class: "bin", role: "button", tabindex: i ? -1 : 0, "aria-pressed": "false", click: toggle,
      keydown: (event) => {
        const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: bins.length - 1 }[event.key];
        if (event.key === "Enter" || event.key === " ") toggle();
        else if (to === undefined) return;
        else if (bins[to]) bins.forEach((bin, j) => {
          bin.node.setAttribute("tabindex", j === to ? 0 : -1);
          if (j === to) bin.node.focus();
        });
        event.preventDefault();
        event.stopPropagation();
      } }, tip, hit, all, some);
    svg.append(node);
    return { node, all, some, tip };
  });
  svg.append(el("svg:line", { class: "base", x1: 0, x2: W, y1: H + .5, y2: H + .5 }));
  const totals = labels.map((_, i) => rows.filter((row) => row.bins[name] === i).length);
  const top = Math.max(1, ...totals);
  const height = (n) => (n ? Math.max(1.5, (H * n) / top) : 0);
  const update = () => {
    const left = new Array(labels.length).fill(0);
    for (const row of rows) if (row.bins[name] !== undefined && matches(row, name)) left[row.bins[name]] += 1;
    bins.forEach(({ node, all, some, tip }, i) => {
      for (const [bar, n] of draw ? [] : [[all, totals[i]], [some, left[i]]]) {
        bar.setAttribute("y", H - height(n));
        bar.setAttribute("height", height(n));
      }
      const text = `${labels[i]}: ${plural(left[i], "row")}` + (left[i] === totals[i] ? "" : ` of ${count(totals[i])}`);
      node.setAttribute("aria-label", plain(text));
      node.setAttribute("aria-pressed", String(Boolean(filters.plots[name]?.has(i))));
      tip.textContent = plain(text);
    });
  };
  plots.push({ name, labels, update });
  if (draw) draw(svg, group, W, H, step);
  $("filters").append(group);
  return (at, text, anchor) => svg.append(el("svg:text", { x: at * W, y: H + 13, "text-anchor": anchor }, text));
}

function lengths() {
  const sorted = rows.map((row) => row.n).sort((a, b) => a - b);
  const most = sorted[sorted.length - 1], middle = Math.max(1, sorted[sorted.length >> 1]);
  let edges;
  if (most > 10 * middle) edges = Array.from({ length: Math.ceil(Math.log2(most + 1)) - 3 }, (_, i) => (i ? 2 ** (i + 3) : 0));
  else {
    const raw = Math.max(1, most / 14), base = 10 ** Math.floor(Math.log10(raw));
    const step = Math.max(1, [1, 2, 5, 10].map((m) => m * base).find((value) => value >= raw));
    edges = Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
  }
  for (const row of rows) row.bins.length = edges.findLastIndex((edge) => row.n >= edge);
  const labels = edges.map((edge, i) => (i + 1 < edges.length ? `${count(edge)}–${count(edges[i + 1] - 1)} tokens` : `${count(edge)} tokens or more`));
  const axis = plot("length", "Tokens in a row", labels);
  axis(0, "0", "start");
  axis(1, count(most), "end");
}

function shares() {
  for (const row of rows) row.bins.share = row.trained ? Math.min(10, 1 + Math.floor((10 * row.trained) / row.n)) : 0;
  const labels = ["nothing trained", ...Array.from({ length: 10 }, (_, i) => `${10 * i}–${10 * i + 10}% trained`)];
  const axis = plot("share", "Trained share of a row", labels);
  axis(0, "none", "start");
  axis(6 / 11, "50%", "middle");
  axis(1, "100%", "end");
}

/** The share of the loss that each tenth of the rows, by trained tokens, gets under each reduction. */
function deciles() {
  const ranked = rows.filter((row) => row.trained).sort((a, b) => a.trained - b.trained);
  if (!D.reductions.length || ranked.length < 10) return;
  const sums = D.reductions.map(() => new Array(10).fill(0));
  ranked.forEach((row, rank) => {
    row.bins.decile = Math.floor((10 * rank) / ranked.length);
    row.w.forEach((pairs, r) => {
      for (let i = 0, start = 0; i < pairs.length; start = pairs[i], i += 2) sums[r][row.bins.decile] += (pairs[i] - start) * pairs[i + 1];
    });
  });
  const parts = sums.map((sum) => sum.map((value) => value / (sum.reduce((a, b) => a + b, 0) || 1)));
  const top = Math.max(...parts.flat()), dash = (r) => ["", "5 3", "1.5 3", "8 3 2 3", "3 2", "10 4"][r % 6];
  const edges = Array.from({ length: 10 }, (_, i) => ranked.filter((row) => row.bins.decile === i).map((row) => row.trained));
  const labels = edges.map((n, i) => `${n[0]}–${n[n.length - 1]} trained tokens; ` +
    D.reductions.map((name, r) => `${name} ${(100 * parts[r][i]).toFixed(1)}%`).join(", "));
  const axis = plot("decile", "Share of the loss, by trained tokens", labels, (svg, group, W, H, step) => {
    parts.forEach((part, r) => svg.append(el("svg:polyline", { class: `curve h${r % 6}`, "stroke-dasharray": dash(r), "pointer-events": "none",
      points: part.map((value, i) => `${(i + .5) * step},${H - (H * value) / top}`).join(" ") })));
    group.append(el("div", { class: "key" }, ...D.reductions.map((name, r) => el("span", {},
      el("svg:svg", { class: "plot", viewBox: "0 0 22 8", "aria-hidden": "true" },
        el("svg:line", { class: `curve h${r % 6}`, "stroke-dasharray": dash(r), x1: 0, x2: 22, y1: 4, y2: 4 })), name))));
  });
  axis(0, "shortest tenth", "start");
  axis(1, "longest", "end");
}

function curve(points) {
  const W = 640, H = 160, xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(0, ...ys), Math.max(...ys)];
  const place = ([x, y]) => `${40 + ((W - 48) * (x - x0)) / (x1 - x0 || 1)},${H - 20 - ((H - 30) * (y - y0)) / (y1 - y0 || 1)}`;
  const text = (x, y, value, anchor) => el("svg:text", { x, y, "text-anchor": anchor }, String(+value.toPrecision(4)));
  return el("svg:svg", { class: "plot h2", viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": `from ${ys[0]} at ${x0} to ${ys[ys.length - 1]} at ${x1}` },
  el("svg:line", { class: "base", x1: 40, x2: W - 8, y1: H - 20, y2: H - 20 }),
  el("svg:polyline", { class: "curve", points: points.map(place).join(" ") }),
  text(34, 14, y1, "end"), text(34, H - 20, y0, "end"), text(40, H - 4, x0, "start"), text(W - 8, H - 4, x1, "end"));
}
