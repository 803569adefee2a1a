"""The run room: records, checkpoints, schedule, trackers, progress, signals."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from truecourse import recipe as recipes
from truecourse.errors import RunError, UserError
from truecourse.run import checkpoint, trackers
from truecourse.run import directory as directories
from truecourse.run.directory import RunDirectory, summarise
from truecourse.run.environment import differences, environment
from truecourse.run.interrupt import StopFlag
from truecourse.run.progress import Progress
from truecourse.run.schedule import learning_rate

RECIPE = recipes.from_table(
    {
        "model": "tiny",
        "seed": 3,
        "lora": {"rank": 4},
        "stage": [
            {"method": "sft", "data": "lab:sums", "lr": 1e-6},
            {
                "method": "grpo",
                "data": ["a.jsonl", "b.jsonl"],
                "held_out": 0.25,
                "rewards": [{"use": "regex", "args": {"pattern": 'a "quoted" \\d+\n'}}],
                "gold": [{"use": "exact"}],
            },
        ],
    }
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", RECIPE, {"python": "3"})


def tree(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"}


def child(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# -- the directory -------------------------------------------------------------------------------------------------


def test_recipe_and_environment_come_back(run: RunDirectory) -> None:
    opened = RunDirectory.open(run.path)
    assert opened.recipe() == RECIPE
    assert opened.environment() == {"python": "3"}
    assert sorted(os.listdir(run.path)) == ["environment.json", "recipe.toml"]


def test_a_directory_in_use_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(UserError, match=rf"truecourse resume {re.escape(str(run.path))}.*--set out="):
        RunDirectory.create(run.path, RECIPE, {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex.*--set out="):
        RunDirectory.create(tmp_path / "full", RECIPE, {})
    for path in (tmp_path / "full" / "thesis.tex", tmp_path / "full" / "thesis.tex" / "run"):
        with pytest.raises(UserError, match="--set out="):
            RunDirectory.create(path, RECIPE, {})
    with pytest.raises(UserError, match="--set out="):
        RunDirectory.create("/proc/truecourse/run", RECIPE, {})
    assert tree(tmp_path) == before | {"full/thesis.tex": b"x"}


def test_an_empty_folder_or_the_leavings_of_a_killed_start_are_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.toml.tmp").write_text("mod")
    RunDirectory.check_free(tmp_path / "run")
    assert RunDirectory.create(tmp_path / "run", RECIPE, {}).recipe() == RECIPE


def test_open_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a run.*recipe\.toml"):
        RunDirectory.open(tmp_path)


def test_a_value_that_toml_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    part = recipes.RewardPart(use="exact", args={"answer": None})
    bad = recipes.Recipe(stage=(recipes.Grpo(data="x.jsonl", rewards=(part,)),))
    with pytest.raises(UserError, match=r"recipe\.toml"):
        RunDirectory.create(tmp_path / "run", bad, {})
    assert not (tmp_path / "run").exists()


# -- the lock ------------------------------------------------------------------------------------------------------

HOLD = """
    import os, sys, time
    from truecourse.run.directory import RunDirectory
    with RunDirectory(sys.argv[1]).lock():
        if sys.argv[2] == "fork" and os.fork() == 0:
            print(os.getpid(), flush=True)
            time.sleep(60)
            os._exit(0)
        elif sys.argv[2] == "hold":
            print("held", flush=True)
        time.sleep(60)
"""


def test_two_processes_never_train_in_one_directory(run: RunDirectory) -> None:
    holder = child(HOLD, run.path, "hold")
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process {holder.pid}"), run.lock():
            raise AssertionError("locked twice")
    finally:
        holder.kill()
        holder.wait()
    with run.lock(), pytest.raises(UserError, match=rf"process {os.getpid()}"), RunDirectory(run.path).lock():
        raise AssertionError("locked twice")
    with run.lock():
        pass


def test_a_forked_worker_that_outlives_its_trainer_does_not_hold_the_lock(run: RunDirectory) -> None:
    holder = child(HOLD, run.path, "fork")
    assert holder.stdout
    worker = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        with run.lock():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


# -- records -------------------------------------------------------------------------------------------------------


def test_records_round_trip_exactly_and_in_order(run: RunDirectory) -> None:
    import numpy as np
    import torch

    record = {"step": 1, "z": 0.1 + 0.2, "a": 5e-324, "big": 2**70, "text": "\ud800 é\u2028 NaN", "none": None}
    run.metric(record)
    run.metric({"step": 2, "nan": math.nan, "inf": [math.inf, -math.inf], "np": np.float32(0.1), "t": torch.tensor(7)})
    first, second = run.metrics()
    assert first == record and list(first) == list(record)
    assert math.isnan(second["nan"]) and second["inf"] == [math.inf, -math.inf]
    assert second["np"] == float(np.float32(0.1)) and second["t"] == 7
    lines = (run.path / "metrics.jsonl").read_bytes().split(b"\n")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines[:-1]] == [1, 2]
    with pytest.raises(TypeError, match="object"):
        run.metric({"step": 3, "x": object()})
    assert len(run.metrics()) == 2


def test_a_cut_last_line_is_no_record_and_nothing_is_glued_to_it(run: RunDirectory) -> None:
    for step in (1, 2):
        run.eval({"step": step})
    path = run.path / "evals.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert run.evals() == [{"step": 1}]
        run.eval({"step": 3})
        assert run.evals() == [{"step": 1}, {"step": 3}]


def test_a_damaged_line_in_the_middle_is_named(run: RunDirectory) -> None:
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
        run.metrics()
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
        run.rewind(3)
    run.rewind(1)  # the damage lies behind what is kept
    assert run.metrics() == [{"step": 1}]


def play(run: RunDirectory, first: int, last: int) -> None:
    """What a loop with gold and a checkpoint every 10 steps writes, a function of the step alone."""
    for step in range(first, last + 1):
        draw = random.Random(step)
        if step:
            run.rollouts(step, "step", [{"completion": "é\n" * 3, "reward": draw.random()} for _ in range(3)])
            run.metric(
                {"step": step, "stage": 0, "reward/mean": draw.random(), "kl/ref": math.nan if step == 7 else 0.1}
            )
        if step % 4 == 0:
            run.finding({"code": "x", "step": step})
        if step % 10 == 0:
            run.rollouts(step, "gold", [{"completion": "1", "reward": 1.0}])
            run.eval({"step": step, "stage": 0, "gold/exact": draw.random()})
            checkpoint.save(run.path, step, filled(str(step)))


@pytest.mark.parametrize("killed_at", [3, 10, 19, 25])
def test_rewound_and_replayed_is_the_same_to_the_byte(tmp_path: Path, killed_at: int) -> None:
    straight, broken = (RunDirectory.create(tmp_path / name, RECIPE, {}) for name in ("straight", "broken"))
    play(straight, 0, 30)
    play(broken, 0, killed_at)
    for name in ("metrics.jsonl", "findings.jsonl"):  # the kill came inside a line, and inside two atomic writes
        with open(broken.path / name, "ab") as file:
            file.write(b'{"step": 1, "rew')
    (broken.path / ".summary.json.tmp").write_bytes(b"{")
    (broken.path / "rollouts").mkdir(exist_ok=True)
    (broken.path / "rollouts" / ".step-000031.jsonl.tmp").write_bytes(b"{")
    (broken.path / "checkpoints" / ".step-40.tmp").mkdir(parents=True)
    found = checkpoint.latest(broken.path)
    assert found is not None and found[0] == killed_at // 10 * 10
    broken.rewind(found[0])
    play(broken, found[0] + 1, 30)
    for run in (straight, broken):
        run.summarise("finished")
    assert tree(broken.path) == tree(straight.path)


def test_rewinding_to_nothing_empties_the_run(run: RunDirectory) -> None:
    play(run, 0, 12)
    run.finding({"code": "before the first step"})
    run.rewind(-1)
    assert set(tree(run.path)) == {"recipe.toml", "environment.json"}


def test_rewinding_to_a_stage_boundary_drops_the_next_stages_start(run: RunDirectory) -> None:
    run.eval({"step": 0, "stage": 0})
    run.eval({"step": 10, "stage": 0})
    run.eval({"step": 10, "stage": 1})
    run.rewind(10)
    assert len(run.evals()) == 3
    run.rewind(10, stage=0)
    assert run.evals() == [{"step": 0, "stage": 0}, {"step": 10, "stage": 0}]


def test_rewinding_drops_later_checkpoints_so_that_two_histories_never_mix(run: RunDirectory) -> None:
    play(run, 0, 30)
    run.rewind(15)
    assert checkpoint.steps(run.path) == [0, 10]


# -- the summary ---------------------------------------------------------------------------------------------------


def test_the_summary_holds_the_contract(run: RunDirectory) -> None:
    run.metric({"step": 1, "tokens/prompt": 10, "tokens/trained": 5, "loss": 2.0, "time/step": 0.5, "time/train": 0.4})
    run.metric({"step": 2, "tokens/prompt": 10, "tokens/completion": 30, "tokens/trained": 20, "tokens/per_second": 9.0,
                "reward/mean": 0.25, "kl/ref": 0.01, "time/sample": 0.5, "time/train": 0.25})  # fmt: skip
    run.metric({"step": 3, "reward/mean": 0.5, "kl/ref": 0.02, "time/step": 1.0})
    for step, value in ((0, 0.3), (1, 0.6), (2, math.nan), (3, 0.6)):
        run.eval({"step": step, "gold/exact": value, "gold/exact/low": 0.0, "gold/exact/high": 1.0, "time/gold": 0.25})
    summary = run.summarise("finished", note="x")
    assert summary == json.loads((run.path / "summary.json").read_bytes())
    assert summary == {
        "method": "grpo",
        "stages": ["sft", "grpo"],
        "model": "tiny",
        "seed": 3,
        "steps": 3,
        "seconds": 3.25,
        "tokens": 55,
        "gold": {"exact": {"first": 0.3, "last": 0.6, "best": 0.6, "best_step": 1}},
        "reward": {"first": 0.25, "last": 0.5},
        "kl_ref": 0.02,
        "status": "finished",
        "loss": {"first": 2.0, "last": 2.0},
        "note": "x",
    }


def test_a_run_without_rewards_has_nulls_not_zeros() -> None:
    summary = summarise(RECIPE, [], [], "running")
    assert summary["reward"] == {"first": None, "last": None} and summary["kl_ref"] is None and summary["gold"] == {}


# -- checkpoints ---------------------------------------------------------------------------------------------------


def filled(text: str, files: int = 3):
    def write(folder: Path) -> None:
        (folder / "nested").mkdir()
        for i in range(files):
            (folder / ("nested" if i % 2 else ".") / f"{i}.bin").write_text(text * 1000)

    return write


def content(path: Path) -> set[str]:
    return {text for p in path.rglob("*.bin") for text in p.read_text()}


def silent(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


WRITER = """
    import sys, time
    from pathlib import Path
    from truecourse.run import checkpoint
    run = Path(sys.argv[1])
    found = checkpoint.latest(run)
    step = found[0] if found else 0
    def write(folder):
        for i in range(3):
            with open(folder / f"{i}.bin", "w") as file:
                for _ in range(8):
                    file.write(chr(97 + step % 26) * 1000)
                    file.flush()
                    time.sleep(0.0005)
    while True:
        step += 1
        checkpoint.save(run, step, write)
        print(step, flush=True)
        if step % 2 == 0:
            checkpoint.save(run, step, write)  # in place of itself
        checkpoint.prune(run, {step, step - step % 5})
"""


def test_a_kill_at_any_moment_of_a_checkpoint_leaves_a_whole_one(tmp_path: Path) -> None:
    dice, inside, before = random.Random(0), 0, 0
    for _ in range(25):
        writer = child(WRITER, tmp_path)
        assert writer.stdout
        first = int(writer.stdout.readline())
        assert first == before + 1
        time.sleep(dice.uniform(0, 0.06))
        writer.kill()
        done = [first, *map(int, writer.stdout.read().split())]
        writer.wait()
        inside += any((tmp_path / "checkpoints").glob(".step-*"))
        found = checkpoint.latest(tmp_path, silent)
        assert found is not None
        before, path = found
        assert done[-1] <= before <= done[-1] + 1, "a finished checkpoint was lost"
        assert content(path) == {chr(97 + before % 26)} and len(list(path.rglob("*.bin"))) == 3
    assert inside >= 10, "the kills missed the writes"


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_kill_before_each_single_system_call_leaves_a_whole_one(tmp_path: Path, again: bool) -> None:
    """Every rename, mkdir, fsync, unlink and rmdir of a save and a prune in turn is the last thing not done."""
    names = ("rename", "mkdir", "fsync", "unlink", "rmdir")
    for call in range(200):
        run = tmp_path / str(call)
        run.mkdir()
        checkpoint.save(run, 1, filled("a"))
        checkpoint.save(run, 2, filled("b"))
        pid = os.fork()
        if pid == 0:
            left = [call]

            def counted(original, left=left):
                def wrapped(*args, **kwargs):
                    if left[0] == 0:
                        os._exit(9)
                    left[0] -= 1
                    return original(*args, **kwargs)

                return wrapped

            for name in names:
                setattr(os, name, counted(getattr(os, name)))
            try:
                checkpoint.save(run, 2 if again else 3, filled("c"))
                checkpoint.prune(run, {2} if again else {3})
            except BaseException:
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 9)
        found = checkpoint.latest(run, silent)
        assert found is not None and found[0] in ((2,) if again else (2, 3))
        assert content(found[1]) in ({"b"}, {"c"}) and len(list(found[1].rglob("*.bin"))) == 3
        assert found[0] == 2 or content(found[1]) == {"c"}
        assert [checkpoint.verify(path) for _, path in checkpoint.found(run)] == [None] * len(checkpoint.found(run))
        with RunDirectory(run).lock():
            assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
                f"step-{n}" for n in checkpoint.steps(run)
            ]
            assert checkpoint.latest(run, silent) == (found[0], run / "checkpoints" / f"step-{found[0]}")
        checkpoint.save(run, 4, filled("d"))
        assert checkpoint.latest(run, silent) == (4, run / "checkpoints" / "step-4")
        assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
        if status == 0:
            assert call > 15, "the calls were not counted"
            return
    raise AssertionError("the save never ended")


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, filled("a"))
    path = checkpoint.save(tmp_path, 5, filled("b", files=2))
    assert content(path) == {"b"} and checkpoint.verify(path) is None and len(list(path.rglob("*.bin"))) == 2


def test_pruning_keeps_what_it_is_told(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, filled("a"))
    assert checkpoint.steps(tmp_path) == [9, 10, 100]
    checkpoint.prune(tmp_path, {9, 100, 7})
    assert checkpoint.steps(tmp_path) == [9, 100] and checkpoint.latest(tmp_path, silent)[0] == 100  # type: ignore[index]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: flip(p / "0.bin"), "content of 0.bin"),
        (lambda p: flip(p / "nested" / "1.bin"), "content of nested/1.bin"),
        (lambda p: (p / "2.bin").unlink(), "2.bin is missing"),
        (lambda p: (p / "2.bin").write_text("c"), "2.bin has 1 bytes in place of 1,000"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text('{"step"'), "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, capsys, damage, reason) -> None:
    checkpoint.save(tmp_path, 10, filled("a"))
    damage(checkpoint.save(tmp_path, 20, filled("b")))
    assert checkpoint.latest(tmp_path) == (10, tmp_path / "checkpoints" / "step-10")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and reason in warning and "step-20" in warning and "step-10" in warning
    damage(tmp_path / "checkpoints" / "step-10")
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint of .* is whole"):
        checkpoint.latest(tmp_path)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None and checkpoint.steps(tmp_path) == []


# -- disks that refuse ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int):
    """Writes past `size` bytes fail with EFBIG, after the part that fits: a full disk without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def assert_only_whole(run: Path, step: int) -> None:
    assert checkpoint.latest(run, silent) == (step, run / "checkpoints" / f"step-{step}")
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{step}"]


@pytest.mark.parametrize("kind", ["plain", "safetensors"])
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint_whole(tmp_path: Path, kind: str) -> None:
    import torch

    def tensors(folder: Path) -> None:
        checkpoint.save_state(folder, {"w": torch.zeros(10_000)}, {})

    write = tensors if kind == "safetensors" else filled("b" * 100)
    checkpoint.save(tmp_path, 1, filled("a"))
    with largest_file(20_000), pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.save(tmp_path, 2, write)
    for words in ("step-2", "File too large", "MiB are free", "Make room", "truecourse resume"):
        assert words in str(caught.value)
    assert_only_whole(tmp_path, 1)
    checkpoint.save(tmp_path, 2, write)
    assert checkpoint.latest(tmp_path, silent)[0] == 2  # type: ignore[index]


def test_a_record_that_does_not_fit_leaves_no_part_of_itself(run: RunDirectory) -> None:
    run.metric({"step": 1, "x": "y" * 100})
    before = (run.path / "metrics.jsonl").read_bytes()
    with largest_file(len(before) + 50), pytest.raises(RunError, match=r"metrics\.jsonl: File too large.*MiB are free"):
        run.metric({"step": 2, "x": "y" * 100})
    assert (run.path / "metrics.jsonl").read_bytes() == before
    with largest_file(50):
        with pytest.raises(RunError, match=r"step-000002\.jsonl"):
            run.rollouts(2, "step", [{"x": "y" * 100}])
        with pytest.raises(RunError, match=r"summary\.json"):
            run.summarise("running")
    assert set(tree(run.path)) == {"recipe.toml", "environment.json", "metrics.jsonl"}
    assert run.metrics() == [{"step": 1, "x": "y" * 100}]


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_any_refusal_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, call, code, again) -> None:
    checkpoint.save(tmp_path, 1, filled("a"))
    for skip in range(12):
        left, original = [skip], getattr(os, call)

        def refuse(*args, left=left, original=original, **kwargs):
            if left[0] == 0:
                left[0] = -1  # this one call; the clearing up goes through
                raise OSError(code, os.strerror(code))
            left[0] -= 1
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            try:
                checkpoint.save(tmp_path, 1 if again else 2, filled("b"))
            except checkpoint.CheckpointError as error:
                assert os.strerror(code) in str(error) and "checkpoints/step-" in str(error)
                found = checkpoint.latest(tmp_path, silent)
                assert found is not None and content(found[1]) in ({"a"}, {"b"})
                assert found[1].name == f"step-{found[0]}"
                assert not list((tmp_path / "checkpoints").glob(".*.tmp"))
            else:
                if left[0] >= 0:  # fewer calls than that: every one of them has been refused
                    assert skip > 0
                    return
                assert call == "mkdir" and skip == 0  # of `checkpoints`, which was there
        shutil.rmtree(tmp_path / "checkpoints")
        checkpoint.save(tmp_path, 1, filled("a"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.getuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_real_full_and_a_real_read_only_disk(small_disk: Path) -> None:
    run = RunDirectory.create(small_disk / "run", RECIPE, {})
    checkpoint.save(run.path, 1, filled("a"))
    with pytest.raises(checkpoint.CheckpointError, match=r"step-2: No space left on device; 1\.0 MiB are free"):
        checkpoint.save(run.path, 2, filled("b" * 1000))
    assert_only_whole(run.path, 1)
    while True:  # fill it with records
        try:
            run.metric({"step": 2, "x": "y" * 50_000})
        except RunError as error:
            assert "No space left" in str(error)
            break
    assert all(len(record["x"]) == 50_000 for record in run.metrics())
    run.rewind(1)  # gives the room back
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for action in (
        lambda: checkpoint.save(run.path, 2, filled("b")),
        lambda: run.metric({"step": 2}),
        lambda: run.rollouts(2, "step", []),
        lambda: run.summarise("failed"),
    ):
        with pytest.raises(RunError, match="Read-only file system"):
            action()
    with pytest.raises(UserError, match="--set out="):
        RunDirectory.create(small_disk / "other", RECIPE, {})
    assert_only_whole(run.path, 1)


# -- a trainer's state ---------------------------------------------------------------------------------------------


def test_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    import torch

    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=g)
    tensors = {
        "base": base,
        "shared": base,
        "row": base[2],
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(4, 8),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "empty too": torch.empty(0),
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
        "grad": torch.ones(3, requires_grad=True),
        "rng": torch.get_rng_state(),
        "bool": torch.tensor([True, False]),
        "long": torch.tensor([2**62, -(2**63)]),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.float8_e4m3fn):
        tensors[str(dtype)] = base.to(dtype)
    state = {
        "step": 25,
        "floats": [0.1, 1e-320, 1 / 3, -0.0, math.inf],
        "rng": {"state": 2**127 + 1, "inc": -1},
        "nested": {"a": [[1, 2.0], {"b": None, "c": True}], "": "é\ud800"},
    }
    checkpoint.save_state(tmp_path, tensors, state)
    back, plain = checkpoint.load_state(tmp_path)
    assert plain == state and checkpoint.load_json(tmp_path) == state
    assert [type(x) for x in plain["floats"]] == [float] * 5 and type(plain["nested"]["a"][0][1]) is float
    assert math.copysign(1, plain["floats"][3]) == -1
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        mine = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), mine), name
    assert sorted(os.listdir(tmp_path)) == ["trainer.json", "trainer.safetensors"]


@pytest.mark.parametrize("bad", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": [{"b": {1, 2}}]}])
def test_state_that_json_would_change_is_refused(tmp_path: Path, bad: dict) -> None:
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.save_state(tmp_path, {}, bad)


def test_a_checkpoint_without_trainer_state_is_told(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="no trainer state"):
        checkpoint.load_state(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="no trainer state"):
        checkpoint.load_json(tmp_path)


# -- the schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "share"), [(100, 0.05), (450, 0.1), (7, 0.3), (10, 0.0), (1, 0.0), (5, 1.0)])
def test_learning_rates_are_those_of_torch_and_transformers(total: int, share: float) -> None:
    import torch
    from transformers import get_constant_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup

    warmup, peak = math.ceil(share * total), 3e-4

    def peer(make) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        scheduler, rates = make(optimizer), []
        for _ in range(total):
            optimizer.step()
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
        return rates

    def ours(schedule) -> list[float]:
        return [learning_rate(step, total, peak, share, schedule) for step in range(1, total + 1)]

    cosine = peer(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, warmup, total, min_lr_rate=0.1))
    assert ours("cosine") == pytest.approx(cosine, rel=1e-12)
    assert ours("constant") == pytest.approx(peer(lambda o: get_constant_schedule_with_warmup(o, warmup)), rel=1e-12)
    if warmup < total:
        lr = torch.optim.lr_scheduler
        linear = peer(lambda o: lr.LinearLR(o, 1.0, 0.1, total_iters=total - warmup))[: total - warmup]
        assert ours("linear")[warmup:] == pytest.approx(linear, rel=1e-9)


def test_learning_rates_by_hand() -> None:
    assert learning_rate(1, 100, 1.0, 0.05, "cosine") == 0.2
    assert learning_rate(5, 100, 1.0, 0.05, "linear") == 1.0
    assert learning_rate(55, 105, 1.0, 5 / 105, "cosine") == pytest.approx(0.55)
    assert learning_rate(55, 105, 1.0, 5 / 105, "linear") == pytest.approx(0.55)
    assert [learning_rate(100, 100, 1.0, 0.05, s) for s in ("cosine", "linear", "constant")] == pytest.approx(
        [0.1, 0.1, 1]
    )
    assert learning_rate(7, 100, 1.0, 0.07, "constant") == 1.0 > learning_rate(6, 100, 1.0, 0.07, "constant")


# -- trackers ------------------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_records_and_a_resume_goes_on(run: RunDirectory) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def record(step: int) -> dict:
        return {"step": step, "method": "grpo", "flag": True, "reward/mean": step / 2, "tokens/prompt": step}

    if (pid := os.fork()) == 0:
        first = trackers.tracker("tensorboard", run.path, RECIPE)
        for step in range(1, 8):
            first.log(step, record(step))
        os.kill(os.getpid(), signal.SIGKILL)  # at step 7, with a checkpoint of step 5
    os.waitpid(pid, 0)
    time.sleep(1.1)  # TensorBoard reads its files in order of their names, which hold the second and the process
    second = trackers.tracker("tensorboard", run.path, RECIPE, step=5)
    for step in range(6, 9):
        second.log(step, record(step))
    second.close()
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["reward/mean", "tokens/prompt"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(s, s / 2) for s in range(1, 9)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_one_at_the_tracker(run: RunDirectory, monkeypatch, name: str) -> None:
    calls: list[tuple] = []
    fake = types.SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda numbers, step: calls.append(("log", numbers, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    for step in (1, 2):
        tracker = trackers.tracker(name, run.path, RECIPE, step=step - 1)
        tracker.log(step, {"step": step, "stage": 0, "method": "grpo", "reward/mean": 0.5, "x": None})
        tracker.close()
    (_, first), log, finish, (_, second), *_ = calls
    assert log == ("log", {"stage": 0, "reward/mean": 0.5}, 1) and finish == ("finish",)
    assert first == second and first["resume"] == "allow" and first["project"] == "truecourse"
    assert first["config"]["stage"][1]["method"] == "grpo"
    assert json.loads((run.path / "tracker.json").read_bytes())["id"] in (first.get("id") or first["name"])


def test_a_missing_tracker_names_the_extra_and_a_failing_one_does_not_stop_the_run(run, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    for action in (lambda: trackers.check("wandb"), lambda: trackers.tracker("wandb", run.path, RECIPE)):
        with pytest.raises(UserError, match=r"pip install 'truecourse\[wandb\]'"):
            action()
    trackers.check("none")
    assert not (run.path / "tracker.json").exists()

    def fail(*args, **kwargs) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=fail, log=fail, finish=fail))
    with pytest.raises(UserError, match=r"could not start \(ConnectionError: no network\).*tracker = \"none\""):
        trackers.tracker("wandb", run.path, RECIPE)
    sys.modules["wandb"].init = lambda **options: None  # type: ignore[attr-defined]
    tracker = trackers.tracker("wandb", run.path, RECIPE)
    for step in (1, 2):
        tracker.log(step, {"step": step})
    tracker.close()
    warning = capsys.readouterr().err
    assert warning.count("wandb failed (ConnectionError: no network)") == 1 and warning.count("\n") == 1


# -- progress ------------------------------------------------------------------------------------------------------

METRICS = {"reward/mean": 0.53, "kl/ref": 0.012, "length/mean": 34.2, "tokens/per_second": 1234.5, "loss": 0.1}
GOLD = {"gold/exact": 0.42, "gold/exact/low": 0.3, "gold/exact/high": 0.5, "n": 100}


def play_progress(progress: Progress, steps: int = 6) -> None:
    progress.gold(0, GOLD | {"gold/exact": 0.31})
    for step in range(1, steps + 1):
        progress.phase("sampling 512 tokens")
        progress.update(step, METRICS)
        if step % 3 == 0:
            progress.gold(step, GOLD)


def test_progress_in_a_log_file_is_plain_lines(capsys) -> None:
    with Progress(6, title="grpo run") as progress:
        play_progress(progress)
        progress.note("a \x1b[31mred\x1b[0m note\r\x07")
    out, err = capsys.readouterr()
    assert out == "" and not re.search(r"[^\n -~→�]", err)
    lines = err.splitlines()
    assert lines[0] == "step 0/6  gold exact 0.310"
    # Six quick steps: no line of their own but the last one's; a line for each gold measurement.
    assert [line.split("  ")[0] for line in lines[:-1]] == ["step 0/6", "step 3/6", "step 6/6"]
    shown = "reward 0.530  gold exact 0.310 → 0.420  KL 0.012  length 34.2  1,234 tokens/s"
    assert shown in lines[2] and lines[2].endswith("0:00 left")
    assert "sampling" not in err


def test_progress_shows_what_exists_and_time_left(monkeypatch, capsys) -> None:
    clock = [100.0]
    monkeypatch.setattr("truecourse.run.progress.time.monotonic", lambda: clock[0])
    with Progress(200, done=50, title="sft") as progress:
        assert progress.left() is None
        clock[0] += 60  # building, the first gold
        progress.gold(80, {"gold/exact": 0.5, "loss/held_out": 2.0})
        for step in (81, 82, 83):  # a resumed run goes on past `done`
            clock[0] += 4
            progress.update(step, {"loss": 1.5, "tokens/prompt": 3})
        assert progress.left() == pytest.approx(4 * 117)
        assert progress.fields() == ["gold exact 0.500", "held-out loss 2.000", "loss 1.500"]
    lines = capsys.readouterr().err.splitlines()
    assert [line[:12] for line in lines] == ["step  80/200", "step  83/200"]  # 12 s later
    assert lines[-1].endswith("loss 1.500  7:48 left")
    with Progress(200, quiet=True) as progress:
        play_progress(progress, 3)
        progress.note("still said")
    assert capsys.readouterr().err == "still said\n"


def test_progress_recalls_the_gold_of_before_a_resume(capsys) -> None:
    with Progress(10, done=5) as progress:
        progress.recall([{"gold/exact": 0.25}, {"gold/exact": 0.5}])
        assert progress.fields() == ["gold exact 0.250 → 0.500"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_progress_leaves_the_terminal_as_it_was(monkeypatch, error) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    before = sys.stdout, sys.stderr
    with os.fdopen(slave, "w") as terminal:
        context = pytest.raises(error) if error else contextlib.nullcontext()
        with context, Progress(6, title="grpo run", file=terminal) as progress:
            play_progress(progress, 3)
            progress.phase("sampling 512 tokens")
            progress.note("a note")
            time.sleep(0.4)
            if error:
                raise error
        assert (sys.stdout, sys.stderr) == before
        terminal.flush()
        os.set_blocking(master, False)
        text = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(master, 1 << 16):
                text += chunk
    os.close(master)
    shown = text.decode()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"
    for words in (
        "grpo run",
        "step 3/6",
        "━",
        "sampling 512 tokens",
        "a note",
        "reward 0.530",
        "tokens/s",
        "0:00 left",
    ):
        assert words in shown, words


# -- signals -------------------------------------------------------------------------------------------------------

STOPPABLE = """
    import signal, sys, time
    from truecourse.run.interrupt import StopFlag
    try:
        with StopFlag() as flag:
            print("ready", flush=True)
            for _ in range(1000):
                time.sleep(0.01)
                if flag.requested and sys.argv[1] == "polite":
                    print("stopped by", flag.signal.name, flush=True)
                    break
        print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
        print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)
    except KeyboardInterrupt:
        print("at once", signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_insists(number: signal.Signals) -> None:
    polite, deaf = child(STOPPABLE, "polite"), child(STOPPABLE, "deaf")
    for process in (polite, deaf):
        assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
        process.send_signal(number)
    assert deaf.stderr and [deaf.stderr.readline() for _ in range(2)][1].startswith("stopping after the step in flight")
    deaf.send_signal(number)
    out, err = polite.communicate(timeout=10)
    assert out == f"stopped by {number.name}\nTrue\nTrue\n" and "press Ctrl-C again" in err
    out, err = deaf.communicate(timeout=10)
    assert out == "at once True\n" and err == "" and deaf.returncode == 0


def test_signals_in_another_thread_are_left_alone() -> None:
    import threading

    seen: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with StopFlag() as flag:
            seen.extend([signal.getsignal(signal.SIGINT) is before, flag.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, False]


def test_news_inside_a_buffered_write_still_arrives(capfd) -> None:
    def reentrant(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with StopFlag(reentrant) as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested and flag.signal == signal.SIGTERM
    assert "stopping after the step in flight" in capfd.readouterr().err


# -- the environment -----------------------------------------------------------------------------------------------


def test_the_environment_is_told_without_secrets(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    record = environment()
    assert {"started", "command", "versions", "python", "platform", "cpu", "cpus", "threads", "gpus"} <= set(record)
    assert record["versions"]["torch"] and "hf_verysecret" not in json.dumps(record)
    assert json.loads(directories.dumps(record)) == record
    monkeypatch.chdir(tmp_path)
    assert "commit" not in environment()


def test_a_change_of_environment_is_named() -> None:
    now = environment()
    assert differences(now, now) == [] and differences({}, now) == []
    before = now | {"versions": now["versions"] | {"torch": "1.0"}, "threads": 64, "started": "then"}
    assert differences(before, now) == [f"torch 1.0 → {now['versions']['torch']}", f"threads 64 → {now['threads']}"]


# -- the room ------------------------------------------------------------------------------------------------------


def test_the_room_opens_without_torch() -> None:
    code = """
        import sys
        from truecourse.run import checkpoint, directory, environment, interrupt, progress, schedule, trackers
        print([name for name in ("torch", "transformers", "rich", "numpy") if name in sys.modules])
    """
    assert child(code).communicate(timeout=60)[0] == "[]\n"
