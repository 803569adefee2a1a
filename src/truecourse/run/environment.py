"""Where a run ran: versions and machine, nothing private."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

PACKAGES = ("truecourse", "torch", "transformers", "peft", "datasets", "tyro", "numpy", "safetensors")
BIT_FOR_BIT = ("versions", "python", "cpu", "threads", "gpus")
"""What results depend on bit for bit."""


def environment() -> dict[str, Any]:
    """What environment.json holds. No environment variables, user or host names; a key without a value is left out."""
    import torch

    record: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
        "gpus": [
            {"name": p.name, "memory_bytes": p.total_memory}
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }
    return {key: value for key, value in record.items() if value is not None}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two environments that may change results, each as "torch 2.13.0 → 2.14.0"."""
    changed = []
    for key in BIT_FOR_BIT:
        old, new = before.get(key), now.get(key)
        if key == "versions" and isinstance(old, Mapping) and isinstance(new, Mapping):
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            changed += [f"{name} {old.get(name)} → {new.get(name)}" for name in names]
        elif old is not None and old != new:
            changed.append(f"{key} {old} → {new}")
    return changed


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or None


def _commit() -> str | None:
    """The commit of the folder that the run was started in, with "-dirty" where files differ from it."""
    try:
        git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        answer = subprocess.run(git, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
