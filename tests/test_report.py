"""The report: what is embedded, checked as plain JSON; and the page itself, in a real headless browser."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from truecourse.errors import UserError
from truecourse.report import build
from truecourse.report import page as page_module

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 2'><!-- <script>",
    "\u202ereversed\u202c nul\x00 bell\x07 escape\x1b[31m line\u2028separator",
    "]]></textarea></title><style>body{display:none}</style>$data ${title} \\u003c &lt;",
    "x" * 50_000,
    "".join(chr(0x1F600 + i) for i in range(20)) + " lone \ud83d surrogate",
    "",
]


# -- synthetic runs ---------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def grpo_record(step: int, steps: int, rng: random.Random, stage: int = 0, method: str = "grpo") -> dict:
    t = step / steps
    rise = 0.2 + 0.6 / (1 + math.exp(-8 * (t - 0.4)))
    rollout, train = 0.08 + 0.02 * rng.random(), 0.05 + 0.01 * rng.random()
    return {
        "step": step,
        "stage": stage,
        "method": method,
        "loss": rng.gauss(0, 0.02),
        "reward/mean": rise + rng.gauss(0, 0.05),
        "reward/std": max(0.0, 0.4 - 0.2 * t + rng.gauss(0, 0.03)),
        "reward/exact": rise + rng.gauss(0, 0.05),
        "reward/length": -0.1 * t + rng.gauss(0, 0.01),
        "kl/ref": 6 * t + abs(rng.gauss(0, 0.15)),
        "kl/update": abs(rng.gauss(2e-4, 1e-4)),
        "kl/sampler": abs(rng.gauss(0, 1e-7)),
        "entropy": 0.9 * math.exp(-2 * t) + rng.gauss(0, 0.02),
        "length/mean": 5 + 3 * t + rng.gauss(0, 0.3),
        "length/truncated": max(0.0, 0.05 * (1 - t) + rng.gauss(0, 0.01)),
        "groups/zero_std_high": max(0.0, 0.5 * t + rng.gauss(0, 0.05)),
        "groups/zero_std_low": max(0.0, 0.3 * (1 - t) + rng.gauss(0, 0.05)),
        "clip/fraction": abs(rng.gauss(0, 0.01)),
        "grad_norm": abs(rng.gauss(0.6, 0.2)),
        "lr": 5e-4 * min(1, t / 0.05) * (1 - 0.9 * t),
        "diversity": 0.8 - 0.4 * t + rng.gauss(0, 0.02),
        "time/rollout": rollout,
        "time/reward": 0.003,
        "time/train": train,
        "time/step": rollout + train + 0.006,
        "tokens/prompt": 320,
        "tokens/completion": 1500 + int(200 * rng.random()),
        "tokens/per_second": 12_000 + rng.gauss(0, 400),
        "memory/peak": 4.1e8 + 1e5 * step,
    }


def gold_record(step: int, steps: int, rng: random.Random, stage: int = 0) -> dict:
    y = 0.3 + 0.45 / (1 + math.exp(-8 * (step / steps - 0.4))) - 0.1 * max(0.0, step / steps - 0.8) * 5
    y += rng.gauss(0, 0.01)
    return {
        "step": step,
        "stage": stage,
        "gold/exact": y,
        "gold/exact/low": y - 0.05,
        "gold/exact/high": y + 0.05,
        "n": 256,
        "length/mean": 5 + 3 * step / steps,
        "length/truncated": 0.01,
    }


def rollout(
    step: int, kind: str, prompts: int, group: int, rng: random.Random, texts: list[str] | None = None
) -> list[dict]:
    rows = []
    for p in range(prompts):
        a, b = rng.randrange(100), rng.randrange(100)
        for g in range(group):
            right = rng.random() < 0.6
            text = texts[(p * group + g) % len(texts)] if texts else f"{str(a + b + (not right))[::-1]}"
            row = {
                "step": step,
                "stage": 0,
                "kind": kind,
                "prompt_index": 1000 + p,
                "sample": g,
                "prompt": [
                    {"role": "system", "content": "Answer in digits."},
                    {"role": "user", "content": f"{a} + {b} ="},
                ]
                if p % 2
                else f"{a} + {b} =",
                "completion": text,
                "tokens": len(text) + 1,
                "stop": "eos" if g % 4 else "length",
                "reward": float(right) if rng.random() > 0.02 else None,
                "parts": {"exact": float(right), "length": -0.01 * g},
                "version": step,
            }
            if kind == "train":
                row["advantage"] = (right - 0.6) / 0.5
            rows.append(row)
    return rows


def make_run(
    path: Path, steps: int = 120, seed: int = 0, lr: float = 5e-4, summary: bool = True, texts: list[str] | None = None
) -> Path:
    rng = random.Random(seed)
    every = max(1, steps // 12)
    write_jsonl(path / "metrics.jsonl", [grpo_record(s, steps, rng) for s in range(1, steps + 1)])
    evals = [gold_record(s, steps, rng) for s in range(0, steps + 1, every)]
    write_jsonl(path / "evals.jsonl", evals)
    for s in range(1, steps + 1, max(1, steps // 30)):
        write_jsonl(path / "rollouts" / f"step-{s:06d}.jsonl", rollout(s, "train", 16, 8, rng, texts))
    for e in evals:
        write_jsonl(path / "rollouts" / f"gold-{e['step']:06d}.jsonl", rollout(e["step"], "gold", 100, 1, rng, texts))
    (path / "recipe.toml").write_text(
        f'model = "tiny"\nout = "{path}"\nseed = {seed}\n\n[[stage]]\nmethod = "grpo"\ndata = "lab:addition"\n'
        f'lr = {lr}\nsteps = {steps}\n\n[[stage.rewards]]\nuse = "exact"\n'
    )
    (path / "environment.json").write_text(
        json.dumps(
            {"python": "3.11.2", "torch": "2.13.0", "git": "f21c2f4", "machine": "x86_64", "cores": 2, "seed": seed}
        )
    )
    if summary:
        golds = [e["gold/exact"] for e in evals]
        best = max(range(len(golds)), key=golds.__getitem__)
        (path / "summary.json").write_text(
            json.dumps(
                {
                    "method": "grpo",
                    "model": "tiny",
                    "seed": seed,
                    "steps": steps,
                    "seconds": 92.4,
                    "tokens": 1_234_567,
                    "gold": {
                        "exact": {"first": golds[0], "last": golds[-1], "best": golds[best], "best_step": every * best}
                    },
                    "reward": {"first": 0.21, "last": 0.78},
                    "kl_ref": 6.02,
                    "status": "finished",
                }
            )
        )
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "addition-grpo")


def embedded(path: Path) -> dict:
    """The page's data, found as an HTML parser finds it: up to the first end tag."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


# -- what is embedded -------------------------------------------------------------------------------------------------


def test_the_page_lies_in_the_run_and_names_nothing_outside_itself(run):
    path = build([run])
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    outside = text.split('<script type="application/json"')[0].split("</style>")[-1]
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:)?//""", outside)
    assert "@import" not in text and "url(" not in text.split("</style>")[0] + text.split("<style>")[1]
    assert "default-src 'none'" in text
    assert "Leon Sorokin" in text, "uPlot's licence travels with it"


def test_only_the_pages_own_scripts_and_styles_are_allowed_by_hash(run):
    text = build([run]).read_text(encoding="utf-8")
    allowed = set(re.findall(r"sha256-[\w+/=]+", text.split("Content-Security-Policy")[1].split(">")[0]))
    blocks = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", text, re.S)
    assert len(blocks) == 4
    assert allowed == {page_module._hash(b).strip("'") for b in blocks}


def test_a_report_imports_no_torch():
    code = "import sys, truecourse.report; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_figures_are_the_summarys(run):
    figures = embedded(build([run]))["runs"][0]["figures"]
    summary = json.loads((run / "summary.json").read_text())
    assert figures["status"] == "finished" and figures["tokens"] == 1_234_567 and figures["model"] == "tiny"
    for key, value in summary["gold"]["exact"].items():
        assert figures["gold"]["exact"][key] == pytest.approx(value, rel=1e-4)


def test_a_killed_run_has_its_figures_from_the_records_and_says_so(tmp_path):
    run = make_run(tmp_path / "killed", steps=40, summary=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "reward/mean": 0.9')
    content = embedded(build([run]))["runs"][0]
    figures = content["figures"]
    golds = [json.loads(line)["gold/exact"] for line in (run / "evals.jsonl").read_text().splitlines()]
    assert figures["status"] == "no summary" and figures["steps"] == 40
    assert figures["gold"]["exact"]["best"] == pytest.approx(max(golds), rel=1e-4)
    assert figures["model"] == "tiny" and figures["seed"] == 0
    assert any("metrics.jsonl is cut" in n for n in content["notes"])
    assert any("summary.json" in n for n in content["notes"])


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', 2),
        ('{"step": 1}\n{"step": 2, "lo\n', 2),  # ended by a line break: written so, not cut
        ('{"step": 1}\n[2]\n{"step": 3}\n', 2),
        ('{"step": 1}\n{"loss": 2}\n', 2),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(tmp_path, body, line):
    (tmp_path / "metrics.jsonl").write_text(body)
    with pytest.raises(UserError, match=rf"metrics\.jsonl, (line|record) {line}\b"):
        build([tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_a_line_cut_inside_a_character_is_a_cut_line(tmp_path):
    run = make_run(tmp_path / "r", steps=3)
    with (run / "rollouts" / "step-000001.jsonl").open("ab") as file:
        file.write('{"completion": "é'.encode()[:-1])
    assert any("step-000001.jsonl is cut" in n for n in embedded(build([run]))["runs"][0]["notes"])


def test_mistakes_name_the_path(tmp_path):
    run = make_run(tmp_path / "r", steps=3)
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "absent", tmp_path / "empty", run / "recipe.toml"):
        with pytest.raises(UserError, match=re.escape(str(bad))):
            build([run, bad], tmp_path / "out.html")
    with pytest.raises(UserError, match="twice"):
        build([run, tmp_path / "empty" / ".." / "r"], tmp_path / "out.html")
    with pytest.raises(UserError, match="no run"):
        build([])
    with pytest.raises(UserError, match="is a folder"):
        build([run], tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        build([run], run / "recipe.toml" / "report.html")
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not valid JSON"):
        build([run])


def test_missing_metrics_are_absent_and_broken_ones_are_said(tmp_path):
    records = [{"step": s, "loss": float(s)} for s in range(1, 11)]
    records[3] |= {"kl/ref": 0.5, "loss": float("nan")}
    records[5] |= {"kl/ref": None, "tag": "odd"}
    write_jsonl(tmp_path / "metrics.jsonl", records)
    records[7]["loss"] = "Infinity"  # as the run directory, which is strict JSON, writes it
    write_jsonl(tmp_path / "metrics.jsonl", records)
    content = embedded(build([tmp_path]))["runs"][0]
    assert content["metrics"]["kl/ref"] == [None] * 3 + [0.5] + [None] * 6
    assert (
        content["metrics"]["loss"][3] == content["metrics"]["loss"][7] == "NaN" and content["metrics"]["loss"][4] == 5
    )
    assert "reward/mean" not in content["metrics"] and content["figures"]["reward"] is None
    assert any("loss is not finite" in n and "2 steps, the first at 4" in n for n in content["notes"])
    assert any("tag" in n for n in content["notes"])


def test_a_repeated_step_is_shown_once_as_last_written(tmp_path):
    records = [{"step": s, "loss": 1.0} for s in (1, 2, 3)] + [{"step": 2, "loss": 7.0}, {"step": 4, "loss": 8.0}]
    write_jsonl(tmp_path / "metrics.jsonl", records)
    content = embedded(build([tmp_path]))["runs"][0]
    assert content["metrics"] == {"step": [1, 2, 3, 4], "loss": [1, 7, 1, 8]}
    assert any("1 records of metrics.jsonl repeat" in n for n in content["notes"])


def test_stages_keep_their_own_gold_at_the_step_that_they_share(tmp_path):
    records = [
        {"step": s, "stage": int(s > 5), "method": "grpo" if s > 5 else "sft", "loss": 1.0} for s in range(1, 11)
    ]
    write_jsonl(tmp_path / "metrics.jsonl", records)
    evals = [(0, 0, 0.1), (0, 5, 0.2), (1, 5, 0.25), (1, 10, 0.6)]
    write_jsonl(tmp_path / "evals.jsonl", [{"stage": a, "step": s, "gold/x": y} for a, s, y in evals])
    content = embedded(build([tmp_path]))["runs"][0]
    assert [(s["method"], s["first"], s["last"]) for s in content["stages"]] == [("sft", 1, 5), ("grpo", 6, 10)]
    assert content["evals"]["gold/x"] == [0.1, 0.2, 0.25, 0.6] and content["evals"]["stage"] == [0, 0, 1, 1]
    assert content["figures"]["method"] == "sft then grpo"


def test_hostile_completions_come_back_as_they_were(tmp_path):
    run = make_run(tmp_path / "r", steps=2, texts=HOSTILE)
    path = build([run])
    content = embedded(path)
    texts = content["texts"]
    for hostile in HOSTILE:
        expected = hostile if len(hostile) <= 2000 else {"cut": 48_000, "head": "x" * 1400, "tail": "x" * 600}
        assert expected in texts
    tail = path.read_text(encoding="utf-8").split('id="data">')[1]
    assert tail.count("</script>") == 3, "the end of the data and of the two scripts"
    assert "<" not in tail.split("</script>")[0]


def test_completions_kept_are_first_last_best_whole_groups_and_extremes(tmp_path):
    run = make_run(tmp_path / "r", steps=300)
    file = run / "rollouts" / "step-000001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[-1]["reward"], rows[-3]["reward"] = 99.0, -99.0
    write_jsonl(file, rows)
    content = embedded(build([run]))["runs"][0]
    steps = content["rollouts"]["steps"]
    gold = [s["step"] for s in steps if s["kind"] == "gold"]
    train = [s["step"] for s in steps if s["kind"] == "train"]
    assert gold[0] == 0 and gold[-1] == 300 and content["figures"]["gold"]["exact"]["best_step"] in gold
    assert train[0] == 1 and train[-1] == 291 and len(steps) == 12
    assert content["rollouts"]["files"] == {"train": 30, "gold": 13}
    first = next(s for s in steps if s["kind"] == "train" and s["step"] == 1)
    assert first["total"] == 128 and 56 < len(first["rows"]) <= 64
    rewards = [r.get("reward") for r in first["rows"]]
    assert 99 in rewards and -99 in rewards
    groups = {i: sum(r["i"] == i for r in first["rows"]) for i in {r["i"] for r in first["rows"]}}
    assert sorted(groups.values()).count(8) >= len(groups) - 1
    failed = [r for s in steps for r in s["rows"] if "reward" not in r]
    assert failed, "a completion whose reward failed is kept, without a score"


def test_long_completions_stay_within_the_budget_of_the_page(tmp_path):
    texts = ["".join(random.Random(i).choices("abcdef ghij", k=3000)) for i in range(500)]
    run = make_run(tmp_path / "r", steps=60, texts=texts)
    path = build([run])
    assert path.stat().st_size < 1_000_000
    assert all(s["rows"] for s in embedded(path)["runs"][0]["rollouts"]["steps"])


def test_two_thousand_steps_of_25_metrics_stay_small(tmp_path):
    rng = random.Random(0)
    write_jsonl(tmp_path / "metrics.jsonl", [grpo_record(s, 2000, rng) for s in range(1, 2001)])
    path = build([tmp_path])
    assert path.stat().st_size < 1_000_000
    content = embedded(path)["runs"][0]
    assert len(content["metrics"]) >= 25 and len(content["metrics"]["step"]) == 2000


def test_long_runs_are_thinned_to_their_extremes_and_say_so(tmp_path):
    records = [{"step": s, "stage": int(s > 9000), "grad_norm": 1.0 + (s % 7) / 100} for s in range(1, 12_001)]
    records[6543]["grad_norm"], records[6544]["grad_norm"] = 55.0, -5.0
    write_jsonl(tmp_path / "metrics.jsonl", records)
    content = embedded(build([tmp_path]))["runs"][0]
    steps, norms = content["metrics"]["step"], content["metrics"]["grad_norm"]
    assert 2000 < len(steps) <= 4000 and steps == sorted(set(steps)) and steps[-1] == 12_000
    assert max(norms) == 55 and min(norms) == -5
    assert norms.index(55) < norms.index(-5), "in their order"
    assert {9000, 9001} <= set(steps), "no stretch crosses a stage"
    assert any("12,000 steps" in n for n in content["notes"])


def test_the_frontier_places_gold_at_the_kl_measured_around_it(tmp_path):
    records = [{"step": s, "reward/mean": s / 10, "kl/ref": 4.0 * (s - 1)} for s in range(1, 21)]
    write_jsonl(tmp_path / "metrics.jsonl", records)
    evals = [{"step": s, "gold/x": y, "gold/x/low": y - 1, "gold/x/high": y + 1} for s, y in ((0, 1), (10, 2), (20, 3))]
    write_jsonl(tmp_path / "evals.jsonl", evals)
    (entry,) = embedded(build([tmp_path]))["runs"][0]["frontier"]
    assert entry["proxy"][4] == [5, 4, 0.5] and len(entry["proxy"]) == 20
    # step 10 was measured after ten updates, so at record 11, the middle of records 9..13: KL 40
    assert entry["gold"]["x"][1] == pytest.approx([10, math.sqrt(40), 2, 1, 3], rel=1e-4)
    assert entry["gold"]["x"][0][1] == pytest.approx(2), "records 1..3"
    assert entry["gold"]["x"][2][1] == pytest.approx(math.sqrt(4 * 18), rel=1e-4), "records 18..20"


def test_several_runs_have_unique_names_and_their_differences(tmp_path):
    a, b = make_run(tmp_path / "x" / "run", steps=5), make_run(tmp_path / "y" / "run", steps=5, seed=1, lr=1e-3)
    content = embedded(build([a, b], tmp_path / "both.html"))
    assert [r["name"] for r in content["runs"]] == ["x/run", "y/run"]
    assert content["recipe_diff"] == [["seed", "0", "1"], ["stage.0.lr", "0.0005", "0.001"]]
    assert content["environment_diff"] == [["seed", "0", "1"]]


def test_several_runs_default_to_the_working_folder(tmp_path, monkeypatch):
    a, b = make_run(tmp_path / "a", steps=2), make_run(tmp_path / "b", steps=2)
    monkeypatch.chdir(tmp_path)
    assert build([a, b]).resolve() == (tmp_path / "report.html").resolve()


# -- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM} is absent")
    api = pytest.importorskip("playwright.sync_api", reason="no browser driver: playwright is absent")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def view(browser):
    """Opens a page; afterwards, no console message, no error and no request but the file's own may have happened."""
    pages, trouble, requests = [], [], []

    def open_page(path: Path, width: int = 1280, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda m: trouble.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: trouble.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(path.resolve().as_uri())
        pages.append(page)
        return page

    yield open_page
    urls = {page.url.split("#")[0] for page in pages}
    for page in pages:
        page.close()
    assert not trouble
    assert [r for r in requests if r not in urls and not r.startswith("data:")] == []


# the canvas is copied first: reading one back many times makes the browser complain on the console
PIXELS = """(canvas) => {
  const copy = document.createElement('canvas');
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const context = copy.getContext('2d', { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  return context.getImageData(0, 0, copy.width, copy.height).data;
}"""

INK = f"""() => [...document.querySelectorAll('.chart')].map((f) => {{
  const d = ({PIXELS})(f.querySelector('canvas')), colors = new Set();
  let ink = 0;
  for (let i = 0; i < d.length; i += 4)
    if (d[i + 3] > 0) {{ ink++; colors.add(d[i] * 65536 + d[i + 1] * 256 + d[i + 2]); }}
  return {{ id: f.dataset.chart, ink, colors: colors.size, width: f.getBoundingClientRect().width }};
}})"""

RUN_COLOURS = f"""() => ['--c0', '--c1'].map((name) => {{
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const d = ({PIXELS})(document.querySelector('[data-chart="kl/ref"] canvas'));
  let n = 0;
  for (let i = 0; i < d.length; i += 4)
    if (d[i + 3] > 200 && rgb.every((v, k) => Math.abs(v - d[i + k]) < 8)) n++;
  return n;
}})"""

EXPECTED = {
    *("reward", "frontier", "reward/exact", "reward/std", "groups/zero_std"),
    *("kl/ref", "kl/update", "kl/sampler", "clip/fraction", "entropy", "length/mean", "length/truncated", "diversity"),
    *("loss", "grad_norm", "lr", "time", "time/step", "tokens/per_second", "memory/peak"),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn(run, view, scheme):
    page = view(build([run]), scheme=scheme)
    charts = {c["id"]: c for c in page.evaluate(INK)}
    assert set(charts) >= EXPECTED
    for chart in charts.values():
        assert chart["ink"] > 400 and chart["colors"] > 5, chart
    assert page.locator("h1").inner_text() == "addition-grpo"
    assert "best" in page.locator("#figures").inner_text()
    assert page.locator("figcaption").count() == page.locator("canvas").count() == len(charts)
    assert all(page.locator(".plot").evaluate_all("els => els.map(e => e.getAttribute('aria-label').length > 20)"))


def test_an_sft_run_shows_its_own_charts_and_no_reward(tmp_path, view):
    rng = random.Random(0)
    records = [
        {
            "step": s,
            "stage": 0,
            "method": "sft",
            "loss": 3 / s + rng.random() / 10,
            "accuracy/token": 1 - 1 / s,
            "lr": 1e-3,
        }
        for s in range(1, 51)
    ]
    write_jsonl(tmp_path / "metrics.jsonl", records)
    page = view(build([tmp_path]))
    charts = page.evaluate(INK)
    assert {c["id"] for c in charts} == {"loss", "accuracy/token", "lr"}
    assert all(c["ink"] > 400 for c in charts)
    assert "no gold" in page.locator("#notes").inner_text()


def test_a_run_without_metrics_says_so(tmp_path, view):
    (tmp_path / "recipe.toml").write_text('model = "tiny"\n')
    page = view(build([tmp_path]))
    assert "nothing to draw" in page.locator("#no-metrics").inner_text()
    assert "no metrics yet" in page.locator("#notes").inner_text()
    assert page.locator("canvas").count() == 0 and 'model = "tiny"' in page.locator("#recipe pre").inner_text()


@pytest.mark.parametrize("runs", [1, 2])
def test_a_phone_sees_no_sideways_scroll(run, tmp_path, view, runs):
    hostile = make_run(tmp_path / ("a-rather-long-name-of-a-run-" * 3), steps=30, texts=HOSTILE)
    page = view(build([hostile, run][:runs], tmp_path / "out.html"), width=360)
    if page.locator("#f-step").count():
        page.select_option("#f-step", "all")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert all(300 < c["width"] <= 360 and c["ink"] > 400 for c in page.evaluate(INK))


def test_charts_follow_the_width_of_the_window(run, view):
    page = view(build([run]))
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_function("document.querySelector('[data-chart=reward] canvas').clientWidth < 345")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_two_runs_are_laid_over_each_other(run, tmp_path, view):
    other = make_run(tmp_path / "other", steps=80, seed=3, lr=1e-3)
    page = view(build([run, other], tmp_path / "both.html"))
    rows = page.locator("#summary-table tbody tr")
    assert rows.count() == 2 and "addition-grpo" in rows.nth(0).inner_text() and "other" in rows.nth(1).inner_text()
    entropy = page.locator("[data-chart=entropy] .legend").inner_text()
    assert "addition-grpo" in entropy and "other" in entropy
    # both runs' colours are on the picture, and hiding a run takes its colour away
    first, second = page.evaluate(RUN_COLOURS)
    assert first > 50 and second > 50
    page.locator('[data-chart="kl/ref"] .legend button', has_text="other").click()
    page.wait_for_timeout(50)
    first, second = page.evaluate(RUN_COLOURS)
    assert first > 50 and second == 0
    differences = page.locator("#differences").inner_text()
    assert "stage.0.lr" in differences and "0.001" in differences and "stage.0.data" not in differences


def test_the_crosshair_is_shared_and_zoom_reaches_every_chart(run, view):
    page = view(build([run]))
    box = page.locator("[data-chart=reward] .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.wait_for_function("document.querySelector('[data-chart=entropy] .when').textContent.startsWith('step ')")
    steps = page.locator(".chart:not([data-chart=frontier]) .when").all_inner_texts()
    assert set(steps) == {"step 60"}

    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60, steps=4)
    page.mouse.up()
    scales = (
        "report.charts.filter((c) => c.id !== 'frontier').map((c) => c.u.scales.x)"
        ".map((x) => [x.min, x.max].map(Math.round).join())"
    )
    page.wait_for_function(f"new Set({scales}).size === 1 && {scales}[0] === '60,90'")
    assert page.locator("#reset-zoom").is_visible()
    page.locator("[data-chart=entropy] .u-over").dblclick()
    page.wait_for_function(f"{scales}.every((s) => s === '0,120')")
    assert page.locator("#reset-zoom").is_hidden()


def test_smoothing_averages_the_line_and_keeps_what_was_recorded(run, view):
    page = view(build([run]))
    columns = (
        "(() => { const { data } = report.charts.find((c) => c.id === 'grad_norm').u; return [data[1], data[2]]; })()"
    )
    page.locator("#smooth").fill("0")
    page.wait_for_timeout(100)
    raw, line = page.evaluate(columns)
    assert raw == line
    page.locator("#smooth").fill("4")
    page.wait_for_timeout(100)
    again, smooth = page.evaluate(columns)
    assert again == raw and statistics.stdev(smooth[20:]) < 0.5 * statistics.stdev(raw)
    # the average is the exponential one with the bias of its start removed
    keep, total, weight = 1 - 2 / 21, 0.0, 0.0
    for x, y in zip(raw, smooth):
        total, weight = keep * total + (1 - keep) * x, keep * weight + (1 - keep)
        assert y == pytest.approx(total / weight)


def test_completions_can_be_filtered_and_sorted(run, view):
    page = view(build([run]))
    rows = [
        dict(r, step=s["step"], kind=s["kind"])
        for s in embedded(run / "report.html")["runs"][0]["rollouts"]["steps"]
        for r in s["rows"]
    ]

    def matching() -> int:
        return int(page.locator("#f-count").inner_text().split(" of ")[0].replace(",", ""))

    page.select_option("#f-step", "all")
    assert matching() == len(rows)
    page.select_option("#f-kind", "gold")
    assert matching() == sum(r["kind"] == "gold" for r in rows)
    page.select_option("#f-kind", "train")
    page.select_option("#f-stop", "eos")
    kept = [r for r in rows if r["kind"] == "train" and r["stop"] == "eos"]
    assert matching() == len(kept)
    page.fill("#f-low", "0.5")
    kept = [r for r in kept if r.get("reward", -1) >= 0.5]
    assert 0 < matching() == len(kept)
    page.fill("#f-text", "answer in DIGITS")
    assert 0 < matching() == sum(r["i"] % 2 for r in kept)
    page.fill("#f-text", "no such text")
    assert matching() == 0 and page.locator(".sample").count() == 0

    for field in ("#f-text", "#f-low"):
        page.fill(field, "")
    page.select_option("#f-stop", "")
    page.select_option("#f-sort", "tokens-")
    assert page.locator(".sample").count() == 12
    page.get_by_role("button", name="Show 12 more").click()
    texts = page.locator(".sample .facts").all_inner_texts()
    tokens = [int(re.search(r"tokens (\d+)", t)[1]) for t in texts]
    assert len(tokens) == 24 and tokens == sorted(tokens, reverse=True)
    page.select_option("#f-sort", "advantage+")
    first = page.locator(".sample .facts").first.inner_text()
    assert "−1.200" in first and "exact" in first and "weights" in first


def test_hostile_completions_stay_text(tmp_path, view):
    run = make_run(tmp_path / "<b>run", steps=2, texts=HOSTILE)
    page = view(build([run]))
    assert page.evaluate("window.pwned") is None
    assert page.locator("h1").inner_text() == "<b>run"
    page.select_option("#f-step", "2")
    blocks = page.locator(".text-block.completion").all_text_contents()
    assert HOSTILE[0] in blocks and HOSTILE[1] in blocks and HOSTILE[3] in blocks
    controls = next(b for b in blocks if "reversed" in b)
    assert controls == "U+202EreversedU+202C nulU+0000 bellU+0007 escapeU+001B[31m lineU+2028separator"
    assert any("48,000 characters left out" in b for b in blocks) and any(
        b.endswith("lone U+D83D surrogate") for b in blocks
    )
    assert "empty" in blocks
    assert page.locator("#samples img, #samples script, #samples style").count() == 0


def test_findings_are_listed_where_there_are_any(tmp_path, view):
    run = make_run(tmp_path / "r", steps=5)
    finding = {
        "code": "dead-groups",
        "severity": "warning",
        "step": 3,
        "symptom": "<i>no</i> signal",
        "cause": "too easy",
        "fix": "stage.0.data = 'harder'",
        "evidence": [float("nan")],
    }
    write_jsonl(run / "findings.jsonl", [finding])
    text = view(build([run])).locator("#findings").inner_text()
    assert "<i>no</i> signal" in text and "too easy" in text and "stage.0.data" in text and "step 3" in text
