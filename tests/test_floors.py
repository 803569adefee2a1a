"""Imports point one way: each room imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "truecourse"

FLOORS = [
    {"errors"},
    {"lab.tasks"},  # rows of the built-in tasks: plain data, behind the source `lab:NAME`
    {"objective", "data"},
    {"recipe"},
    {"model"},
    {"rollout", "rewards"},
    {"run"},
    {"methods"},
    {"trainer"},
    {"evaluate", "quickstart", "show", "starter"},
    {"cli", "__main__", "__init__"},
]
BESIDE = {"report": {"errors", "data", "objective", "recipe", "report"}}
"""Rooms that stand beside the floors, and all that they may import."""
LAB = {"lab"}
"""The laboratory may use anything and is used by nothing below the command line."""
LIGHT = ("errors", "recipe", "cli", "__init__", "data/sequences", "report")
"""Import no torch and no transformers, not even lazily at import time."""


def _files() -> list[Path]:
    return [p for p in ROOT.rglob("*.py") if p.name != "__init__.py" or p.parent != ROOT]


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "lab.tasks" if parts == ("lab", "tasks") else parts[0]


def _imports(path: Path, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _rooms_of(imports: set[str]) -> set[str]:
    rooms = set()
    for name in imports:
        parts = name.split(".")
        if parts[:3] == ["truecourse", "lab", "tasks"]:
            rooms.add("lab.tasks")
        elif parts[0] == "truecourse" and len(parts) > 1:
            rooms.add(parts[1])
    return {r for r in rooms if r == "lab.tasks" or (ROOT / r).is_dir() or (ROOT / f"{r}.py").is_file()}


def _breaches(room: str, imports: set[str]) -> set[str]:
    used = _rooms_of(imports) - {room}
    if room in BESIDE:
        return used - BESIDE[room]
    if room in LAB:
        return set()
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    if floor >= len(FLOORS) - 2:
        return {
            r for r in used if r not in BESIDE and r not in LAB and not any(r in FLOORS[i] for i in range(floor + 1))
        }
    below = set().union(*FLOORS[:floor])
    return used - below


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path):
    breaches = _breaches(_room(path), _imports(path))
    assert not breaches, f"{path.relative_to(ROOT)} imports {', '.join(sorted(breaches))}, which is not below it"


@pytest.mark.parametrize("name", LIGHT)
def test_light_files_import_no_torch(name: str):
    paths = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").is_file() else list((ROOT / name).glob("*.py"))
    for path in paths:
        heavy = {i.split(".")[0] for i in _imports(path, top_only=True)} & {"torch", "transformers", "peft", "datasets"}
        assert not heavy, f"{path.name} imports {heavy}"


def test_every_room_has_a_floor():
    known = set().union(*FLOORS) | set(BESIDE) | LAB
    assert {_room(p) for p in _files()} <= known


def test_the_check_can_fail():
    assert _breaches("objective", {"truecourse.model.policy"}) == {"model"}
    assert _breaches("model", {"truecourse.methods.grpo"}) == {"methods"}
    assert _breaches("report", {"truecourse.run.directory"}) == {"run"}
    assert not _breaches("methods", {"truecourse.model.policy", "truecourse.run.loop"})
