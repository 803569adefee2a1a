"""What GRPO adds to the shipped tiny model, beside its control: SFT alone on the same demonstrations, run longer.

    python benchmarks/tiny_grpo.py [--seeds 0 1 2] [--runs runs/tiny] [--svg docs/grpo-curve.svg]

Three GRPO runs (the quickstart's recipe) and three controls: SFT from the same start on the demonstrations that it was
made from, for 1,200 steps (the start itself took a few hundred). Both are measured greedily on the same 500 held-out
sums. For the control, the best measurement of the whole run counts, which favours it. Runs that are there already are
continued or shown, so the command may be killed and run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
from pathlib import Path

from truecourse import Recipe, RewardPart, Sampling, Sft, trainer
from truecourse.quickstart import recipe as quickstart
from truecourse.run.directory import RunDirectory

CONTROL = Sft(
    data="lab:sums-demos",
    held_out="lab:sums-held-out",
    steps=1200,
    lr=1e-3,
    batch_size=32,
    gold=(RewardPart(use="exact", name="correct"),),
    gold_sampling=Sampling(temperature=0.0, max_tokens=8),
    gold_prompts=500,
    gold_every=75,
)


def recipe(kind: str, seed: int, out: Path) -> Recipe:
    if kind == "grpo":
        return quickstart(seed, out)
    return dataclasses.replace(Recipe(model="tiny", out=str(out), seed=seed, device="cpu", stage=(CONTROL,)))


def curve(kind: str, seed: int, folder: Path) -> tuple[list[tuple[int, float]], float]:
    """(step, gold) of one run, made now if it is not there, and the CPU seconds that it took just now."""
    out, before = folder / f"{kind}-{seed}", resource.getrusage(resource.RUSAGE_SELF).ru_utime
    if (out / "recipe.toml").is_file():
        trainer.resume(out)
    else:
        trainer.train(recipe(kind, seed, out))
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    return [(r["step"], r["gold/correct"]) for r in RunDirectory.open(out).evals()], spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="folder for the runs")
    parser.add_argument("--svg", type=Path, help="draw the curves here")
    args = parser.parse_args()
    curves: dict[str, list[list[tuple[int, float]]]] = {"grpo": [], "sft": []}
    print("| run | seed | start | end | best | gain, points | CPU s |\n|---|---|---|---|---|---|---|")
    for kind, found in curves.items():
        for seed in args.seeds:
            points, spent = curve(kind, seed, args.runs)
            found.append(points)
            first, last, best = points[0][1], points[-1][1], max(v for _, v in points)
            counted = last if kind == "grpo" else best
            gain = 100 * (counted - first)
            print(f"| {kind} | {seed} | {first:.3f} | {last:.3f} | {best:.3f} | {gain:+.1f} | {spent:.0f} |")
    if args.svg:
        args.svg.write_text(svg(curves), encoding="utf-8")


def svg(curves: dict[str, list[list[tuple[int, float]]]]) -> str:
    """Held-out accuracy against the share of each run's steps: one line for each run."""
    width, height, left, bottom = 640, 320, 48, 40
    colours = {"grpo": "#1f6fb4", "sft": "#b4641f"}
    labels = {"grpo": "GRPO, 400 steps", "sft": "control: SFT alone on the same demonstrations, 1,200 steps"}

    def at(x: float, y: float) -> str:
        return f"{left + x * (width - left - 12):.1f},{12 + (1 - y) * (height - bottom - 12):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = at(0, tick).split(",")
        parts.append(f'<path d="M{at(0, tick)} L{at(1, tick)}" stroke="#ddd"/>')
        parts.append(f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">{tick:.0%}</text>')
    for kind, runs in curves.items():
        for points in runs:
            end = points[-1][0]
            line = " ".join(at(step / end, value) for step, value in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[kind]}" stroke-width="1.8"/>')
    for i, (kind, label) in enumerate(labels.items()):
        x, y = left + 200, height - bottom - 40 + 18 * i
        parts.append(f'<path d="M{x},{y - 4} h20" stroke="{colours[kind]}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 26}" y="{y}">{label}</text>')
    caption = "held-out sums right, greedy, against the share of each run's steps"
    parts.append(f'<text x="{left}" y="{height - 12}">{caption}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
