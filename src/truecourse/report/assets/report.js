"use strict";
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const RUNS = D.runs, MANY = RUNS.length > 1;

  // -- small helpers -------------------------------------------------------------------------------------------------

  // Elements are made here only, and text enters as text only: completions are hostile.
  function h(tag, attrs, ...children) {
    const el = document.createElement(tag);
    for (const [k, v] of Object.entries(attrs || {})) {
      if (v === null || v === undefined || v === false) continue;
      if (k.startsWith("on")) el.addEventListener(k.slice(2), v);
      else if (k === "color") el.style.backgroundColor = v;
      else el.setAttribute(k, v === true ? "" : v);
    }
    for (const c of children.flat(Infinity)) if (c !== null && c !== undefined && c !== false) el.append(c);
    return el;
  }
  const main = document.getElementById("main"), nav = document.getElementById("nav");
  function section(id, title, ...children) {
    const el = h("section", { id, "aria-labelledby": id + "-h" }, h("h2", { id: id + "-h" }, title), ...children);
    nav.append(h("a", { href: "#" + id }, title));
    main.append(el);
    return el;
  }
  const isNum = (v) => typeof v === "number" && Number.isFinite(v);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // -- numbers as a reader wants them --------------------------------------------------------------------------------

  const trim = (s) => (s.includes(".") ? s.replace(/\.?0+$/, "") : s);
  function num(v, digits = 3) {
    if (!isNum(v)) return "–";
    const a = Math.abs(v);
    if (a === 0) return "0";
    if (a >= 1e9 || a < 1e-4) return v.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e").replace("-", "−");
    if (a >= 1e4) return Math.round(v).toLocaleString("en-US").replace("-", "−");
    return trim(v.toPrecision(Math.max(digits, Math.ceil(Math.log10(a + 1))))).replace("-", "−");
  }
  const fixed = (v) => (!isNum(v) ? "–" : Number.isInteger(v) ? num(v) : Math.abs(v) < 10 && Math.abs(v) >= 0.01 ? v.toFixed(3).replace("-", "−") : num(v));
  const percent = (v) => (isNum(v) ? trim((100 * v).toFixed(Math.abs(v) < 0.1 ? 2 : 1)) + " %" : "–");
  function seconds(v) {
    if (!isNum(v)) return "–";
    if (v < 1) return num(v * 1000) + " ms";
    if (v < 100) return num(v) + " s";
    const s = Math.round(v), H = Math.floor(s / 3600), M = Math.floor((s % 3600) / 60);
    return H ? `${H} h ${M} min` : `${M} min ${s % 60} s`;
  }
  function amount(v) {
    if (!isNum(v)) return "–";
    for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) if (v >= size) return num(v / (size === 1e4 ? 1e3 : size)) + " " + unit;
    return Math.round(v).toLocaleString("en-US");
  }
  const bytes = (v) => (!isNum(v) ? "–" : v >= 2 ** 30 ? num(v / 2 ** 30) + " GiB" : num(v / 2 ** 20) + " MiB");
  const KIND = {
    number: fixed, share: percent, seconds, bytes, tokens: (v) => num(v), small: num,
    rate: (v) => (isNum(v) ? Math.round(v).toLocaleString("en-US") : "–"),
  };

  // What each metric is, in plain words: [title, unit, kind, what to look for].
  const METRICS = {
    "reward/mean": ["Reward", "", "number", "Mean reward of a step's completions."],
    "reward/std": ["Spread of the reward", "", "number", "Standard deviation of the reward; near zero there is nothing left to learn from."],
    "kl/ref": ["KL to the reference", "nats / sequence", "small", "How far the policy has gone from its reference; steady growth is usual, a sudden climb is not."],
    "kl/ref_k1": ["KL to the reference, k1", "nats / sequence", "small", "The plain estimate, which may fall below zero; far from the other, both are noisy."],
    "kl/update": ["KL of one update", "nats / sequence", "small", "How far one optimiser step moves the policy; spikes mean that the steps are too large."],
    "kl/sampler": ["Sampler against trainer", "nats / token", "small", "KL between the policy that sampled and the one being trained; it must stay near zero."],
    "clip/fraction": ["Clipped ratios", "% of tokens", "share", "Where the importance ratio leaves the clip range; zero while each rollout is used once, above 20 % the steps are too large."],
    "entropy": ["Entropy", "nats per token", "number", "How undecided the policy is; a fall toward zero means that it has stopped exploring."],
    "length/mean": ["Length", "tokens", "tokens", "Mean tokens of a completion; growth without gold means that the reward pays for length."],
    "length/truncated": ["Cut at the limit", "% of completions", "share", "Completions that hit max_tokens without ending; a rise means that the limit is too short or that endings are being lost."],
    "groups/zero_std_high": ["Groups all high", "% of groups", "share", "Every completion of the prompt scores the same, high; too easy to teach anything."],
    "groups/zero_std_low": ["Groups all low", "% of groups", "share", "Every completion of the prompt scores the same, low; too hard to teach anything."],
    "groups/resampled": ["Extra rollouts", "per step", "tokens", "Rounds of sampling added in place of groups without a signal."],
    "diversity": ["Diversity", "% of a group", "share", "Distinct completions among those of one prompt; a fall means that the policy repeats itself."],
    "reward/failed": ["Failed scores", "completions", "tokens", "Completions that the reward could not score; they are left out of the step."],
    "ess": ["Effective sample size", "%", "share", "How much of the batch counts under the importance weights between sampler and trainer; 100 % where they agree."],
    "length/max": ["Longest completion", "tokens", "tokens", "Tokens of the longest completion of a step."],
    "epoch": ["Epoch", "passes", "number", "Passes over the training rows so far."],
    "pairs/accuracy": ["Pairs told apart", "% of pairs", "share", "Pairs whose chosen answer has the higher implicit reward; half of them is chance."],
    "reward/margin": ["Margin", "reward", "number", "Implicit reward of the chosen answer less that of the rejected one."],
    "reward/chosen": ["Implicit reward of chosen", "", "number", "Below zero, the right answers are less likely than under the reference."],
    "reward/rejected": ["Implicit reward of rejected", "", "number", "How far the rejected answers have moved from the reference; down is the purpose."],
    "logp/chosen": ["Log-prob of chosen", "nats / answer", "number", "If it falls along with that of the rejected ones, probability goes to answers that nobody compared."],
    "logp/rejected": ["Log-prob of rejected", "nats / answer", "number", "It should fall, while that of the chosen answers does not."],
    "tokens/trained": ["Trained tokens", "per step", "tokens", "Tokens that the loss is taken over in one step."],
    "loss": ["Loss", "", "number", "The stage's own objective: in SFT it should fall; in GRPO only sudden jumps mean anything."],
    "accuracy/token": ["Token accuracy", "% of tokens", "share", "Demonstration tokens that the model ranks first."],
    "grad_norm": ["Gradient norm", "before scaling down", "number", "Spikes come before trouble; a norm that is always above the limit asks for a lower learning rate."],
    "lr": ["Learning rate", "", "small", "The schedule as it was run, warm-up included."],
    "time/step": ["Time of a step", "seconds", "seconds", "Wall time of one optimiser step with its rollout."],
    "tokens/per_second": ["Throughput", "tokens per second", "rate", "Tokens sampled and trained on; a fall over the run follows growing completions."],
    "memory/peak": ["Peak memory", "GiB", "bytes", "The most memory held at once; steady growth is a leak."],
    "tokens/prompt": ["Prompt tokens", "per step", "tokens", "Tokens of prompts in one step."],
    "tokens/completion": ["Completion tokens", "per step", "tokens", "Tokens of completions in one step."],
  };
  function about(key) {
    if (METRICS[key]) return METRICS[key];
    if (key.startsWith("time/")) return [`Time: ${key.slice(5)}`, "seconds", "seconds", "Wall time of this phase in one step."];
    if (key.startsWith("reward/")) return [`Reward: ${key.slice(7)}`, "", "number", "Mean of this part of the reward."];
    return [key, "", "number", "As the run recorded it under this name."];
  }

  // -- header --------------------------------------------------------------------------------------------------------

  const statusClass = (s) => String(s).replace(/\W/g, "-");
  const METHOD = { sft: "SFT", grpo: "GRPO", ppo: "PPO", dpo: "DPO", reward_model: "reward model" };
  const method = (m) => String(m || "").split(" then ").map((x) => METHOD[x] || x).join(", then ");
  const has = (v) => v !== null && v !== undefined && v !== "";
  document.getElementById("title").textContent = MANY ? `${RUNS.length} runs side by side` : RUNS[0].name;
  {
    const f = RUNS[0].figures, parts = [];
    if (MANY) parts.push(RUNS.map((r) => r.name).join(", "));
    else {
      if (f.method) parts.push(method(f.method) + (f.model ? ` on ${f.model}` : ""));
      parts.push(h("span", { class: statusClass(f.status) }, f.status));
      if (has(f.seed)) parts.push(`seed ${f.seed}`);
      parts.push(`${amount(f.steps)} ${f.steps === 1 ? "step" : "steps"}`);
      if (isNum(f.seconds)) parts.push(seconds(f.seconds));
    }
    document.getElementById("subtitle").append(...parts.map((p) => h("span", null, p)));
  }

  const arrow = () => h("span", { class: "arrow", "aria-label": "to" }, "→");
  const fromTo = (a, b) => (has(a) || has(b) ? [fixed(a), arrow(), fixed(b)] : ["–"]);
  function keyFigures(run) {
    const f = run.figures, items = [];
    const item = (term, big, sub) => items.push(h("div", null, h("dt", null, term), h("dd", { class: "big" }, big), h("dd", { class: "sub" }, sub)));
    for (const [name, g] of Object.entries(f.gold || {})) if (g)
      item(`Gold: ${name}`, fromTo(g.first, g.last), has(g.best) ? `best ${fixed(g.best)} at step ${g.best_step}` : "");
    if (f.reward) item("Reward", fromTo(f.reward.first, f.reward.last), "first step to last");
    if (isNum(f.kl_ref)) item("KL to the reference", num(f.kl_ref), "nats per sequence, at the end");
    item("Steps", amount(f.steps), [isNum(f.seconds) && seconds(f.seconds), isNum(f.tokens) && `${amount(f.tokens)} tokens`].filter(Boolean).join(", "));
    return h("dl", { class: "figures" }, items);
  }

  function table(attrs, caption, head, rows) {
    return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      h("table", attrs, h("caption", null, caption),
        head && h("thead", null, h("tr", null, head.map((c) => h("th", { scope: "col" }, c)))),
        h("tbody", null, rows.map((row) => h("tr", null, row.map((c, i) => (i ? h("td", null, c) : h("th", { scope: "row" }, c))))))));
  }
  const runColor = (i) => `var(--c${i % 8})`;
  const runLabel = (run, i) => [h("span", { class: "swatch", color: runColor(i) }), run.name];

  if (!MANY) main.append(h("section", { id: "figures", "aria-label": "Key figures" }, keyFigures(RUNS[0])));
  else {
    const golds = [...new Set(RUNS.flatMap((r) => Object.keys(r.figures.gold || {})))];
    section("summary", "Summary", table({ id: "summary-table" }, "The runs' key figures, first to last.",
      ["Run", "Method", "Status", ...golds.map((g) => `Gold: ${g}`), "Reward", "KL to reference", "Steps", "Time", "Tokens", "Seed", "Model"],
      RUNS.map((r, i) => {
        const f = r.figures;
        return [runLabel(r, i), method(f.method), h("span", { class: statusClass(f.status) }, f.status),
          ...golds.map((g) => { const v = (f.gold || {})[g]; return v ? [...fromTo(v.first, v.last), h("div", { class: "sub" }, `best ${fixed(v.best)} at ${v.best_step}`)] : "–"; }),
          f.reward ? fromTo(f.reward.first, f.reward.last) : "–", num(f.kl_ref), amount(f.steps), seconds(f.seconds), amount(f.tokens), has(f.seed) ? f.seed : "–", f.model || "–"];
      })));
    for (const td of document.querySelectorAll("#summary-table td")) td.className = "num";
  }

  const notes = RUNS.flatMap((r) => r.notes.map((n) => (MANY ? `${r.name}: ${n}` : n)));
  if (notes.length) main.append(h("ul", { class: "notes", id: "notes", "aria-label": "Notes on the records" }, notes.map((n) => h("li", null, n))));

  if (RUNS.some((r) => r.findings)) section("findings", "Findings", RUNS.map((r, i) => r.findings && [
    MANY && h("h3", null, runLabel(r, i)),
    r.findings.length ? r.findings.map((f) => h("article", { class: "finding" },
      h("h3", null, h("span", { class: `tag ${statusClass(f.severity || "")}` }, f.severity || "finding"), " ", f.symptom || f.code, " ",
        h("span", { class: "muted" }, [f.code, has(f.step) && `step ${f.step}`].filter(Boolean).join(", "))),
      h("dl", null, ["cause", "fix"].flatMap((k) => (has(f[k]) ? [h("dt", null, k === "cause" ? "Likely cause" : "Fix"), h("dd", null, f[k])] : [])))))
      : h("p", null, "None: no check found anything wrong."),
  ]));

  // -- curves --------------------------------------------------------------------------------------------------------

  const charts = [];
  let smoothing = 1, zoom = null;
  const FULL = [Infinity, -Infinity];
  for (const r of RUNS) for (const s of [...r.metrics.step, ...r.evals.step]) { if (s < FULL[0]) FULL[0] = s; if (s > FULL[1]) FULL[1] = s; }
  const DRAWN = FULL[0] <= FULL[1];
  if (FULL[0] === FULL[1]) { FULL[0] -= 1; FULL[1] += 1; }

  // Exponential average with the bias of its start removed, begun anew at each stage; gaps stay gaps.
  function ema(xs, ys, span, run) {
    if (span <= 1) return ys;
    const keep = 1 - 2 / (span + 1), starts = new Set(run.stages.map((s) => s.first));
    let sum = 0, weight = 0;
    return ys.map((y, i) => {
      if (starts.has(xs[i])) sum = weight = 0;
      if (y === null) return null;
      sum = keep * sum + (1 - keep) * y; weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }
  // A metric of a run as [steps, values]: records without it are left out, values that are not finite are null (a gap).
  function column(run, key, source = "metrics") {
    const t = run[source], ys = t[key];
    if (!ys) return null;
    const X = [], Y = [];
    for (let i = 0; i < ys.length; i++) if (ys[i] !== null) { X.push(t.step[i]); Y.push(isNum(ys[i]) ? ys[i] : null); }
    return Y.some((y) => y !== null) ? [X, Y] : null;
  }
  // Measurements on held-out prompts, one entry per stage: the end of a stage and the start of the next share a step.
  function evalPoints(run, key) {
    const t = run.evals, ys = t[key] || [], stages = new Map();
    ys.forEach((y, i) => {
      if (!isNum(y)) return;
      const stage = t.stage ? t.stage[i] : 0;
      if (!stages.has(stage)) stages.set(stage, { x: [], y: [], low: [], high: [] });
      const s = stages.get(stage), end = (e) => { const c = t[`${key}/${e}`]; return c && isNum(c[i]) ? c[i] : null; };
      s.x.push(t.step[i]); s.y.push(y); s.low.push(end("low")); s.high.push(end("high"));
    });
    return [...stages.values()];
  }
  const goldNames = (run) => Object.keys(run.evals).filter((k) => k.startsWith("gold/") && !(/\/(low|high)$/.test(k) && run.evals[k.replace(/\/(low|high)$/, "")])).map((k) => k.slice(5));

  function axisText(kind, vals) {
    const step = vals.length > 1 ? Math.abs(vals[1] - vals[0]) : Math.abs(vals[0]) || 1, top = Math.max(...vals.map(Math.abs));
    return vals.map((v) => {
      if (!isNum(v)) return "";
      const minus = (s) => s.replace("-", "−");
      if (kind === "share") return minus(trim((100 * v).toFixed(step < 0.01 ? 2 : 0))) + " %";
      if (kind === "bytes") return num(v / 2 ** 30);
      if (v === 0) return "0";
      if (top >= 1e4) return minus(top >= 1e6 ? trim((v / 1e6).toFixed(2)) + "M" : trim((v / 1e3).toFixed(1)) + "k");
      if (top < 1e-3) return minus(v.toExponential(1).replace(".0e", "e"));
      return minus(v.toFixed((trim(step.toFixed(6)).split(".")[1] || "").length));
    });
  }

  const WHOLE = [1, 2, 5, 10, 20, 25].concat(...[100, 1e3, 1e4, 1e5, 1e6, 1e7].map((d) => [d / 2, d, 2 * d, 2.5 * d]));
  const BINARY = Array.from({ length: 40 }, (_, i) => 2 ** (i + 10));
  const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
  function axes(kind, color, right) {
    const base = { stroke: () => css("--muted"), font: FONT, ticks: { show: false }, border: { show: false } };
    return [
      { ...base, grid: { show: false }, size: 26, gap: 4, values: (u, v) => v.map((x) => (Number.isInteger(x) ? x.toLocaleString("en-US") : x)), incrs: WHOLE },
      { ...base, stroke: () => (color ? css(color) : css("--muted")), grid: { stroke: () => css("--grid"), width: 1 }, size: (u, texts) => Math.max(46, 10 + 6.2 * Math.max(0, ...(texts || []).map((t) => t.length))), gap: 4, space: 32, values: (u, v) => axisText(kind, v), ...(kind === "bytes" ? { incrs: BINARY } : {}) },
      ...(right ? [{ ...base, scale: "y2", side: 1, stroke: () => css(right.color), grid: { show: false }, size: 46, gap: 4, space: 32, values: (u, v) => axisText(right.kind, v) }] : []),
    ];
  }
  function yRange(kind) {
    return (u, lo, hi) => {
      if (!isNum(lo) || !isNum(hi)) return [0, 1];
      if (kind === "share") return [0, hi <= 0 ? 0.05 : Math.min(Math.max(1, hi), hi * 1.1)];
      if (lo === 0 && hi === 0) return [0, 1];
      if (kind === "small") return [lo < 0 ? lo * 1.1 : 0, Math.max(0, hi * 1.1)];
      if (kind === "number") return uPlot.rangeNum(lo, hi, 0.08, true);
      return [0, hi > 0 ? hi * 1.1 : 1];
    };
  }
  const DASH = [[], [6, 4], [2, 3], [9, 3, 2, 3]];

  const EXACT = new Set(["lr", "memory/peak", "epoch"]);  // no noise to smooth
  // One line of a chart: a metric of a run, drawn twice where it is smoothed (as recorded, faintly, and its average).
  const line = (run, i, key, label, color, more = {}) => ({ run, label, color, key, table: column(run, key), kind: about(key)[2], dash: DASH[Math.floor(MANY ? i / 8 : 0) % 4], ...more });

  class Chart {
    constructor(grid, spec) {
      Object.assign(this, spec);
      this.hidden = new Set();
      this.plot = h("div", { class: "plot", role: "img", "aria-label": this.describe() });
      this.legend = h("ul", { class: "legend", "aria-label": "Lines of this chart; press one to hide it" });
      this.el = h("figure", { class: `chart ${this.size || ""}`, "data-chart": this.id },
        h("h4", null, this.title, this.unit && h("span", { class: "unit" }, this.unit)), this.legend, this.plot, h("figcaption", null, this.caption));
      grid.append(this.el);
      this.makeLegend();
      charts.push(this);
    }
    describe() {
      const lines = this.lines.filter((l) => l.table || l.gold).slice(0, 6).map((l) => {
        const ys = (l.gold ? l.gold.flatMap((g) => g.y) : l.table[1]).filter(isNum), f = KIND[l.kind];
        return `${l.label}: first ${f(ys[0])}, last ${f(ys[ys.length - 1])}, lowest ${f(ys.reduce((a, b) => Math.min(a, b)))}, highest ${f(ys.reduce((a, b) => Math.max(a, b)))}`;
      });
      return `Chart of ${this.title}${this.unit ? ` (${this.unit})` : ""} over ${this.x || "steps"}. ${lines.join("; ")}.`;
    }
    makeLegend() {
      this.when = h("span", { class: "when" });
      const alone = this.lines.length === 1 && !MANY && this.id !== "reward";  // the title says it already
      this.legend.append(...this.lines.map((l) => {
        const mark = h("span", { class: "line" });
        mark.style.borderTopColor = mark.style.color = `var(${l.color})`;
        if (l.dash && l.dash.length) mark.style.borderTopStyle = l.dash.length === 2 && l.dash[0] < 3 ? "dotted" : "dashed";
        if (l.thin) mark.style.borderTopWidth = "1px";
        if (l.path && !l.ends) Object.assign(mark.style, { borderTopStyle: "dotted", borderTopWidth: "3px" });
        if (l.gold || l.ends) mark.classList.add("dotted");
        l.value = h("span", { class: "value" });
        const button = h("button", { type: "button", "aria-pressed": "true", onclick: () => {
          const off = !this.hidden.delete(l);
          if (off) this.hidden.add(l);
          button.setAttribute("aria-pressed", String(!off));
          this.u.batch(() => l.at.forEach((s) => this.u.setSeries(s, { show: !off })));
          this.u.redraw();
        } }, mark, alone ? h("span", { class: "only-read" }, l.label) : l.label, l.value);
        return h("li", null, button);
      }), h("li", null, this.when));
    }
    // The joined columns; `this.series` is filled once, in the same order.
    data() {
      const tables = [], series = [];
      const put = (l, xs, ys, options) => { tables.push([xs, ys]); series.push({ l, options }); };
      for (const l of this.lines) {
        const color = () => css(l.color);
        if (l.gold) for (const g of l.gold) {
          for (const end of ["low", "high"]) if (g[end].some(isNum)) put(l, g.x, g[end], { scale: l.scale, paths: () => null, points: { show: false }, range: true });
          put(l, g.x, g.y, { scale: l.scale, stroke: color, width: 2, dash: l.dash, points: { show: true, size: 5, fill: color, stroke: color }, main: true });
        } else {
          const [X, Y] = l.table, smooth = EXACT.has(l.key) ? Y : ema(X, Y, smoothing, l.run), sparse = Y.length < 40;
          const gaps = (u, s, i0, i1, nulls) => {
            const extra = l.run.stages.slice(1).map((stage, j) => [u.valToPos(l.run.stages[j].last, "x", true), u.valToPos(stage.first, "x", true)]);
            return nulls.concat(extra.map(([a, b]) => [Math.round(a), Math.round(b) + 1])).sort((a, b) => a[0] - b[0]);
          };
          const common = { scale: l.scale, dash: l.dash, gaps, points: sparse ? { size: 4, fill: color } : { show: false } };
          put(l, X, Y, { ...common, stroke: color, width: 1, alpha: l.thin ? 0.1 : MANY ? 0.18 : 0.28, points: { show: false }, range: true });
          put(l, X, smooth, { ...common, stroke: color, width: l.thin ? 1 : 1.75, alpha: l.thin ? 0.75 : 1, main: true });
        }
      }
      return [uPlot.join(tables), series];
    }
    options(series, width) {
      this.lines.forEach((l) => { l.at = []; l.main = []; });
      series.forEach(({ l, options }, i) => { l.at.push(i + 1); if (options.main) l.main.push(i + 1); });
      const right = this.lines.find((l) => l.scale === "y2");
      return {
        width, height: this.height(), padding: [8, right ? 0 : 10, 0, 0], legend: { show: false },
        scales: { x: { time: false, range: () => zoom || FULL }, y: { range: this.range || yRange(this.kind) }, ...(right ? { y2: { range: yRange("number") } } : {}) },
        axes: axes(this.kind, right && !MANY ? this.lines.find((l) => l.scale !== "y2").color : null, right && { color: MANY ? "--muted" : right.color, kind: right.kind }),
        series: [{}, ...series.map(({ l, options: { main, range, ...o } }) => ({ ...o, scale: o.scale || "y", show: !this.hidden.has(l), spanGaps: false }))],
        cursor: {
          y: false, drag: { x: true, y: false, setScale: false, dist: 5 }, bind: { dblclick: () => () => { setZoom(null); return null; } },
          points: { size: 6, width: 0, show: (u, s) => series[s - 1].options.main && dot(), fill: (u, s) => css(series[s - 1].l.color) },
          sync: { key: "steps", scales: ["x", null], setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        },
        hooks: {
          setCursor: [() => this.showValues()], ready: [(u) => touch(u)], drawAxes: [(u) => this.underlay(u)], draw: [(u) => this.overlay(u)],
          setSelect: [(u) => { if (u.select.width > 0) {
            const a = u.posToVal(u.select.left, "x"), b = u.posToVal(u.select.left + u.select.width, "x");
            u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
            setZoom([a, b]);
          } }],
        },
      };
    }
    height() { const phone = innerWidth < 500; return this.size === "half" ? (phone ? 230 : 290) : phone ? 170 : 180; }
    draw() {
      if (this.u) this.u.destroy();
      const [data, series] = this.data();
      this.u = new uPlot(this.options(series, Math.max(120, this.plot.clientWidth)), data, this.plot);
      this.showValues();
    }
    refresh() { this.u.setData(this.data()[0], false); this.u.redraw(true); this.showValues(); }
    rezoom() { this.u.setScale("x", { min: (zoom || FULL)[0], max: (zoom || FULL)[1] }); }
    showValues() {
      const u = this.u;
      if (!u || !u.data[0].length) return;
      const shown = u.series[0].idxs, idx = u.cursor.idx, at = isNum(idx) ? idx : shown ? shown[1] : u.data[0].length - 1;
      this.when.textContent = isNum(idx) ? `step ${u.data[0][at].toLocaleString("en-US")}` : "";
      for (const l of this.lines) {
        let best = -1, s = 0;  // the last value at or before the cursor
        for (const k of l.main) { let i = at; while (i >= 0 && !isNum(u.data[k][i])) i--; if (i > best) { best = i; s = k; } }
        l.value.textContent = best < 0 ? "–" : this.valueText(l, s, best);
        if (best >= 0 && best !== at && isNum(idx)) l.value.append(h("span", { class: "at" }, ` at ${u.data[0][best]}`));
      }
    }
    valueText(l, s, i) { return KIND[l.kind](this.u.data[s][i]); }
    clip(u, fn, margin = 0) {
      const c = u.ctx, b = u.bbox, px = uPlot.pxRatio || devicePixelRatio || 1, m = margin * px;
      c.save(); c.beginPath(); c.rect(b.left - m, b.top - m, b.width + 2 * m, b.height + 2 * m); c.clip(); fn(c, px); c.restore();
    }
    // Under the lines: where a stage begins, and the gold's 95 % interval as a band.
    underlay(u) {
      this.clip(u, (c, px) => {
        if (!MANY) for (const s of RUNS[0].stages.length > 1 ? RUNS[0].stages : []) {
          const begins = s === RUNS[0].stages[0], x = begins ? u.bbox.left : u.valToPos(s.first - 0.5, "x", true);
          c.strokeStyle = css("--muted"); c.globalAlpha = 0.5; c.lineWidth = px; c.setLineDash([3 * px, 3 * px]);
          if (!begins) { c.beginPath(); c.moveTo(x, u.bbox.top); c.lineTo(x, u.bbox.top + u.bbox.height); c.stroke(); }
          c.setLineDash([]); c.globalAlpha = 1;
          if (this.size) { c.fillStyle = css("--muted"); c.font = FONT.replace("11px", `${11 * px}px`); c.textAlign = "left"; c.textBaseline = "top"; c.fillText(METHOD[s.method] || s.method || `stage ${s.stage}`, x + 4 * px, u.bbox.top + 2 * px); }
        }
        for (const l of this.lines) if (l.gold && !this.hidden.has(l)) for (const g of l.gold) {
          const k = g.x.map((_, i) => i).filter((i) => isNum(g.low[i]) && isNum(g.high[i])), X = (i) => u.valToPos(g.x[i], "x", true), Y = (v) => u.valToPos(v, l.scale || "y", true);
          c.fillStyle = css(l.color); c.globalAlpha = MANY ? 0.08 : 0.14;
          c.beginPath(); k.forEach((i) => c.lineTo(X(i), Y(g.high[i]))); k.reverse().forEach((i) => c.lineTo(X(i), Y(g.low[i]))); c.closePath(); c.fill();
          c.globalAlpha = MANY ? 0.25 : 0.45; c.strokeStyle = css(l.color); c.lineWidth = px;
          if (k.length < 2 || u.bbox.width / k.length > 8 * px) k.forEach((i) => { c.beginPath(); c.moveTo(X(i), Y(g.low[i])); c.lineTo(X(i), Y(g.high[i])); c.stroke(); });
          c.globalAlpha = 1;
        }
      });
    }
    // Over the lines: a ring at the best gold.
    overlay(u) {
      if (this.id !== "reward") return;
      this.clip(u, (c, px) => {
        for (const l of this.lines) {
          const best = l.best;
          if (!best || this.hidden.has(l) || !isNum(best.best)) continue;
          c.strokeStyle = css(l.color); c.lineWidth = 1.5 * px; c.beginPath();
          c.arc(u.valToPos(best.best_step, "x", true), u.valToPos(best.best, l.scale || "y", true), 6.5 * px, 0, 2 * Math.PI); c.stroke();
        }
      }, 8);
    }
  }

  // Where the time goes: shares of a step, stacked.
  class Stack extends Chart {
    data() {
      const X = RUNS[0].metrics.step, n = X.length;
      const cols = this.lines.map((l) => ema(X, l.seconds, smoothing, RUNS[0]));
      const sum = X.map((_, i) => cols.reduce((a, c) => a + c[i], 0)), run = new Array(n).fill(0);
      this.cols = cols; this.sum = sum;
      const stacked = cols.map((c) => c.map((v, i) => (run[i] += sum[i] ? v / sum[i] : 0)));
      const series = this.lines.map((l) => ({ l, options: { stroke: () => css("--bg"), width: 1, fill: () => mix(css(l.color), css("--bg"), 0.72), points: { show: false }, main: true } }));
      return [[X, ...stacked.reverse()], series.reverse()];
    }
    makeLegend() { super.makeLegend(); for (const b of this.legend.querySelectorAll("button")) { b.disabled = true; b.removeAttribute("aria-pressed"); } }
    valueText(l, s, i) { const v = this.cols[this.lines.indexOf(l)][i]; return percent(this.sum[i] ? v / this.sum[i] : 0) + (isNum(this.u.cursor.idx) ? `, ${seconds(v)}` : ""); }
    describe() {
      const total = this.lines.map((l) => l.seconds.reduce((a, b) => a + b, 0)), all = total.reduce((a, b) => a + b, 0);
      return `Chart of ${this.title} over steps. Over the whole run: ${this.lines.map((l, i) => `${l.label} ${percent(total[i] / all)}`).join("; ")}.`;
    }
  }
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const mix = (a, b, t) => { const A = rgb(a), B = rgb(b); return `rgb(${A.map((v, i) => Math.round(v * t + B[i] * (1 - t)))})`; };

  // Reward and gold over √KL: paths in the order of the steps, so drawn here; uPlot has the scales, axes and cursor.
  class Frontier extends Chart {
    data() {
      const tables = [], series = [];
      for (const l of this.lines) {
        const put = (ys, main) => { tables.push([l.path.map((p) => p[1]), ys]); series.push({ l, options: { scale: l.scale, paths: () => null, points: { show: false }, main } }); };
        put(l.path.map((p) => p[2]), true);
        if (l.ends) { put(l.path.map((p) => p[3]), false); put(l.path.map((p) => p[4]), false); }
      }
      return [uPlot.join(tables), series];
    }
    options(series, width) {
      const o = super.options(series, width), hi = Math.max(...this.lines.flatMap((l) => l.path.map((p) => p[1])));
      o.scales.x.range = (u, a, b) => (this.zoomX ? this.zoomX : [0, hi > 0 ? hi * 1.03 : 1]);
      o.axes[0].incrs = undefined; o.axes[0].values = (u, v) => axisText("number", v);
      o.cursor.sync = undefined;
      // the join keeps one value where two points share a distance: the scales come from the paths
      for (const k of ["y", "y2"]) if (o.scales[k]) {
        const ys = this.lines.filter((l) => (l.scale || "y") === k).flatMap((l) => l.path.flatMap((p) => p.slice(2))).filter(isNum);
        o.scales[k].range = () => uPlot.rangeNum(Math.min(...ys), Math.max(...ys), 0.08, true);
      }
      o.cursor.bind.dblclick = () => () => { this.zoomX = null; this.u.setScale("x", { min: 0, max: 1 }); return null; };
      o.hooks.setSelect = [(u) => { if (u.select.width > 0) {
        this.zoomX = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
        u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        u.setScale("x", { min: this.zoomX[0], max: this.zoomX[1] });
      } }];
      return o;
    }
    refresh() {}
    rezoom() {}
    underlay() {}
    overlay(u) {
      this.clip(u, (c, px) => {
        for (const l of this.lines) {
          if (this.hidden.has(l)) continue;
          const X = (p) => u.valToPos(p[1], "x", true), Y = (v) => u.valToPos(v, l.scale || "y", true);
          const dot = (p, r) => { c.beginPath(); c.arc(X(p), Y(p[2]), r * px, 0, 2 * Math.PI); c.fill(); };
          c.strokeStyle = c.fillStyle = css(l.color); c.lineJoin = "round";
          if (!l.ends) { c.globalAlpha = MANY ? 0.35 : 0.6; l.path.forEach((p) => dot(p, MANY ? 1.5 : 2)); c.globalAlpha = 1; continue; }
          c.globalAlpha = MANY ? 0.2 : 0.4; c.lineWidth = px;
          for (const p of l.path) if (isNum(p[3]) && isNum(p[4])) { c.beginPath(); c.moveTo(X(p), Y(p[3])); c.lineTo(X(p), Y(p[4])); c.stroke(); }
          c.globalAlpha = 1; c.lineWidth = 1.75 * px;
          c.beginPath(); l.path.forEach((p) => c.lineTo(X(p), Y(p[2]))); c.stroke();
          const last = l.path[l.path.length - 1];
          l.path.forEach((p) => dot(p, p === last ? 4.5 : 2.5));
          if (!MANY) {
            c.font = FONT.replace("11px", `${11 * px}px`); c.textBaseline = "top"; c.textAlign = "right";
            c.strokeStyle = css("--bg"); c.lineWidth = 3 * px; c.globalAlpha = 1;
            const at = [X(last) + 4 * px, Math.min(Math.max(Y(last[2]), Y(isNum(last[3]) ? last[3] : last[2])) + 7 * px, u.bbox.top + u.bbox.height - 14 * px)];
            c.strokeText(`step ${last[0]}`, ...at); c.fillText(`step ${last[0]}`, ...at);
          }
          c.globalAlpha = 1;
        }
      });
    }
    showValues() {
      const u = this.u, idx = u && u.cursor.idx;
      if (!u) return;
      this.when.textContent = isNum(idx) ? `√KL ${num(u.data[0][idx])}` : "";
      for (const l of this.lines) {
        const p = isNum(idx) ? l.path.reduce((a, b) => (Math.abs(b[1] - u.data[0][idx]) < Math.abs(a[1] - u.data[0][idx]) ? b : a)) : l.path[l.path.length - 1];
        l.value.textContent = fixed(p[2]);
        if (isNum(idx)) l.value.append(h("span", { class: "at" }, ` at step ${p[0]}`));
      }
    }
    describe() {
      return `Chart of ${this.title}. ` + this.lines.map((l) => { const a = l.path[0], b = l.path[l.path.length - 1]; return `${l.label}: from ${fixed(a[2])} at √KL ${num(a[1])} to ${fixed(b[2])} at √KL ${num(b[1])}`; }).join("; ") + ".";
    }
  }

  function dot() {
    const el = h("div");
    Object.assign(el.style, { width: "6px", height: "6px", marginLeft: "-3px", marginTop: "-3px" });
    return el;
  }
  // A finger on a chart moves the crosshair; up and down still scrolls the page.
  function touch(u) {
    const move = (e) => { const t = e.touches[0], r = u.over.getBoundingClientRect(); u.setCursor({ left: t.clientX - r.left, top: t.clientY - r.top }, true, true); };
    u.over.addEventListener("touchstart", move, { passive: true });
    u.over.addEventListener("touchmove", move, { passive: true });
  }
  function setZoom(range) {
    zoom = range;
    reset.hidden = !range;
    stageButtons.forEach(([b, s]) => b.setAttribute("aria-pressed", String(Boolean(range && s && range[0] === s.first && range[1] === s.last) || (!range && !s))));
    charts.forEach((c) => c.rezoom());
  }

  let reset, stageButtons = [];
  if (DRAWN) {
    const root = section("curves", "Curves");
    const longest = Math.max(...RUNS.map((r) => r.metrics.step.length));
    const SPANS = [1, 3, 5, 10, 20, 50, 100, 200, 500].filter((s) => s === 1 || s <= longest / 4);
    let at = longest < 60 ? 0 : Math.max(0, SPANS.findLastIndex((s) => s <= longest / 40));
    smoothing = SPANS[at];
    const readout = h("output", { for: "smooth" });
    const say = () => { readout.textContent = smoothing === 1 ? "none" : `over ${smoothing} steps`; };
    const slider = h("input", { type: "range", id: "smooth", min: 0, max: SPANS.length - 1, step: 1, value: at, oninput: () => {
      smoothing = SPANS[Number(slider.value)]; say(); slider.setAttribute("aria-valuetext", readout.textContent);
      cancelAnimationFrame(slider.frame); slider.frame = requestAnimationFrame(() => charts.forEach((c) => c.refresh()));
    } });
    say();
    reset = h("button", { type: "button", class: "button", id: "reset-zoom", hidden: true, onclick: () => setZoom(null) }, "Show all steps");
    const stages = !MANY && RUNS[0].stages.length > 1 ? RUNS[0].stages : [];
    stageButtons = (stages.length ? [null, ...stages] : []).map((s) => [h("button", { type: "button", class: "button", "aria-pressed": String(!s), onclick: () => setZoom(s && [s.first, s.last]) },
      s ? `${METHOD[s.method] || s.method || "stage " + s.stage}, ${s.first}–${s.last}` : "All stages"), s]);
    root.append(h("div", { class: "controls sticky" },
      SPANS.length > 1 && h("span", null, h("label", { for: "smooth" }, "Smoothing"), slider, readout),
      stageButtons.length > 0 && h("span", { class: "stages" }, stageButtons.map(([b]) => b)), reset,
      h("span", { class: "muted mouse" }, "Drag over a chart to zoom in, double-click to zoom out."), h("span", { class: "muted finger" }, "Touch a chart to read its values.")));

    const keys = new Set(RUNS.flatMap((r) => Object.keys(r.metrics).filter((k) => column(r, k))));
    keys.delete("step"); keys.delete("stage");
    const used = new Set();
    let grid;
    function group(title, cls, fill) {
      const el = h("div", { class: "group" }, h("h3", null, title), (grid = h("div", { class: `grid ${cls}` })));
      root.append(el); fill(); if (!grid.children.length) el.remove();
    }
    const color = (i) => `--c${i % 8}`;
    // One metric of every run, or several metrics of the one run, in one chart.
    function chart(...names) {
      names = names.filter((k) => keys.has(k) && !used.has(k));
      if (MANY && names.length > 1) return names.forEach((k) => chart(k));
      if (!names.length) return;
      names.forEach((k) => used.add(k));
      const [title, unit, kind, caption] = about(names[0]);
      const lines = MANY ? RUNS.map((r, i) => line(r, i, names[0], r.name, color(i))) : names.map((k, j) => line(RUNS[0], 0, k, about(k)[0], color([0, 3, 2, 4, 5, 6, 7, 1][j % 8])));
      return { id: names[0], title, unit, kind, caption, lines: lines.filter((l) => l.table) };
    }
    const relabel = (spec, name) => { if (spec && !MANY) spec.lines.forEach((l) => { l.label = name(l.key); }); return spec; };
    const add = (spec, more) => spec && new Chart(grid, { ...spec, ...more });
    const heldOut = (spec, key) => {  // a measurement's own length beside the training samples'
      if (!spec || MANY) return spec;
      const gold = evalPoints(RUNS[0], key);
      if (gold.length) { spec.lines[0].label = "training samples"; spec.lines.push({ run: RUNS[0], label: "held-out (gold)", color: "--c1", kind: spec.kind, dash: [], gold }); }
      return spec;
    };

    group("Reward and gold", "hero", () => {
      const lines = [], extent = { r: [Infinity, -Infinity], g: [Infinity, -Infinity] };
      const grow = (e, ys) => ys.forEach((v) => { if (isNum(v)) { e[0] = Math.min(e[0], v); e[1] = Math.max(e[1], v); } });
      RUNS.forEach((r, i) => {
        if (column(r, "reward/mean")) { lines.push(line(r, i, "reward/mean", MANY ? `${r.name}, reward` : "reward", MANY ? color(i) : "--c0", { thin: MANY })); grow(extent.r, lines[lines.length - 1].table[1]); }
        goldNames(r).forEach((g, j) => {
          const gold = evalPoints(r, "gold/" + g);
          if (!gold.length) return;
          lines.push({ run: r, label: MANY ? `${r.name}, gold ${g}` : `gold: ${g}`, color: MANY ? color(i) : color(j ? j + 1 : 1), dash: MANY ? DASH[j ? 1 : 0] : [], kind: "number", gold, best: (r.figures.gold || {})[g], isGold: true });
          gold.forEach((s) => [s.y, s.low, s.high].forEach((c) => grow(extent.g, c)));
        });
      });
      used.add("reward/mean");
      const golds = lines.some((l) => l.isGold), rewards = lines.some((l) => !l.isGold);
      const all = [Math.min(extent.r[0], extent.g[0]), Math.max(extent.r[1], extent.g[1])], size = (e) => e[1] - e[0];
      const two = golds && rewards && !(all[0] >= -0.01 && all[1] <= 1.01) && size(all) > 3 * Math.min(size(extent.r), size(extent.g));
      if (two) lines.forEach((l) => { if (l.isGold) l.scale = "y2"; });
      const scaleNote = two ? " The gold has its own scale, on the right." : "";
      if (lines.length) new Chart(grid, { id: "reward", size: "half", kind: "number", lines,
        title: golds && rewards ? "Reward and gold" : golds ? "Gold" : "Reward", unit: "by step",
        caption: (golds && rewards ? "The reward is trained on; the gold is measured on held-out prompts, with its 95 % interval. When the reward climbs and the gold does not, the reward is being gamed."
          : golds ? "The second measure, on held-out prompts, with its 95 % interval." : "Mean reward of each step's completions; without a gold nothing here says whether the model got better.") + (golds ? " A ring marks the best." : "") + scaleNote });
      const paths = [];
      RUNS.forEach((r, i) => r.frontier.forEach((f) => {
        const tag = (MANY ? `${r.name}, ` : "") + (r.frontier.length > 1 ? `stage ${f.stage}, ` : "");
        paths.push({ label: tag + "reward", kind: "number", color: MANY ? color(i) : "--c0", dash: [], thin: MANY, path: f.proxy });
        Object.entries(f.gold).forEach(([g, p], j) => paths.push({ label: `${tag}gold${MANY ? " " : ": "}${g}`, color: MANY ? color(i) : color(j ? j + 1 : 1), dash: [], path: p, ends: true, scale: two ? "y2" : undefined, kind: "number" }));
      }));
      if (paths.length) new Frontier(grid, { id: "frontier", size: "half", kind: "number", lines: paths, x: "the square root of the KL", title: "Reward and gold over distance", unit: "by √KL to the reference",
        caption: `Distance in √nats per sequence. A gold that bends down while the reward goes on rising shows where to stop.${scaleNote}` });
    });
    group("Reward in detail", "", () => {
      const parts = [...keys].filter((k) => k.startsWith("reward/") && !["reward/mean", "reward/std", "reward/failed"].includes(k));
      if (parts.length === 1 && RUNS.every((r) => String(r.metrics[parts[0]]) === String(r.metrics["reward/mean"]))) used.add(parts.pop());
      if (MANY) parts.forEach((k) => add(chart(k)));
      else if (parts.length) add(relabel(chart(...parts), (k) => k.slice(7)), { title: "Parts of the reward", unit: "", caption: "Mean of each part; see which one a rise comes from." });
      add(chart("reward/std"));
      if (RUNS.some((r) => (r.metrics["reward/failed"] || []).some((v) => v > 0))) add(chart("reward/failed"));
      if (MANY) { add(chart("groups/zero_std_high")); add(chart("groups/zero_std_low")); }
      else add(relabel(chart("groups/zero_std_high", "groups/zero_std_low"), (k) => (k.endsWith("high") ? "all high" : "all low")), { id: "groups/zero_std", title: "Groups without a signal", unit: "% of groups", caption: "Groups whose completions all score the same teach nothing: all high is too easy, all low too hard." });
    });
    group("Distance from the start", "", () => {
      add(relabel(chart("kl/ref", "kl/ref_k1"), (k) => (k === "kl/ref" ? (keys.has("kl/ref_k1") ? "k3" : "KL to the reference") : "k1")));
      ["kl/update", "kl/sampler", "clip/fraction"].forEach((k) => add(chart(k)));
    });
    group("Samples", "", () => {
      add(chart("entropy"));
      add(heldOut(chart("length/mean"), "length/mean"));
      add(heldOut(chart("length/truncated"), "length/truncated"));
      add(chart("diversity"));
    });
    group("Optimiser", "", () => ["loss", "accuracy/token", "grad_norm", "lr"].forEach((k) => add(chart(k))));
    group("Time and memory", "", () => {
      const phases = [...keys].filter((k) => k.startsWith("time/") && k !== "time/step");
      if (MANY) phases.forEach((k) => add(chart(k)));
      else if (phases.length) {
        const t = RUNS[0].metrics, at = (k, i) => (t[k] && isNum(t[k][i]) ? t[k][i] : 0);
        const rest = t.step.map((_, i) => Math.max(0, at("time/step", i) - phases.reduce((a, k) => a + at(k, i), 0)));
        const lines = phases.map((k, j) => ({ run: RUNS[0], label: k.slice(5), color: color([0, 1, 2, 3, 4, 5, 6][j % 7]), dash: [], seconds: t.step.map((_, i) => at(k, i)) }));
        const sum = (c) => c.reduce((a, b) => a + b, 0);
        if (sum(rest) > 0.005 * lines.reduce((a, l) => a + sum(l.seconds), 0)) lines.push({ run: RUNS[0], label: "other", color: "--c7", dash: [], seconds: rest });
        phases.forEach((k) => used.add(k));
        new Stack(grid, { id: "time", title: "Where the time goes", unit: "% of a step", kind: "share", range: () => [0, 1], lines, caption: "Share of each phase in a step's wall time; the largest is the one worth making faster." });
      }
      ["time/step", "tokens/per_second", "memory/peak"].forEach((k) => add(chart(k)));
    });
    const rest = [...keys].filter((k) => !used.has(k));
    group("Other measures", "", () => rest.forEach((k) => add(chart(k))));
    charts.forEach((c) => c.draw());

    const widths = new Map();
    const observer = new ResizeObserver(() => charts.forEach((c) => {
      const w = c.plot.clientWidth;
      if (w && widths.get(c) !== w) { widths.set(c, w); c.u.setSize({ width: w, height: c.height() }); }
    }));
    charts.forEach((c) => { widths.set(c, c.plot.clientWidth); observer.observe(c.plot); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((c) => c.draw()));
  } else main.append(h("p", { class: "empty", id: "no-metrics" }, "No step and no gold measurement has been recorded yet, so there is nothing to draw. Make the report again once the run has taken a step."));

  // -- completions ---------------------------------------------------------------------------------------------------

  // Characters that are invisible or turn text around are shown by their code.
  const CONTROL = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|\p{Cs})/u;
  const visible = (text) => text.split(CONTROL).map((s, i) => (i % 2 ? h("span", { class: "ctl" }, "U+" + s.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")) : s));
  const clipped = (t) => (typeof t === "string" ? visible(t) : [...visible(t.head), h("span", { class: "gap" }, `${t.cut.toLocaleString("en-US")} characters left out`), ...visible(t.tail)]);
  const plain = (t) => (typeof t === "string" ? t : Array.isArray(t) ? t.map((m) => plain(m[1])).join("\n") : t.head + t.tail);
  function block(index, cls, label) {
    const t = D.texts[index], el = h("div", { class: `text-block ${cls}`, dir: "auto", role: "group", "aria-label": label });
    if (Array.isArray(t)) t.forEach(([role, text], i) => el.append(t.length > 1 || role !== "user" ? h("span", { class: "role" }, role) : "", ...clipped(text), i < t.length - 1 ? "\n" : ""));
    else el.append(...(plain(t) === "" ? [h("span", { class: "gap" }, "empty")] : clipped(t)));
    const text = plain(t);
    if (text.length < 700 && text.split("\n").length < 12) return el;
    el.classList.add("clamp");
    const more = h("button", { type: "button", class: "linkish", "aria-expanded": "false", onclick: () => { const open = !el.classList.toggle("clamp"); more.textContent = open ? "Show less" : "Show all"; more.setAttribute("aria-expanded", String(open)); } }, "Show all");
    return h("div", null, el, more);
  }

  const sampled = RUNS.map((r, i) => [r, i]).filter(([r]) => r.rollouts.steps.length);
  if (sampled.length) {
    const PAGE = 12;
    let shown = PAGE, matches = [];
    const field = (label, cls, ...inputs) => h("label", { class: cls }, label, ...inputs);
    const select = (id, options) => h("select", { id, onchange: () => update(true) }, options.map(([v, t]) => h("option", { value: v }, t)));
    const runs = select("f-run", sampled.map(([r, i]) => [i, r.name])), step = select("f-step", []), stop = select("f-stop", []);
    const kind = select("f-kind", [["", "all"], ["train", "training"], ["gold", "held-out (gold)"]]);
    const sort = select("f-sort", [["order", "as recorded"], ["reward-", "reward, high first"], ["reward+", "reward, low first"], ["tokens-", "length, long first"], ["tokens+", "length, short first"], ["advantage-", "advantage, high first"], ["advantage+", "advantage, low first"]]);
    const text = h("input", { type: "search", id: "f-text", placeholder: "in prompt or completion", oninput: () => update(true) });
    const bound = (id, label) => h("input", { type: "number", id, step: "any", placeholder: label, "aria-label": `Reward, ${label}`, oninput: () => update(true) });
    const low = bound("f-low", "from"), high = bound("f-high", "to");
    const count = h("p", { class: "count", id: "f-count", role: "status" }), kept = h("p", { class: "muted kept" }), list = h("div", { id: "samples" });
    const more = h("button", { type: "button", class: "button", onclick: () => { shown += PAGE; update(false); } }, "Show more");
    section("completions", "Completions",
      h("div", { class: "filters", role: "search", "aria-label": "Filter completions" },
        sampled.length > 1 && field("Run", "", runs), field("Step", "", step), field("Kind", "", kind), field("Stop reason", "", stop),
        h("label", { class: "" }, "Reward", h("span", { class: "range" }, low, high)), field("Sort by", "", sort), field("Text", "text", text)),
      count, kept, list, more);
    const run = () => RUNS[Number(runs.value) || 0];
    function fillSteps() {
      const s = run().rollouts.steps;
      step.replaceChildren(h("option", { value: "all" }, "all kept steps"), ...[...new Set(s.map((x) => x.step))].reverse().map((n) => h("option", { value: n }, `${n}${s.some((x) => x.step === n && x.kind === "gold") ? (s.some((x) => x.step === n && x.kind === "train") ? ", both kinds" : ", gold") : ""}`)));
      step.value = String(s[s.length - 1].step);
      const stops = [...new Set(s.flatMap((x) => x.rows.map((r) => r.stop)).filter(has))].sort();
      stop.replaceChildren(h("option", { value: "" }, "all"), ...stops.map((x) => h("option", { value: x }, x)));
    }
    function update(fresh) {
      if (fresh) shown = PAGE;
      const r = run(), steps = r.rollouts.steps.filter((s) => (step.value === "all" || s.step === Number(step.value)) && (!kind.value || s.kind === kind.value));
      const needle = text.value.toLowerCase(), lo = low.value === "" ? -Infinity : Number(low.value), hi = high.value === "" ? Infinity : Number(high.value), free = low.value === "" && high.value === "";
      matches = steps.flatMap((s) => s.rows.map((row) => ({ row, s }))).filter(({ row }) => (!stop.value || row.stop === stop.value)
        && (free || (isNum(row.reward) && row.reward >= lo && row.reward <= hi))
        && (!needle || plain(D.texts[row.completion]).toLowerCase().includes(needle) || plain(D.texts[row.prompt]).toLowerCase().includes(needle)));
      if (sort.value !== "order") {
        const key = sort.value.slice(0, -1), sign = sort.value.endsWith("-") ? -1 : 1;
        matches = matches.map((m, i) => [m, i]).sort(([a, i], [b, j]) => {
          const x = a.row[key], y = b.row[key];
          return isNum(x) && isNum(y) ? sign * (x - y) || i - j : isNum(y) - isNum(x) || i - j;
        }).map(([m]) => m);
      }
      const have = steps.reduce((a, s) => a + s.rows.length, 0), total = steps.reduce((a, s) => a + s.total, 0);
      count.textContent = `${matches.length.toLocaleString("en-US")} of the ${have.toLocaleString("en-US")} completions kept here match.`;
      const f = r.rollouts.files, of = (k, name) => (f[k] ? `${r.rollouts.steps.filter((s) => s.kind === k).length} of ${f[k].toLocaleString("en-US")} ${name}` : null);
      kept.textContent = (have < total ? `The run sampled ${total.toLocaleString("en-US")} here; kept are whole groups, and the highest and lowest reward of each step. ` : "") + `The page has the completions of ${[of("train", "training steps"), of("gold", "gold measurements")].filter(Boolean).join(" and ")}; all are in the run's rollouts folder.`;
      list.replaceChildren(...matches.slice(0, shown).map(card));
      more.hidden = matches.length <= shown;
      more.textContent = `Show ${Math.min(PAGE, matches.length - shown)} more of ${matches.length - shown}`;
    }
    function card({ row, s }) {
      const fact = (label, value) => h("span", null, label + " ", h("b", null, value));
      const parts = Object.entries(row.parts || {}), signed = (v) => (v > 0 ? "+" : "") + fixed(v);
      return h("article", { class: "sample" },
        h("div", { class: "facts" },
          isNum(row.reward) ? h("span", { class: "score" }, "reward ", h("b", null, fixed(row.reward))) : h("span", { class: "score failed" }, "no score"),
          (parts.length > 1 || (parts.length === 1 && parts[0][1] !== row.reward)) && parts.map(([k, v]) => fact(k, isNum(v) ? fixed(v) : "no score")),
          isNum(row.advantage) && fact("advantage", signed(row.advantage)),
          has(row.stop) && h("span", { class: `tag ${statusClass(row.stop)}` }, row.stop === "length" ? "cut at the limit" : row.stop),
          isNum(row.tokens) && fact("tokens", row.tokens.toLocaleString("en-US")),
          h("span", null, `step ${s.step}, ${s.kind === "gold" ? "gold" : "training"}${has(row.i) ? `, prompt ${row.i}` : ""}${has(row.k) ? `, sample ${row.k}` : ""}${has(row.version) ? `, weights ${row.version}` : ""}`)),
        block(row.prompt, "prompt", "Prompt"), block(row.completion, "completion", "Completion"));
    }
    runs.addEventListener("change", () => { fillSteps(); update(true); });
    fillSteps(); update(true);
  }

  // -- recipe, environment -------------------------------------------------------------------------------------------

  const value = (v) => (v === null ? h("span", { class: "muted" }, "absent") : v === "" ? '""' : v);
  const diff = (rows, caption) => (rows.length ? table({ class: "keys" }, caption, ["Key", ...RUNS.map((r) => r.name)], rows.map((r) => [r[0], ...r.slice(1).map(value)])) : h("p", { class: "muted" }, "None."));
  if (MANY) section("differences", "Recipe differences", diff(D.recipe_diff, "Keys of the resolved recipes that differ (the output folder aside)."));
  if (RUNS.some((r) => r.recipe)) section("recipe", MANY ? "Recipes" : "Recipe", RUNS.map((r, i) => r.recipe && (MANY ? h("details", null, h("summary", null, runLabel(r, i)), h("pre", { tabindex: "0" }, r.recipe)) : h("pre", { tabindex: "0", "aria-label": "Resolved recipe" }, r.recipe))));
  if (RUNS.some((r) => Object.keys(r.environment).length)) section("environment", "Environment",
    MANY ? diff(D.environment_diff, "Where the runs' environments differ.") : table({ class: "keys" }, "Where the run was made.", ["Name", "Value"], Object.entries(RUNS[0].environment).map(([k, v]) => [k, value(v)])));

  window.report = { charts, data: D };
})();
