"""A run that was killed and resumed is the run that was never stopped: weights and records, bit for bit.

Runs happen in processes forked from a server that has imported the package once, so that a kill costs no start-up.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from truecourse.lab.tasks import task
from truecourse.run.directory import RunDirectory

FORKS = multiprocessing.get_context("forkserver")
PRELOAD = ["truecourse.trainer", "truecourse.lab.tiny", "scipy.stats", "transformers.models.llama.modeling_llama"]
PRELOAD += [
    "transformers.models.auto.modeling_auto",
    "transformers.tokenization_utils_tokenizers",
    "peft",
    "tyro",
    "jinja2",
    "rich",
]

REWARD = """
def digits(completion):
    return sum(c.isdigit() for c in completion) / max(1, len(completion))
"""
GRPO: dict[str, Any] = {
    "method": "grpo",
    "data": "sums.jsonl",
    "held_out": "held-out.jsonl",
    "lr": 0.01,
    "prompts_per_step": 4,
    "group_size": 4,
    "sampling": {"max_tokens": 8},
    "rewards": [{"use": "reward.py:digits"}],
    "gold": [{"use": "reward.py:digits"}],
    "gold_prompts": 8,
    "gold_every": 5,
}
SFT: dict[str, Any] = {
    "method": "sft",
    "data": "demos.jsonl",
    "held_out": "held-out.jsonl",
    "lr": 0.005,
    "batch_size": 4,
    "gold": [{"use": "reward.py:digits"}],
    "gold_sampling": {"temperature": 0.0, "max_tokens": 8},
    "gold_prompts": 8,
    "gold_every": 4,
}
QUICK = ("grpo", "moving-reference", "dapo", "lora-stages")
"""Cases that are killed in every test run; the others in the slow ones."""
CASES: dict[str, dict[str, Any]] = {
    "sft": {"stage": [SFT | {"steps": 12, "checkpoint_every": 3}]},
    # checkpoints fall inside a rollout, which is spent in 4 shares, twice
    "grpo": {
        "stage": [GRPO | {"steps": 18, "checkpoint_every": 3, "updates_per_rollout": 4, "epochs": 2, "beta": 0.05}]
    },
    "moving-reference": {
        "stage": [
            GRPO
            | {"steps": 12, "checkpoint_every": 1, "updates_per_rollout": 2, "beta": 0.1}
            | {"reference_every": 3, "reference_mix": 0.6}
        ]
    },
    "lora-dropout": {
        "lora": {"rank": 4, "dropout": 0.2},
        "stage": [GRPO | {"steps": 10, "checkpoint_every": 3, "updates_per_rollout": 2, "beta": 0.05}],
    },
    "dapo": {"stage": [GRPO | {"variant": "dapo", "steps": 10, "checkpoint_every": 3, "updates_per_rollout": 2}]},
    "stages": {
        "stage": [
            SFT | {"steps": 8, "checkpoint_every": 3},
            GRPO | {"steps": 8, "checkpoint_every": 3, "updates_per_rollout": 2, "epochs": 2, "reference_every": 3},
        ]
    },
    "lora-stages": {
        "lora": {"rank": 4, "dropout": 0.2},
        "stage": [
            SFT | {"steps": 6, "checkpoint_every": 2},
            GRPO | {"steps": 8, "checkpoint_every": 1, "updates_per_rollout": 4, "beta": 0.05},
        ],
    },
}


# -- processes --------------------------------------------------------------------------------------------------------


def _child(folder: str, log: str, die_at: int, slow: float, full_at: int, powerless: bool) -> None:
    """`truecourse train` or, where there is a run, `resume` in FOLDER.

    die_at: SIGKILL just before this operation on the run's files. slow: seconds that a checkpoint's write takes longer.
    full_at: from this operation on, no file can grow beyond 500 bytes: neither records, nor checkpoints, nor summaries.
    """
    os.chdir(folder)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    here, count = os.path.join(folder, "run"), 0
    if powerless:  # no capability: what a file's mode says holds for root too
        header = struct.pack("Ii", 0x20080522, 0)
        assert ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)) == 0, ctypes.get_errno()

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if not isinstance(args[0], int) and os.path.abspath(os.fsdecode(args[0])).startswith(here):
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if count == full_at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))

    from truecourse import cli
    from truecourse.run import checkpoint

    if slow:
        seal = checkpoint._seal
        checkpoint._seal = lambda *args: (Path("writing").touch(), time.sleep(slow), seal(*args))[2]
    sys.addaudithook(audit)
    code = cli.main(
        ["resume", "run", "--quiet"] if os.path.exists("run/recipe.toml") else ["train", "recipe.toml", "--quiet"]
    )
    sys.stderr.flush()
    if die_at == NEVER:
        Path(folder, "operations").write_text(str(count))
    sys.exit(code)


NEVER = 10**9


class Case:
    """A recipe in a folder of its own, and its run."""

    def __init__(self, folder: Path, model: Path, name: str, **changes: Any) -> None:
        self.folder, self.run, self.kills = folder, folder / "run", 0
        folder.mkdir(parents=True)
        table = {"model": str(model), "out": "run", "seed": 5, **CASES[name]}
        table["stage"] = [stage | changes for stage in table["stage"]]
        (folder / "recipe.toml").write_text(tomli_w.dumps(table))
        (folder / "reward.py").write_text(REWARD)
        for name, rows in (
            ("sums", task("sums")[:50]),
            ("held-out", task("sums-held-out")[:8]),
            ("demos", task("sums-demos")[:30]),
        ):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, *, die_at: int = 0, slow: float = 0.0, full_at: int = 0, powerless: bool = False) -> Any:
        """Train, or resume where there is a run."""
        (self.folder / "log.txt").write_text("")
        (self.folder / "writing").unlink(missing_ok=True)
        log = str(self.folder / "log.txt")
        process = FORKS.Process(target=_child, args=(str(self.folder), log, die_at, slow, full_at, powerless))
        process.start()
        return process

    def start_and_kill(self, after: float) -> None:
        """SIGKILL this many seconds after it has begun to train, or once it has ended."""
        process = self.start_training(may_end=True)
        time.sleep(after)
        process.kill()
        self.wait(process)

    def start_training(self, may_end: bool = False, **options: Any) -> Any:
        """`start`, and wait until it has done a step (or, where it may, has ended)."""
        process, before = self.start(**options), self.stamp()
        while process.is_alive() and self.stamp() == before:
            time.sleep(0.001)
        assert may_end or process.is_alive(), self.log()
        return process

    def start_writing(self, seconds: float = 30.0) -> Any:
        """`start`, and wait until it is writing a checkpoint, which takes it that long."""
        process = self.start(slow=seconds)
        while process.is_alive() and not (self.folder / "writing").exists():
            time.sleep(0.001)
        assert process.is_alive(), self.log()
        return process

    def stamp(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.stat().st_mtime_ns if path.is_file() and path.stat().st_size else 0

    def wait(self, process: Any, code: int | None = None) -> str:
        """What it printed. Its exit code must be `code`; left out, 0 or that of a kill."""
        process.join()
        log = self.log()
        assert process.exitcode == code if code is not None else process.exitcode in (0, -signal.SIGKILL), log
        self.kills += process.exitcode == -signal.SIGKILL
        return log

    def finish(self) -> dict[str, Any]:
        """Run to the end; what is there then, but for what no two runs share."""
        self.wait(self.start(die_at=NEVER), 0)
        assert RunDirectory.open(self.run).ended(), self.log()
        return contents(self.run)

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def operations(self) -> int:
        return int((self.folder / "operations").read_text())


def contents(run: Path) -> dict[str, Any]:
    """Every file of a run, but for clocks, memory, and where and when it ran."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or name in ("environment.json", "lock", "report.html"):
            continue
        found[name] = path.read_bytes()
        if name in ("metrics.jsonl", "evals.jsonl"):
            found[name] = [timeless(json.loads(line)) for line in found[name].splitlines()]
        elif name == "summary.json":
            found[name] = json.loads(found[name]) | {"seconds": None}
    return found


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if not k.startswith(("time/", "memory/")) and k != "tokens/per_second"}


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(got) == sorted(expected)
    for name in got:
        if name in ("metrics.jsonl", "evals.jsonl"):
            for a, b in zip(got[name], expected[name], strict=True):
                assert {k: v for k, v in a.items() if k not in b or b[k] != v} == {}, (name, a["step"])
    assert not [name for name in got if got[name] != expected[name]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from truecourse.lab.tiny import save_new

    folder = tmp_path_factory.mktemp("model") / "random"
    save_new(folder, 0)
    return folder


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    FORKS.set_forkserver_preload(PRELOAD)


@pytest.fixture
def place(model: Path) -> Iterator[Path]:
    """Where every run is made: paths are among what is compared."""
    yield model.parent / "case"
    shutil.rmtree(model.parent / "case", ignore_errors=True)


@pytest.fixture(scope="session")
def known() -> dict[str, Any]:
    return {}


@pytest.fixture
def uninterrupted(place: Path, model: Path, known: dict[str, Any]) -> Callable[[str], tuple[dict, float, int]]:
    """Contents, seconds and file operations of a run that nothing stops."""

    def go(name: str) -> tuple[dict[str, Any], float, int]:
        if name not in known:
            case = Case(place, model, name)
            began = time.monotonic()
            found = case.finish()
            known[name] = found, time.monotonic() - began, case.operations()
            shutil.rmtree(place)
        return known[name]

    return go


# -- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_a_killed_run_resumes_to_the_same_bits(name: str, uninterrupted: Any, place: Path, model: Path) -> None:
    expected, _, operations = uninterrupted(name)
    assert len([file for file in expected if file.startswith("checkpoints/")]) >= 6
    draw = random.Random(name)
    case = Case(place, model, name)
    case.wait(case.start(die_at=draw.randrange(operations // 2, operations)))  # at a file operation, somewhere
    assert list(case.run.glob("checkpoints/step-*")), "there is something to resume from"
    case.wait(case.start(die_at=draw.randrange(1, 6)))  # while it is being resumed
    case.start_and_kill(draw.uniform(0, 0.3))  # at a moment, soon after it goes on
    assert case.kills >= 2
    same(case.finish(), expected)


def test_a_kill_inside_a_checkpoint_write_costs_only_that_checkpoint(
    uninterrupted: Any, place: Path, model: Path
) -> None:
    expected, _, _ = uninterrupted("grpo")
    case = Case(place, model, "grpo")
    for earlier in ([], ["step-3"]):  # the first checkpoint is cut short, then the second
        process = case.start_writing()
        process.kill()
        case.wait(process, -signal.SIGKILL)
        assert [p.name for p in case.run.glob("checkpoints/step-*")] == earlier
        if not earlier:
            process = case.start()
            while not (case.run / "checkpoints" / "step-3").is_dir():
                time.sleep(0.001)
            process.kill()
            case.wait(process)
            shutil.rmtree(case.run / "checkpoints" / "step-6", ignore_errors=True)
    same(case.finish(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_many_random_moments(name: str, uninterrupted: Any, place: Path, model: Path) -> None:
    """5 runs of each kind, each killed up to 6 times: at moments, at file operations, inside checkpoint writes."""
    expected, seconds, operations = uninterrupted(name)
    draw, total, inside = random.Random(f"slow {name}"), 0, 0
    for _ in range(5):
        case = Case(place, model, name)
        for _ in range(6):
            kind = draw.choice(["moment", "operation", "write"])
            process = case.start(
                die_at=draw.randrange(1, operations // 3) if kind == "operation" else 0,
                slow=0.1 if kind == "write" else 0.0,
            )
            if kind == "moment":
                time.sleep(draw.uniform(0, seconds / 2))
                process.kill()
            elif kind == "write":
                while process.is_alive() and not (case.folder / "writing").exists():
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.12))
                inside += bool(list(case.run.glob("checkpoints/.step-*.tmp")))
                process.kill()
            case.wait(process)
        total += case.kills
        same(case.finish(), expected)
        shutil.rmtree(case.folder)
    print(f"{name}: {total} kills, {inside} inside a checkpoint write")
    assert total >= 12 and inside


@pytest.mark.slow
def test_the_quickstart_killed_25_times(place: Path) -> None:
    """The quickstart itself, in a process of its own each time, at moments of up to 8 seconds after its start."""

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "truecourse", "quickstart", "--quiet", "--out", "run"]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    process = start(place)
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    expected = contents(place / "run")
    shutil.rmtree(place)

    draw, kills = random.Random(25), 0
    while kills < 25:
        process, before = start(place), steps_done(place / "run")
        while process.poll() is None and steps_done(place / "run") == before:  # it is training again
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 8))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            same(contents(place / "run"), expected)
            shutil.rmtree(place)
        kills += process.returncode == -signal.SIGKILL
    process = start(place)
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    same(contents(place / "run"), expected)


def steps_done(run: Path) -> bytes:
    return (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").is_file() else b""


# -- signals ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_after_the_step_in_flight_with_a_checkpoint(uninterrupted: Any, place: Path, model: Path) -> None:
    expected, _, _ = uninterrupted("grpo")
    case = Case(place, model, "grpo")
    process = case.start_training()
    os.kill(process.pid, signal.SIGINT)
    log = case.wait(process, 130)
    run = RunDirectory.open(case.run)
    assert "stopping after the step in flight" in log and "truecourse resume run" in log
    assert json.loads((case.run / "summary.json").read_text())["status"] == "interrupted"
    assert (case.run / "report.html").is_file()
    step = run.metrics()[-1]["step"]
    assert step < 18 and (case.run / "checkpoints" / f"step-{step}").is_dir()
    same(case.finish(), expected)


def test_a_second_signal_quits_at_once(uninterrupted: Any, place: Path, model: Path) -> None:
    expected, _, _ = uninterrupted("sft")
    case = Case(place, model, "sft")
    process = case.start_writing()
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    while "Ctrl-C again" not in case.log():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    log = case.wait(process, 130)
    assert time.monotonic() - began < 15 and "Traceback" not in log and "truecourse resume run" in log
    assert not list((case.run / "checkpoints").iterdir()), "nothing half-written stays"
    assert json.loads((case.run / "summary.json").read_text())["status"] == "interrupted"
    same(case.finish(), expected)


def test_a_sigterm_between_stages_is_heard(uninterrupted: Any, place: Path, model: Path) -> None:
    expected, _, _ = uninterrupted("stages")
    case = Case(place, model, "stages")
    process = case.start()
    while not (case.run / "checkpoints" / "step-8").is_dir():
        assert process.is_alive(), case.log()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    case.wait(process, 130)
    assert all(record["stage"] == 0 or record["step"] == 9 for record in RunDirectory.open(case.run).metrics())
    same(case.finish(), expected)


# -- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.35, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.5, 0.65, 0.8))])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(
    share: float, uninterrupted: Any, place: Path, model: Path
) -> None:
    expected, _, operations = uninterrupted("grpo")
    case = Case(place, model, "grpo")
    log = case.wait(case.start(full_at=int(share * operations)), 1)
    assert log.count("error: could not") == 1 and "File too large" in log and "MiB are free" in log
    assert "truecourse resume" in log and "Traceback" not in log and "unexpected" not in log
    assert "summary.json" not in log, "the first thing that failed is the one to show"
    assert not list(case.run.rglob("*.tmp"))
    assert case.wait(case.start(full_at=1), 1).count("error: could not") == 1  # still full
    same(case.finish(), expected)


def test_a_small_disk_that_is_really_full(uninterrupted: Any, place: Path, model: Path) -> None:
    expected, _, _ = uninterrupted("sft")
    case = Case(place, model, "sft")
    case.run.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2900k", "tmpfs", case.run], capture_output=True)
    if mount.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        log = case.wait(case.start(), 1)
        assert "No space left on device" in log and "MiB are free" in log and "Traceback" not in log, log
        assert log.count("error: ") == 1 and "unexpected" not in log
        before = {p.name for p in case.run.glob("checkpoints/step-*")}
        assert before
        subprocess.run(["mount", "-o", "remount,size=64m", case.run], check=True)
        same(case.finish(), expected)
    finally:
        subprocess.run(["umount", case.run], check=True)


def test_a_read_only_folder_is_named_and_nothing_changes(uninterrupted: Any, place: Path, model: Path) -> None:
    expected, _, _ = uninterrupted("sft")
    case = Case(place, model, "sft")
    os.chmod(case.folder, 0o555)
    log = case.wait(case.start(powerless=True), 2)
    os.chmod(case.folder, 0o755)
    assert "is not writable; choose another directory" in log and "Traceback" not in log
    assert not case.run.exists()

    process = case.start_training()
    os.kill(process.pid, signal.SIGINT)
    case.wait(process, 130)
    before = tree(case.run)
    for path in (case.run, *case.run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    log = case.wait(case.start(powerless=True), 1)
    assert "Permission denied" in log and "make the folder writable" in log and "Traceback" not in log
    assert tree(case.run) == before
    for path in (case.run, *case.run.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    same(case.finish(), expected)


# -- resume -----------------------------------------------------------------------------------------------------------


def test_resuming_what_has_ended_changes_nothing(place: Path, model: Path) -> None:
    case = Case(place, model, "sft")
    case.finish()
    before = tree(case.run)
    log = case.wait(case.start(), 0)
    assert "has ended (finished): there is nothing to resume" in log
    assert tree(case.run) == before


def test_a_run_killed_while_it_is_made_is_made_again(uninterrupted: Any, place: Path, model: Path) -> None:
    """At each of its first operations on files: the folder, the recipe, the environment, the lock, the summary."""
    expected, _, _ = uninterrupted("sft")
    for die_at in range(1, 8):
        case = Case(place, model, "sft")
        case.wait(case.start(die_at=die_at), -signal.SIGKILL)
        assert not (case.run / "metrics.jsonl").exists()
        if die_at in (3, 5, 7):  # and once more, while that is mended
            case.wait(case.start(die_at=1), -signal.SIGKILL)
        if die_at in (2, 4, 5):
            same(case.finish(), expected)
            assert RunDirectory.open(case.run).environment()["versions"]
        shutil.rmtree(place)


def test_without_a_checkpoint_it_starts_again(uninterrupted: Any, place: Path, model: Path) -> None:
    expected, _, _ = uninterrupted("sft")
    case = Case(place, model, "sft")
    process = case.start_training()
    process.kill()
    case.wait(process)
    shutil.rmtree(case.run / "checkpoints", ignore_errors=True)
    assert RunDirectory.open(case.run).metrics()
    same(case.finish(), expected)


def test_a_run_that_another_process_trains_is_refused(place: Path, model: Path) -> None:
    case = Case(place, model, "sft")
    first = case.start_writing()
    before = tree(case.run)
    log = case.wait(case.start(), 2)
    assert f"is being trained by process {first.pid}" in log
    assert tree(case.run) == before
    first.kill()
    first.join()


def test_other_data_or_a_damaged_checkpoint_are_refused(place: Path, model: Path) -> None:
    data = model.parent / "data.jsonl"
    rows = [json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) for i in range(20)]
    data.write_text("\n".join(rows))
    case = Case(place, model, "sft", data=str(data), held_out=4, gold=[])
    process = case.start_training()
    os.kill(process.pid, signal.SIGINT)
    case.wait(process, 130)
    data.write_text("\n".join(row.replace("+1", "+2") for row in rows))
    before = tree(case.run / "checkpoints")
    assert "the training data, or how it is tokenised, is no longer what this run began with" in case.wait(
        case.start(), 2
    )
    assert tree(case.run / "checkpoints") == before
    data.write_text("\n".join(rows))
    (weights,) = case.run.glob("checkpoints/step-*/trainer.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    log = case.wait(case.start(), 1)
    assert "no checkpoint of run is whole" in log and "trainer.safetensors is not what was written" in log


def test_the_command_itself_in_a_process_of_its_own(uninterrupted: Any, place: Path, model: Path) -> None:
    expected, _, _ = uninterrupted("grpo")
    case = Case(place, model, "grpo")
    command = [sys.executable, "-m", "truecourse"]
    process = subprocess.Popen([*command, "train", "recipe.toml"], cwd=case.folder, stderr=subprocess.PIPE)
    while not list(case.run.glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = subprocess.run([*command, "resume", "run"], cwd=case.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished after 18 steps" in done.stdout
    same(contents(case.run), expected)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"}
