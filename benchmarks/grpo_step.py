"""One GRPO step of truecourse against one of TRL's, side by side: CPU time and peak memory.

    python benchmarks/grpo_step.py [--prompt-tokens 64 512] [--completion-tokens 64] [--repeats N] [--json FILE]

Each measurement is a process of its own with one thread, both sides in turn (A B A B). Both load one folder: a random
Qwen3-style model of 0.85 M parameters. They get the same prompts, sample 16 × 8 completions of exactly
`--completion-tokens` tokens at temperature 1 (the end token lies outside the vocabulary), score them with one reward
(the share of even token ids) and make one AdamW update of token-mean clipped loss. docs/benchmarks.md explains
what is measured and how each side was set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS, GROUP, VOCABULARY = 16, 8, 512
END = VOCABULARY  # an id that the tokenizer has and the model cannot produce
LR = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """What one measurement runs."""

    prompt_tokens: int = 64
    completion_tokens: int = 64
    beta: float = 0.0
    steps: int = 4
    """Steps measured, after `warmup` others."""
    warmup: int = 2
    micro_tokens: int = 2048
    """Ours: most tokens of a forward."""
    trl_batch: int = 32
    """TRL: `per_device_train_batch_size`; accumulation makes it 128 completions."""


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward of both sides."""
    return [sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]


# -- what both sides load ----------------------------------------------------------------------------------------------


def write_model(folder: Path, context: int) -> None:
    """A random model, and a tokenizer that reads `t3 t41` as ids 3 and 41."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=384, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = {**{f"t{i}": i for i in range(VOCABULARY)}, "<eos>": END, "<pad>": END + 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


def prompt_ids(case: Case, count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(VOCABULARY) for _ in range(case.prompt_tokens)] for _ in range(count)]


# -- measuring, inside a side's own process ----------------------------------------------------------------------------


class Meter:
    """CPU seconds (user and system, all threads) of each step, split in two, and peak memory over the start."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = list(parameters)
        self.before = [p.detach().clone() for p in self.parameters]
        self.base = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
        self.last = time.process_time()
        self.rollouts: list[float] = []
        self.steps: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def rollout_ended(self) -> None:
        self.rollouts.append(time.process_time() - self.last)

    def step_ended(self) -> None:
        now = time.process_time()
        self.steps.append(now - self.last)
        self.last = now

    def result(self, warmup: int) -> dict[str, Any]:
        peak = _memory("VmHWM")
        moved = max(float((p.detach() - b).abs().max()) for p, b in zip(self.parameters, self.before))
        kept = self.steps[warmup:]
        assert len(self.rollouts) == len(self.steps) == len(self.tokens), "a step without its rollout"
        return {
            "cpu_s": statistics.median(kept),
            "rollout_s": statistics.median(self.rollouts[warmup:]),
            "train_s": statistics.median(s - r for s, r in zip(kept, self.rollouts[warmup:])),
            "steps_s": [round(s, 4) for s in self.steps],
            "peak_mb": (peak - self.base) / 1024,
            "base_mb": self.base / 1024,
            "losses": self.losses,
            "tokens": self.tokens,
            "moved": moved,
        }


def _memory(key: str) -> int:
    """KiB, from Linux's own count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def run_ours(case: Case, folder: Path) -> dict[str, Any]:
    """The real GRPO step over the real policy and local engine, as the trainer puts them together."""
    import torch

    from truecourse import rewards
    from truecourse.data.sequences import Prompt
    from truecourse.data.template import Template
    from truecourse.methods.grpo import GRPO
    from truecourse.model import loading
    from truecourse.model.policy import Policy
    from truecourse.recipe import Grpo, RewardPart, Sampling
    from truecourse.trainer import engine_of, settle  # noqa: F401

    torch.set_num_threads(1)
    config = Grpo(
        data="-", prompts_per_step=PROMPTS, group_size=GROUP, micro_tokens=case.micro_tokens, beta=case.beta,
        sampling=Sampling(max_tokens=case.completion_tokens), kl_loss="k3" if case.beta else None, kl_every=1 << 40,
        rewards=(RewardPart(use=f"{Path(__file__).resolve()}:even_share"),),
    )  # fmt: skip
    loaded = loading.load(str(folder), device=torch.device("cpu"), dtype="float32")
    engine = engine_of(loaded, Template(loaded.tokenizer, None, loaded.end_ids))
    policy = Policy(
        loaded, reference="copy" if case.beta else "none", micro_tokens=case.micro_tokens, max_grad_norm=1.0
    )  # fmt: skip
    ids = prompt_ids(case, PROMPTS * 4)
    prompts = [Prompt(i, " ".join(f"t{t}" for t in row), tuple(row)) for i, row in enumerate(ids)]
    method = GRPO(config, policy, engine, rewards.build(config.rewards), prompts, seed=0)

    meter = Meter(policy.model.parameters())

    def phase(text: str) -> None:
        if text.startswith("training, micro-batch 1 "):
            meter.rollout_ended()

    for step in range(1, case.warmup + case.steps + 1):
        record = method.step(step, LR, phase).record
        meter.step_ended()
        meter.losses.append(record["loss"])
        meter.tokens.append(record["tokens/completion"])
    return meter.result(case.warmup)


def run_trl(case: Case, folder: Path) -> dict[str, Any]:
    """TRL's trainer without autocast, checkpointing, logging and saving: its fastest settings on a CPU."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    accumulate, left = divmod(PROMPTS * GROUP, case.trl_batch)
    assert not left, "--trl-batch must divide 128"
    texts = [" ".join(f"t{t}" for t in row) for row in prompt_ids(case, PROMPTS * 4)]
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=str(folder),
            reward_funcs=even_share,
            args=GRPOConfig(
                output_dir=out, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True,
                per_device_train_batch_size=case.trl_batch, gradient_accumulation_steps=accumulate,
                steps_per_generation=accumulate, num_generations=GROUP,
                max_completion_length=case.completion_tokens, temperature=1.0, loss_type="dapo", beta=case.beta,
                learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=1.0, optim="adamw_torch_fused",
                max_steps=case.warmup + case.steps, report_to=[], logging_strategy="no", save_strategy="no",
                disable_tqdm=True, dataloader_pin_memory=False, model_init_kwargs={"dtype": "float32"},
            ),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )  # fmt: skip
        meter = Meter(trainer.model.parameters())
        sample, compute_loss = trainer._generate_and_score_completions, trainer.compute_loss

        def timed_sample(inputs: Any) -> Any:
            batch = sample(inputs)
            meter.rollout_ended()
            meter.tokens.append(int(batch["completion_mask"].sum()))
            meter.losses.append(0.0)
            return batch

        def kept_loss(*args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(*args, **kwargs)
            meter.losses[-1] += float(loss.detach())
            return loss

        class AtStepEnd(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                meter.step_ended()

        trainer._generate_and_score_completions, trainer.compute_loss = timed_sample, kept_loss
        trainer.add_callback(AtStepEnd())
        meter.last = time.process_time()
        trainer.train()
        return meter.result(case.warmup)


SIDES = {"truecourse": run_ours, "trl": run_trl}


# -- side by side ------------------------------------------------------------------------------------------------------


def measure(side: str, case: Case, folder: Path) -> dict[str, Any]:
    """One side of one case in a fresh process; raises where it did not train."""
    work = json.dumps({"side": side, "folder": str(folder), **dataclasses.asdict(case)})
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--worker", work], env=environment, capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{side} failed on {case}:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    tokens = PROMPTS * GROUP * case.completion_tokens
    assert all(n == tokens for n in result["tokens"]), f"{side}: {result['tokens']} tokens, not {tokens} a step"
    assert all(abs(x) < 1e3 for x in result["losses"]), f"{side}: losses {result['losses']}"
    assert result["moved"] > 0, f"{side}: no weight moved"
    return result


def compare(case: Case, repeats: int, folder: Path) -> dict[str, Any]:
    """Both sides in turn, `repeats` times."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            runs[side].append(measure(side, case, folder))
    ours, theirs = runs["truecourse"], runs["trl"]
    row: dict[str, Any] = {"case": dataclasses.asdict(case), "runs": runs}
    for key in ("cpu_s", "rollout_s", "train_s", "peak_mb", "base_mb"):
        row[key] = {side: statistics.median(r[key] for r in runs[side]) for side in SIDES}
    pairs = [t["cpu_s"] / o["cpu_s"] for o, t in zip(ours, theirs)]
    row["times_faster"] = {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
    shares = [o["peak_mb"] / t["peak_mb"] for o, t in zip(ours, theirs)]
    row["share_of_memory"] = {"median": statistics.median(shares), "min": min(shares), "max": max(shares)}
    return row


COLUMNS = (
    "| prompt + completion | β | CPU s per step, ours (sampling + training) | TRL (same) | times less CPU (min–max) "
    "| peak memory, ours | TRL | share (min–max) |\n|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    case, faster, memory = row["case"], row["times_faster"], row["share_of_memory"]
    cpu = {
        side: f"{row['cpu_s'][side]:.2f} ({row['rollout_s'][side]:.2f} + {row['train_s'][side]:.2f})" for side in SIDES
    }
    return (
        f"| {case['prompt_tokens']} + {case['completion_tokens']} | {case['beta']:g} | {cpu['truecourse']} "
        f"| {cpu['trl']} | **{faster['median']:.2f}** ({faster['min']:.2f}–{faster['max']:.2f}) "
        f"| {row['peak_mb']['truecourse']:.0f} MB | {row['peak_mb']['trl']:.0f} MB "
        f"| **{memory['median']:.2f}** ({memory['min']:.2f}–{memory['max']:.2f}) |"
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--prompt-tokens", type=int, nargs="+", default=[64, 512])
    flags.add_argument("--completion-tokens", type=int, default=64)
    flags.add_argument("--beta", type=float, nargs="+", default=[0.0, 0.04], help="weight of the KL, on both sides")
    flags.add_argument("--repeats", type=int, default=3, help="pairs of processes for each case")
    flags.add_argument("--steps", type=int, default=Case.steps, help="steps measured in each process")
    flags.add_argument("--micro-tokens", type=int, default=Case.micro_tokens, help="ours: most tokens of a forward")
    flags.add_argument("--trl-batch", type=int, default=Case.trl_batch, help="TRL: per_device_train_batch_size")
    flags.add_argument("--json", type=Path, help="write every number of every run here")
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    given = flags.parse_args()
    if given.worker:
        work = json.loads(given.worker)
        side, folder = SIDES[work.pop("side")], Path(work.pop("folder"))
        print(json.dumps(side(Case(**work), folder)))
        return
    rows = []
    print(COLUMNS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, 2 * max(given.prompt_tokens) + 2 * given.completion_tokens)
        for prompt_tokens in given.prompt_tokens:
            for beta in given.beta:
                case = Case(
                    prompt_tokens, given.completion_tokens, beta, given.steps,
                    micro_tokens=given.micro_tokens, trl_batch=given.trl_batch,
                )  # fmt: skip
                rows.append(compare(case, given.repeats, folder))
                print(line(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
