"""A user's reward, found by name and called in whichever form it is written."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from truecourse.errors import UserError
from truecourse.recipe import RewardPart
from truecourse.rewards.builtins import BUILTINS

# -- finding it -------------------------------------------------------------------------------------------------------


def load(part: RewardPart, base: Path, modules: dict[str, ModuleType]) -> Any:
    """The object that `part.use` names, instantiated with `part.args` if it is a class, else with them bound.

    `modules` holds the files already run for this reward, so that two parts from one file share it.
    Raises `UserError` naming the nearest built-in, file, module or attribute.
    """
    where = f"reward {part.label!r}"
    place, colon, name = part.use.rpartition(":")
    if not colon:
        if part.use in BUILTINS:
            return _instantiate(BUILTINS[part.use], part.args, where)
        form = "your own is `package.module:function` or `path/to/file.py:function`"
        raise UserError(f"{where}: use = {part.use!r} is no built-in{nearest(part.use, BUILTINS)}; {form}")
    if place.endswith(".py") or "/" in place:
        target: Any = _load_file(base / place, where, modules)
    else:
        target = _load_module(place, base, where)
    for attribute in name.split("."):
        if not hasattr(target, attribute):
            public = [n for n, v in getattr(target, "__dict__", {}).items() if callable(v) and not n.startswith("_")]
            raise UserError(f"{where}: {place} has no {attribute!r}{nearest(attribute, public)}")
        target = getattr(target, attribute)
    if inspect.isclass(target):
        return _instantiate(target, part.args, where)
    if not callable(target) and not callable(getattr(target, "score", None)):
        raise UserError(
            f"{where}: {part.use} is a {type(target).__name__}; a function, or an object with `score`, is needed"
        )
    if part.args:
        if hasattr(target, "score"):
            raise UserError(f"{where}: args go to a function or a class, but {part.use} is an object already made")
        _check_args(target, part.args, where)
        return functools.partial(target, **part.args)
    return target


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` or the list of what there is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is: {', '.join(sorted(known)[:20])}" if known else ""


def _instantiate(cls: type, args: Mapping[str, Any], where: str) -> Any:
    _check_args(cls, args, where)
    try:
        return cls(**args)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:
        raise UserError(f"{where}: {cls.__name__} cannot be made: {type(error).__name__}: {error}") from error


def _check_args(target: Callable, args: Mapping[str, Any], where: str) -> None:
    try:
        parameters = inspect.signature(target).parameters
    except (ValueError, TypeError):
        return
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in args:
        if name not in parameters and not rest:
            raise UserError(f"{where}: unknown argument {name!r}{nearest(name, parameters)}")
    if inspect.isclass(target):
        for name, p in parameters.items():
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in args:
                raise UserError(f"{where}: args lacks {name!r}, which {target.__name__.lower()} needs")


def _load_file(path: Path, where: str, modules: dict[str, ModuleType]) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        there = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"{where}: file {str(path)!r} does not exist{nearest(path.name, there)}")
    if str(path) in modules:
        return modules[str(path)]
    _searchable(path.parent)
    name = f"{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _not_imported(where, path.name, error) from error
    modules[str(path)] = module
    return module


def _load_module(name: str, base: Path, where: str) -> ModuleType:
    _searchable(base.resolve())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not (name == missing or name.startswith(missing + ".")):  # one of its own imports
            raise _not_imported(where, name, error) from error
        parent, _, last = missing.rpartition(".")
        inside = getattr(sys.modules.get(parent), "__path__", None) if parent else None
        there = [m.name for m in pkgutil.iter_modules(inside)]
        close = difflib.get_close_matches(last, there, n=1, cutoff=0.5)
        hint = (
            f"; did you mean {close[0]!r}?"
            if close
            else f"; it is looked for beside the recipe ({base}) and on sys.path"
        )
        raise UserError(f"{where}: there is no module {missing!r}{hint}") from None
    except (Exception, SystemExit) as error:
        raise _not_imported(where, name, error) from error


def _searchable(folder: Path) -> None:
    """Behind everything else, so that a user's `random.py` shadows nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _not_imported(where: str, name: str, error: BaseException) -> UserError:
    return UserError(f"{where}: {name} cannot be imported: {type(error).__name__}: {error}")


# -- its form ---------------------------------------------------------------------------------------------------------

BATCH = {"prompts", "completions", "completion_ids"}
"""Any of these parameters makes a function TRL's form: one call for all completions, with aligned lists."""
_SINGLE = {"prompt", "completion"}
_OFFERED = {"log_metric", "log_extra"}
_RESERVED = BATCH | _SINGLE | _OFFERED | {"trainer_state"}


@dataclass(frozen=True)
class Form:
    """How a function is called, read from its signature."""

    function: Callable
    batch: bool
    """TRL's form, one call for all; otherwise one call per completion."""
    is_async: bool
    names: frozenset[str]
    """Parameters taken by name."""
    rest: bool
    """It has **kwargs: it gets every column."""
    bound: frozenset[str]
    """Parameters already filled by `args`; columns of that name are not passed."""
    columns: tuple[str, ...]
    """Columns that it cannot be called without."""

    def arguments(self, columns: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """What it is called with. Raises `UserError` for a column it needs that is not there."""
        for name in self.columns:
            if name not in columns:
                raise UserError(f"needs the column {name!r}{nearest(name, columns) or '; the row has no columns'}")
        passed = {
            k: v for k, v in columns.items() if k not in _RESERVED | self.bound and (self.rest or k in self.names)
        }
        offered = {k: v for k, v in given.items() if k in self.names or (self.rest and k not in self.bound)}
        return passed | offered


def form_of(target: Any, where: str) -> Form:
    """The form of a loaded reward. Raises `UserError` where the signature does not tell."""
    function = target.score if callable(getattr(target, "score", None)) else target
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        raise UserError(
            f"{where}: the parameters of {function!r} cannot be read; wrap it in a Python function"
        ) from None
    by_name = {n: p for n, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.POSITIONAL_ONLY for p in signature.parameters.values()) or not set(by_name) & (BATCH | _SINGLE):
        raise UserError(
            f"{where}: its parameters are {signature}; one must be called `completion` (the text of one), "
            "or `completions` (a list, as in TRL), so that it is clear what to pass"
        )
    bound, inner = frozenset[str](), function
    while isinstance(inner, functools.partial):
        bound |= frozenset(inner.keywords)
        inner = inner.func
    needed = [n for n, p in by_name.items() if p.default is p.empty and n not in bound]
    batch = bool(set(by_name) & BATCH)
    given = _OFFERED | (BATCH if batch else _SINGLE)
    for name in needed:
        if name in _RESERVED - given:
            other = "a TRL trainer's, which this is not" if name == "trainer_state" else "of the other form"
            raise UserError(f"{where}: the parameter {name!r} is {other}; its parameters are {signature}")
    declared = [c for c in getattr(target, "columns", ()) if c not in needed]
    return Form(
        function=function,
        batch=batch,
        is_async=inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None)),  # noqa: B004
        names=frozenset(by_name) - bound,
        rest=any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()),
        bound=bound,
        columns=tuple(n for n in needed if n not in given) + tuple(declared),
    )


# -- what it returns --------------------------------------------------------------------------------------------------


class BadScore(Exception):
    """A returned value that is no score; the message says why."""


@dataclass(frozen=True)
class Score:
    """One completion's score by one part."""

    value: float | None
    """None: the part does not apply to this sample."""
    named: dict[str, float | None] = field(default_factory=dict)
    steps: list[float] | None = None


def read_score(value: Any) -> Score:
    """A returned value as a score: a number or bool, None, a dict of named numbers, or a list of step scores."""
    value = _plain(value)
    if value is None:
        return Score(None)
    if isinstance(value, Mapping):
        if not value:
            raise BadScore("returned an empty dict")
        named = {str(k): _number(_plain(v), f"{k!r} is ") for k, v in value.items()}
        numbers = [v for v in named.values() if v is not None]
        return Score(sum(numbers) if numbers else None, named=named)
    if isinstance(value, list | tuple):
        if not value:
            raise BadScore("returned an empty list")
        steps = [_number(_plain(v), f"step {i} is ", none=False) for i, v in enumerate(value)]
        return Score(math.fsum(steps), steps=steps)  # type: ignore[arg-type]
    return Score(_number(value, "returned "))


def read_batch(value: Any, count: int) -> list[Any]:
    """What a batch function returned, as one value per completion; each is still to be read by `read_score`."""
    value = _plain(value)
    if isinstance(value, Mapping):
        if not value:
            raise BadScore("returned an empty dict")
        lists = {k: _counted(_plain(v), count, f"under {k!r} ") for k, v in value.items()}
        return [{k: v[i] for k, v in lists.items()} for i in range(count)]
    return list(_counted(value, count, ""))


def _counted(value: Any, count: int, where: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise BadScore(f"returned {where}{_named(value)}, not a list of {count} scores")
    if len(value) != count:
        raise BadScore(f"returned {where}{len(value)} scores for {count} completions")
    return value


def _plain(value: Any) -> Any:
    """Numpy and torch values as Python's, without importing either."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _number(value: Any, where: str, none: bool = True) -> float | None:
    if value is None and none:
        return None
    if not isinstance(value, Real):
        raise BadScore(f"{where}{_named(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadScore(f"{where}{number}")
    return number


def _named(value: Any) -> str:
    if inspect.iscoroutine(value):
        value.close()
        return "a coroutine (declare the function itself `async def`)"
    shown = repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
