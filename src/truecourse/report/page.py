"""The report's data, made small and safe, and the page around it.

The page is assets/report.html with the style sheets, uPlot, report.js and one block of JSON put in; the browser draws
everything from that block. A content security policy in the page allows those scripts by hash and no request at all.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import hashlib
import html
import json
import math
import os
import string
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

from truecourse.errors import UserError
from truecourse.report.read import Record, Run, jsonl, run_directory

DIGITS = 5
"""Significant digits of an embedded number."""
MAX_POINTS = 4000
"""Longest embedded curve; longer ones keep the smallest and the largest value of each stretch of steps."""
ROLLOUT_FILES = {"train": 7, "gold": 5}
"""Most steps per page whose completions are embedded, by kind."""
PER_STEP = 64
"""Most completions of one step."""
HEAD, TAIL = 1400, 600
"""Characters kept of the start and of the end of a longer text; the end is where a completion goes wrong."""
TEXT_BUDGET = 600_000
"""Characters of completions and prompts in one page, all runs together."""
FRONTIER_POINTS = 60
"""Points of the proxy's curve over the square root of the KL; each is the mean of a stretch of steps."""

FINDING = ("code", "severity", "step", "symptom", "cause", "fix")
"""What the page shows of a finding; its evidence stays in the run directory."""
NOT_METRICS = ("step", "stage", "method", "n")


def build(runs: Sequence[str | Path] | str | Path, out: str | Path | None = None) -> Path:
    """Write the report of one run, or of several laid over each other, and return its path.

    `out` is RUN/report.html for one run and ./report.html for several unless given; it is replaced in one move.
    Raises `UserError` where a path is not a run directory, a record is malformed, a run is named twice, or `out`
    cannot be written.
    """
    paths = [Path(runs)] if isinstance(runs, str | Path) else [Path(r) for r in runs]
    if not paths:
        raise UserError("no run named; give at least one run directory")
    for i, path in enumerate(paths):
        if path.resolve() in [p.resolve() for p in paths[:i]]:
            raise UserError(f"run {str(path)!r} is named twice")
    loaded = [run_directory(path) for path in paths]
    target = Path(out) if out is not None else (paths[0] if len(paths) == 1 else Path(".")) / "report.html"
    _write(target, _page(data(loaded)))
    return target


def data(runs: Sequence[Run]) -> Record:
    """What the page embeds, as plain JSON types. Texts are verbatim here: the browser sets them as text only."""
    texts = _Texts(TEXT_BUDGET // max(1, _n_files(runs)))
    tables = []
    for run, name in zip(runs, _names([r.path for r in runs])):
        summary = figures(run)
        points, spans = _columns(run)
        tables.append(
            {
                "name": name,
                "path": str(run.path),
                "figures": summary,
                "notes": run.notes,
                "stages": spans,
                "metrics": points,
                "evals": _table(run.evals, run.notes, "evals.jsonl"),
                "frontier": frontier(run),
                "findings": run.findings and [{k: _plain(f[k]) for k in FINDING if k in f} for f in run.findings],
                "recipe": run.recipe_text,
                "environment": {k: _plain(v) for k, v in _flat(run.environment).items()},
                "rollouts": _rollouts(run, summary, texts, len(runs)),
            }
        )
    return {
        "runs": tables,
        "texts": texts.table,
        "recipe_diff": _differences([_without_out(r.recipe) for r in runs]) if len(runs) > 1 else [],
        "environment_diff": _differences([r.environment for r in runs]) if len(runs) > 1 else [],
    }


# -- key figures ------------------------------------------------------------------------------------------------------


def figures(run: Run) -> Record:
    """The key figures: the run's own summary where it has them, the records where a kill left none."""
    records, recipe, summary = run.metrics, run.recipe, run.summary
    methods = [s.get("method") for s in recipe.get("stage", []) if s.get("method")]
    if not methods:
        methods = list(dict.fromkeys(r["method"] for r in records if "method" in r))
    rewards = [r["reward/mean"] for r in records if _finite(r.get("reward/mean"))]
    kls = [r["kl/ref"] for r in records if _finite(r.get("kl/ref"))]
    derived: Record = {
        "method": " then ".join(methods),
        "model": recipe.get("model"),
        "seed": recipe.get("seed"),
        "steps": records[-1]["step"] if records else 0,
        "seconds": sum(_seconds(r) for r in [*records, *run.evals]) or None,
        "tokens": sum(v for r in records for k, v in r.items() if k in _TOKENS and _finite(v)) or None,
        "gold": {name: _first_last_best(run.evals, name) for name in _gold_names(run.evals)},
        "reward": {"first": rewards[0], "last": rewards[-1]} if rewards else None,
        "kl_ref": kls[-1] if kls else None,
    }
    merged = derived | {k: v for k, v in summary.items() if k in derived and v not in (None, {}, "")}
    if len(methods) > 1:
        merged["method"] = derived["method"]  # the summary's own is the last stage's
    if merged["reward"] and merged["reward"].get("last") is None:
        merged["reward"] = None
    merged["status"] = summary.get("status", "no summary")
    if not summary and records:
        run.notes.append(
            f"There is no summary.json: the run is still going, or was killed. The figures are those of the records "
            f"up to step {records[-1]['step']}."
        )
    elif summary.get("status") == "running" and records:
        merged["steps"] = records[-1]["step"]
        run.notes.append(f"The run had not ended when this page was made; its last record is step {merged['steps']}.")
    if summary.get("error"):
        run.notes.append(f"The run stopped with: {summary['error']}")
    if not records:
        run.notes.append("The run has no metrics yet: no optimiser step has been recorded.")
    elif not _gold_names(run.evals):
        run.notes.append(
            "The run has no gold: nothing but the reward it was trained on says whether it got better. "
            "Add a [[stage.gold]] part to the recipe."
        )
    return _round(merged)


def _seconds(record: Record) -> float:
    """Wall time that a record accounts for: its whole step, or the sum of its phases."""
    if _finite(whole := record.get("time/step")):
        return whole
    return sum(v for k, v in record.items() if k.startswith("time/") and _finite(v))


_TOKENS = ("tokens/prompt", "tokens/completion")


def _gold_names(evals: Iterable[Record]) -> list[str]:
    keys = dict.fromkeys(k for r in evals for k in r if k.startswith("gold/"))
    return [k[5:] for k in keys if not (k.endswith(("/low", "/high")) and k.rpartition("/")[0] in keys)]


def _first_last_best(evals: Sequence[Record], name: str) -> Record | None:
    points = [(r["step"], r[f"gold/{name}"]) for r in evals if _finite(r.get(f"gold/{name}"))]
    if not points:
        return None
    best = max(points, key=lambda p: p[1])
    return {"first": points[0][1], "last": points[-1][1], "best": best[1], "best_step": best[0]}


# -- curves -----------------------------------------------------------------------------------------------------------


def _columns(run: Run) -> tuple[Record, list[Record]]:
    """(columns of the metrics, the stages' spans of steps); a longer run is thinned stage by stage."""
    spans: list[Record] = []
    stages: list[list[Record]] = []
    for record in run.metrics:
        stage = record.get("stage", 0)
        if not spans or spans[-1]["stage"] != stage:
            spans.append({"stage": stage, "method": record.get("method"), "first": record["step"]})
            stages.append([])
        spans[-1]["last"] = record["step"]
        stages[-1].append(record)
    if len(run.metrics) <= MAX_POINTS:
        return _table(run.metrics, run.notes, "metrics.jsonl"), spans
    _note_values(run.metrics, run.notes, "metrics.jsonl")
    stretch = math.ceil(2 * len(run.metrics) / (MAX_POINTS - 4 * len(stages)))
    thinned = [point for records in stages for point in _thin(records, stretch)]
    run.notes.append(
        f"The curves show {len(thinned):,} points for {len(run.metrics):,} steps: the smallest and the largest value "
        f"of every {stretch} steps, in their order."
    )
    return _table(thinned), spans


def _thin(records: list[Record], stretch: int) -> Iterable[Record]:
    """Two points per stretch of records that keep every metric's extremes, then the last record as it is."""
    for start in range(0, len(records) - 1, stretch):
        part = records[start : min(start + stretch, len(records) - 1)]
        middle = len(part) // 2
        first, second = {"step": part[0]["step"]}, {"step": part[middle]["step"]}
        for key in dict.fromkeys(k for r in part for k in r if k not in NOT_METRICS):
            values = [(r[key], i) for i, r in enumerate(part) if _finite(r.get(key))]
            if values:
                ends = sorted((min(values), max(values)), key=lambda v: v[1])
                first[key], second[key] = ends[0][0], ends[1][0]
        yield first
        if middle:
            yield second
    yield records[-1]


def _table(records: Sequence[Record], notes: list[str] | None = None, source: str = "") -> Record:
    """{key: column} with null where a record lacks the key and "NaN" where its value is not finite."""
    if notes is not None:
        _note_values(records, notes, source)
    keys = dict.fromkeys(k for r in records for k, v in r.items() if _number(v) and k not in NOT_METRICS)
    table: Record = {"step": [r["step"] for r in records]}
    if len({r.get("stage", 0) for r in records}) > 1:
        table["stage"] = [r.get("stage", 0) for r in records]
    for key in keys:
        values = (r.get(key) for r in records)
        table[key] = [None if not _number(v) else _short(v) if math.isfinite(v) else "NaN" for v in values]
    return table


def _note_values(records: Sequence[Record], notes: list[str], source: str) -> None:
    """Say which values cannot be drawn: they are left out of the curves, and that is never silent."""
    broken: dict[str, list[int]] = {}
    odd: set[str] = set()
    for record in records:
        for key, value in record.items():
            if _number(value) and not math.isfinite(value):
                broken.setdefault(key, []).append(record["step"])
            elif not _number(value) and value is not None and key not in NOT_METRICS:
                odd.add(key)
    for key, steps in broken.items():
        where = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, the first at {steps[0]}"
        notes.append(f"{key} is not finite (NaN or infinite) at {where}; the curve has a gap there.")
    if odd:
        notes.append(f"Not drawn, as they are not numbers ({source}): {', '.join(sorted(odd))}.")


def frontier(run: Run) -> list[Record]:
    """Proxy and gold over √KL (Gao et al. 2023, §3): √kl/ref against reward/mean and gold, one entry per stage.

    The proxy's points [step, √KL, reward] are means of stretches of steps. A record of step s measures the policy
    before that update, so the gold of step s, [step, √KL, gold, low, high], is placed at the mean kl/ref of the five
    records about s + 1. A stage without reward or gold, or whose KL is zero throughout, has no entry.
    """
    entries = []
    measured = [r for r in run.metrics if _finite(r.get("kl/ref")) and _finite(r.get("reward/mean"))]
    for stage in dict.fromkeys(r.get("stage", 0) for r in measured):
        records = [r for r in measured if r.get("stage", 0) == stage]
        stretch = math.ceil(len(records) / FRONTIER_POINTS)
        parts = [records[start : start + stretch] for start in range(0, len(records), stretch)]
        proxy = [
            [p[-1]["step"], _root(_mean(r["kl/ref"] for r in p)), _mean(r["reward/mean"] for r in p)] for p in parts
        ]
        gold: dict[str, list[list[float | None]]] = {}
        for record in run.evals:
            if record.get("stage", 0) != stage:
                continue
            at = bisect.bisect_left(records, record["step"] + 1, key=lambda r: r["step"])
            root = _root(_mean(r["kl/ref"] for r in records[max(0, min(at, len(records) - 1) - 2) : at + 3]))
            for name in _gold_names([record]):
                if _finite(y := record[f"gold/{name}"]):
                    low, high = (_value(record.get(f"gold/{name}/{end}")) for end in ("low", "high"))
                    gold.setdefault(name, []).append([record["step"], root, y, low, high])
        if gold and any(root for _, root, _ in proxy):
            entries.append({"stage": stage, "stretch": stretch, "proxy": proxy, "gold": gold})
    return _round(entries)


def _root(kl: float) -> float:
    """√KL; an estimate may fall just below zero where the KL is zero."""
    return math.sqrt(max(0.0, kl))


# -- completions ------------------------------------------------------------------------------------------------------


class _Texts:
    """Prompts and completions as embedded: each distinct text once, its middle left out where it is long."""

    def __init__(self, per_step: int):
        self.per_step = per_step
        self.table: list[Any] = []
        self.index: dict[str, int] = {}

    def add(self, content: Any) -> int:
        """Index of a text, or of a list of chat messages, in the table."""
        if isinstance(content, list) and all(isinstance(m, dict) for m in content):
            entry: Any = [[str(m.get("role", "?")), _clip(_as_text(m.get("content")))] for m in content]
        else:
            entry = _clip(_as_text(content))
        key = json.dumps([entry])
        if key not in self.index:
            self.index[key] = len(self.table)
            self.table.append(entry)
        return self.index[key]


def _clip(text: str) -> Any:
    """The text, or its head and tail with the number of characters between them."""
    if len(text) <= HEAD + TAIL:
        return text
    return {"cut": len(text) - HEAD - TAIL, "head": text[:HEAD], "tail": text[-TAIL:]}


def _as_text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _n_files(runs: Sequence[Run]) -> int:
    return sum(len(_choose(run, {}, kind, len(runs))) for run in runs for kind in ROLLOUT_FILES)


def _choose(run: Run, summary: Record, kind: str, n_runs: int) -> list[tuple[str, int, Path]]:
    """The files to embed: first, last, the one nearest the best gold, and evenly spaced ones between."""
    files = [f for f in run.rollouts if f[0] == kind]
    limit = max(2, ROLLOUT_FILES[kind] // n_runs)
    if len(files) <= limit:
        return files
    picks = {round(i * (len(files) - 1) / (limit - 1)) for i in range(limit)}
    gold = next((g for g in (summary.get("gold") or {}).values() if g), None)
    if gold and gold.get("best_step") is not None and limit > 2:
        best = min(range(len(files)), key=lambda i: abs(files[i][1] - gold["best_step"]))
        if best not in picks:  # in place of its nearest neighbour, ends excepted
            picks.remove(min(picks - {0, len(files) - 1}, key=lambda i: abs(i - best)))
            picks.add(best)
    return [files[i] for i in sorted(picks)]


def _rollouts(run: Run, summary: Record, texts: _Texts, n_runs: int) -> Record:
    steps = []
    for kind in ROLLOUT_FILES:
        for _, step, file in _choose(run, summary, kind, n_runs):
            rows = jsonl(file, run.notes)
            shown = _sample(rows, texts.per_step)
            steps.append(
                {"step": step, "kind": kind, "total": len(rows), "rows": [_row(rows[i], texts) for i in shown]}
            )
    steps.sort(key=lambda s: (s["step"], s["kind"]))
    files = {kind: sum(f[0] == kind for f in run.rollouts) for kind in ROLLOUT_FILES}
    return {"steps": steps, "files": files}


def _sample(rows: Sequence[Record], budget: int) -> list[int]:
    """Indices of the rows to embed: whole groups in the file's order, with the step's highest and lowest reward."""
    scored = [i for i, r in enumerate(rows) if _finite(r.get("reward"))]
    picks = {f(scored, key=lambda i: rows[i]["reward"]) for f in (min, max)} if scored else set()
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("prompt_index"), []).append(i)

    def cost(indices: Iterable[int]) -> int:
        seen = {str(rows[i].get("prompt")) for i in indices}  # a prompt is embedded once
        lengths = [len(p) for p in seen] + [len(str(rows[i].get("completion", ""))) for i in indices]
        return sum(min(n, HEAD + TAIL) + 100 for n in lengths)

    spent = cost(picks)
    for group in groups.values():
        new = [i for i in group[:PER_STEP] if i not in picks]
        if len(picks) + len(new) > PER_STEP or spent + cost(new) > budget:
            if len(picks) <= 2:  # a group that is too large by itself: as much of it as fits
                while new and (len(picks) + len(new) > PER_STEP or spent + cost(new) > budget):
                    new.pop()
                picks.update(new)
            break
        picks.update(new)
        spent += cost(new)
    return sorted(picks)


def _row(row: Record, texts: _Texts) -> Record:
    parts = row.get("parts") or {}
    kept = {
        "prompt": texts.add(row.get("prompt", "")),
        "completion": texts.add(row.get("completion", "")),
        "i": row.get("prompt_index"),
        "k": row.get("sample"),
        "tokens": row.get("tokens"),
        "stop": row.get("stop"),
        "reward": _value(row.get("reward")),
        "parts": {str(name): _value(v) for name, v in parts.items()},
        "advantage": _value(row.get("advantage")),
        "version": row.get("version"),
    }
    return {k: v for k, v in kept.items() if v not in (None, {})}


# -- several runs -----------------------------------------------------------------------------------------------------


def _names(paths: Sequence[Path]) -> list[str]:
    """Each run's folder name, with as many parents in front as it takes to tell them apart."""
    parts = [p.resolve().parts for p in paths]
    names = [p[-1] or str(path) for p, path in zip(parts, paths)]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = [("/".join(p[-depth:]) if names.count(n) > 1 else n) for p, n in zip(parts, names)]
    return names


def _differences(tables: Sequence[Record]) -> list[list[Any]]:
    """[key, value in each run] for the keys on which the runs differ; null where a run lacks the key."""
    flat = [_flat(t) for t in tables]
    keys = dict.fromkeys(k for t in flat for k in t)
    rows = [[key, *(None if key not in t else _plain(t[key]) for t in flat)] for key in keys]
    return [row for row in rows if any(v != row[1] for v in row[2:])]


def _flat(value: Any, prefix: str = "") -> Record:
    """{dotted key: leaf}; tables in lists are numbered, plain lists are leaves."""
    if isinstance(value, dict) and (value or not prefix):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    return {k: leaf for name, v in items for k, leaf in _flat(v, f"{prefix}.{name}" if prefix else name).items()}


def _without_out(recipe: Record) -> Record:
    return {k: v for k, v in recipe.items() if k != "out"}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> TypeGuard[float]:
    return _number(value) and math.isfinite(value)


def _value(value: Any) -> Any:
    return _short(value) if _finite(value) else None


def _short(value: float) -> float:
    """At most DIGITS significant digits; a whole number stays whole."""
    if isinstance(value, int) or value == int(value):
        return int(value)
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) else short


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _round(value: Any) -> Any:
    """A copy in which every number is short and none is NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _round(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_round(v) for v in value]
    return (_short(value) if math.isfinite(value) else None) if _number(value) else value


# -- the page ---------------------------------------------------------------------------------------------------------


def _page(content: Record) -> str:
    names = [run["name"] for run in content["runs"]]
    title = f"{names[0]} – truecourse run" if len(names) == 1 else f"{', '.join(names)} – truecourse runs"
    scripts = [_asset("uPlot.iife.min.js"), _asset("report.js")]
    styles = [_asset("uPlot.min.css"), _asset("report.css")]
    policy = (
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(map(_hash, scripts))}; style-src {' '.join(map(_hash, styles))}"
    )
    return string.Template(_asset("report.html")).substitute(
        title=html.escape(title),
        policy=policy,
        styles="\n".join(f"<style>{s}</style>" for s in styles),
        scripts="\n".join(f"<script>{s}</script>" for s in scripts),
        data=_embed(content),
        license=_asset("uPlot.LICENSE").replace("--", "- -"),
    )


def _embed(content: Record) -> str:
    """JSON that no HTML parser can leave: without a "<" there is neither an end tag nor a comment."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files("truecourse.report").joinpath("assets", name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write(path: Path, text: str) -> None:
    if path.is_dir():
        raise UserError(f"report {str(path)!r} is a folder; name a file, such as {str(path / 'report.html')!r}")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a lone surrogate, which a tokenizer can emit, becomes the JSON escape of itself
        aside.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"report {str(path)!r} cannot be written: {error.strerror}") from None
