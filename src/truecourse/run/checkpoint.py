"""Checkpoints: written aside, flushed, renamed; read back only when whole.

`checkpoints/step-25/` holds whatever its writer put there (plain Hugging Face weights beside the trainer's state) and
`manifest.json`: every file's size and xxh3-128 digest. The digest is there to catch a disk's mistakes, not an
attacker's; at some 20 GB/s it costs next to nothing beside the write, so that files of many GB are checked as well.
Names that begin with a dot are writes in flight, or what a kill left of them: they are never read as checkpoints, with
one exception. While the checkpoint of a step is being replaced the old one is called `.step-25.old`, and counts as step
25 for the instant in which there is no other.

No pickle is written or loaded: tensors are safetensors, all else is JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError

from truecourse.errors import RunError
from truecourse.run.files import disk_message, is_disk_error, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"


class CheckpointError(RunError):
    """A checkpoint could not be written, or none of those written can be read back whole."""


# -- writing ---------------------------------------------------------------------------------------------------------


def save(run_dir: str | Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write(folder)` fill a folder, then make it `checkpoints/step-STEP` in one rename. Returns its path.

    A checkpoint of the same step is replaced. Where anything fails the folder is removed and every earlier checkpoint
    is left whole. Raises `CheckpointError`, naming the path, the free space and the fix, where the disk was the reason.
    """
    root = Path(run_dir) / "checkpoints"
    final, aside, old = root / f"step-{step}", root / f".step-{step}.tmp", root / f".step-{step}.old"
    try:
        root.mkdir(exist_ok=True)
        _tidy(root)
        aside.mkdir()
        try:
            write(aside)
            _seal(aside, step)
            if final.exists():
                os.rename(final, old)
            os.rename(aside, final)
            sync_folder(root)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            if old.exists() and not final.exists():
                os.rename(old, final)
            raise
        _tidy(root)
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise CheckpointError(disk_message("write checkpoint", final, error)) from error
    return final


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write(aside)` fill a new folder beside checkpoints, sealed as they are, then give it its name in one rename.

    Raises `CheckpointError` as `save` does.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            write(aside)
            _seal(aside, 0)
            os.rename(aside, folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise CheckpointError(disk_message("write", folder, error)) from error


def prune(run_dir: str | Path, keep: Collection[int]) -> None:
    """Remove the checkpoints of all steps but those in `keep`; one that goes is renamed first, so none is ever half."""
    for step, path in found(run_dir):
        if step not in keep:
            _remove(path)


def drop_after(run_dir: str | Path, step: int) -> None:
    """Remove the checkpoints of later steps than `step`, newest first."""
    for later, path in found(run_dir):
        if later > step:
            _remove(path)


def tidy(run_dir: str | Path) -> None:
    """Clear what killed writes left; for the holder of the run's lock alone, before it reads or writes anything."""
    root = Path(run_dir) / "checkpoints"
    try:
        if root.is_dir():
            _tidy(root)
    except OSError as error:
        raise CheckpointError(disk_message("clear", root, error)) from error


def _seal(folder: Path, step: int) -> None:
    """Write the manifest, and flush every file and folder to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {"step": step, "files": {path.relative_to(folder).as_posix(): _measure(path) for path in paths}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in [*paths, folder / MANIFEST]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync_folder(path)


def _measure(path: Path) -> dict[str, Any]:
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def _remove(path: Path) -> None:
    aside = path.with_name(f".{path.name.strip('.').removesuffix('.old')}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside)


def _tidy(root: Path) -> None:
    """Half-written folders go; an old checkpoint whose replacement never came gets its name back."""
    for path in root.glob(".step-*.old"):
        final = root / path.name[1:].removesuffix(".old")
        if final.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, final)
    for path in root.glob(".step-*.tmp"):
        shutil.rmtree(path)


# -- reading ---------------------------------------------------------------------------------------------------------


def found(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint there is, newest first, unverified."""
    root = Path(run_dir) / "checkpoints"
    paths: dict[int, Path] = {}
    for path in root.glob("*") if root.is_dir() else ():
        if (match := re.fullmatch(r"step-(\d+)|\.step-(\d+)\.old", path.name)) and path.is_dir():
            step = int(match[1] or match[2])
            if match[1] or step not in paths:
                paths[step] = path
    return sorted(paths.items(), reverse=True)


def steps(run_dir: str | Path) -> list[int]:
    """Steps of the checkpoints there are, ascending."""
    return [step for step, _ in reversed(found(run_dir))]


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint: None where every file is as its manifest says, else a reason to print."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["size"]:
                return f"{name} has {size:,} bytes in place of {expected['size']:,}"
            if _measure(file) != expected:
                return f"the content of {name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def latest(run_dir: str | Path, warn: Callable[[str], None] | None = None) -> tuple[int, Path] | None:
    """(step, path) of the newest checkpoint that is whole; None where none was ever written.

    One that is damaged is passed over with a message to `warn` (by default a line on stderr). Raises `CheckpointError`
    where there are checkpoints and none is whole: to start again from nothing is for the user to say.
    """
    warn = warn or (lambda text: print(f"warning: {text}", file=sys.stderr, flush=True))
    damaged: list[tuple[Path, str]] = []
    for step, path in found(run_dir):
        problem = verify(path)
        if problem is None:
            for bad, reason in damaged:
                warn(f"checkpoint {bad} is damaged ({reason}); going back to the one before it that is whole, {path}")
            return step, path
        damaged.append((path, problem))
    if damaged:
        listed = "; ".join(f"{path}: {reason}" for path, reason in damaged)
        raise CheckpointError(
            f"no checkpoint of {run_dir} is whole ({listed}); restore one from a backup, "
            "or start again in another directory, for example --set out=runs/new"
        )
    return None


# -- a trainer's state -----------------------------------------------------------------------------------------------


def save_state(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write trainer.safetensors and trainer.json; `load_state` gives both back exactly.

    Tensors keep dtype, shape and bits, whatever their strides and whether they share memory (those that do are written
    once each). `state` holds None, bool, int, float, str, and lists and str-keyed dicts of these: anything else is a
    `TypeError`, because JSON would give back something else (a tuple a list, an int key a str).
    """
    from safetensors.torch import save_file

    _check_json(state, "state")
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    save_file(own, folder / "trainer.safetensors")
    (folder / "trainer.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, state) as `save_state` was given them. Raises `CheckpointError` where there is none."""
    from safetensors.torch import load_file

    try:
        return load_file(folder / "trainer.safetensors"), load_json(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no trainer state to resume from: {error}") from error


def load_json(folder: Path) -> dict[str, Any]:
    """The JSON part of `load_state` alone, without torch."""
    try:
        return json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no trainer state to resume from: {error}") from error


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}; JSON would give back a str")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"{where} is a {type(value).__name__}; JSON would not give it back as it is")
