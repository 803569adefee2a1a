"""Reading rows: files, hub data sets, folders saved by `datasets`, and the built-in tasks.

Every row remembers where it stood, so that whatever is wrong with it later is said with its file and line.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from truecourse.errors import UserError
from truecourse.lab import tasks


@dataclass(frozen=True)
class Row:
    """One row of a data set."""

    values: dict[str, Any]
    """Its columns."""
    where: str
    """Where it stood, for messages: `data.jsonl:17` (a line), `data.csv row 3` (rows are counted from 1)."""


def read(source: str | tuple[str, ...], base: Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """All rows of a source, or of several end to end.

    source: a .jsonl, .json, .parquet or .csv file (.gz may follow), a folder saved by `datasets` or holding such files,
        a hub id (`name`, `org/name`, `org/name/config`), or `lab:NAME`. A folder or hub id may end in `:split`; the
        split is `train` unless named.
    base: folder that relative paths start from (the recipe's).
    columns: new name → name in the source, such as {"prompt": "question"}.

    Raises `UserError` for what is missing, empty or malformed, with its line.
    """
    rows = [row for name in ([source] if isinstance(source, str) else source) for row in _read(name, Path(base))]
    return [Row(_renamed(row, columns), row.where) for row in rows] if columns else rows


def _read(name: str, base: Path) -> list[Row]:
    if name.startswith("lab:"):
        values = tasks.task(name.removeprefix("lab:"))
        return [Row(v, f"{name} row {i}") for i, v in enumerate(values, 1)]
    path = base / Path(name).expanduser()
    reader = _reader(path)
    if path.is_file():
        if reader is None:
            raise UserError(f"{name!r}: files are read as {', '.join(READERS)} (each also with .gz), by their suffix")
        rows = [Row(values, f"{path.name}{place}") for place, values in reader(_bytes(path, name), path.name)]
    elif reader or name.startswith((".", "/", "~")):
        if not path.is_dir():
            _refuse_missing(path, name)
        rows = _from_datasets(name, base)
    else:
        rows = _from_datasets(name, base)
    if not rows:
        raise UserError(f"{name!r} has no rows")
    return rows


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    for new, old in columns.items():
        if old not in row.values:
            raise UserError(
                f"{row.where}: columns.{new} = {old!r}, but the row has the columns {', '.join(row.values)}"
                f"{nearest(old, row.values)}"
            )
        if new in row.values and new not in columns.values():
            raise UserError(f"{row.where}: columns.{new} = {old!r}, but the row has a column {new!r} of its own")
    rest = {k: v for k, v in row.values.items() if k not in columns.values()}
    return {new: row.values[old] for new, old in columns.items()} | rest


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


# -- files ------------------------------------------------------------------------------------------------------------

Places = Iterator[tuple[str, dict[str, Any]]]


def _jsonl(data: bytes, name: str) -> Places:
    # split at \n alone: U+2028 and its like may stand inside a JSON string
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            where = f"{name}:{number}"
            yield f":{number}", _object(_parse(_decode(line, where), where), where)


def _json(data: bytes, name: str) -> Places:
    text = _decode(data, name)
    try:
        rows = _parse(text, name)
    except UserError as error:
        if "Extra data" in str(error):
            raise UserError(f"{name} holds one JSON value after another; rename it to .jsonl") from None
        raise
    if not isinstance(rows, list):
        raise UserError(f"{name} holds {_kind(rows)}, not a list of objects; one object a line belongs in a .jsonl")
    for number, row in enumerate(rows, 1):
        yield f" row {number}", _object(row, f"{name} row {number}")


def _csv(data: bytes, name: str) -> Places:
    lines = csv.reader(io.StringIO(_decode(data, name), newline=""), strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header) or "" in header:
            raise UserError(f"{name}: its first line must name every column once, but it is {','.join(header)!r}")
        number = 0
        for cells in lines:
            if not cells:  # a blank line, as the csv module gives it
                continue
            number += 1
            if len(cells) != len(header):
                raise UserError(
                    f"{name} row {number} (line {lines.line_num}) has {len(cells)} cells for {len(header)} columns; "
                    "a cell with a comma or a line break needs double quotes around it"
                )
            yield f" row {number}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{name}:{lines.line_num}: not valid CSV: {error}") from None


def _parquet(data: bytes, name: str) -> Places:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a readable Parquet file: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f" row {number}", row


READERS: dict[str, Callable[[bytes, str], Places]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}


def _reader(path: Path) -> Callable[[bytes, str], Places] | None:
    return READERS.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower())


def _bytes(path: Path, name: str) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise UserError(f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        place = where if ":" in where else f"{where}:{line + 1}"
        raise UserError(
            f"{place}: byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda name: _refuse_constant(name, where))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


def _refuse_constant(name: str, where: str) -> NoReturn:
    raise UserError(f"{where}: {name} is not JSON; write null, or leave the column out")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{where}: {_kind(value)}, not an object with columns such as {{"prompt": "..."}}')
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_missing(path: Path, name: str) -> NoReturn:
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"{name!r} does not exist: there is no folder {str(folder)!r}")
    files = sorted(p.name for p in folder.iterdir() if _reader(p))
    hint = nearest(path.name, files)
    if not hint:
        hint = f"; that folder has {', '.join(files[:8])}" if files else "; that folder has no data files"
    raise UserError(f"{name!r} does not exist in {str(folder.resolve())!r}{hint}")


# -- datasets ---------------------------------------------------------------------------------------------------------


def _from_datasets(name: str, base: Path) -> list[Row]:
    """A local folder, or a hub id."""
    source, colon, split = name.rpartition(":")
    source, split = (source, split) if colon else (name, "train")
    folder = base / Path(source).expanduser()
    try:
        rows = _load(folder if folder.is_dir() else source, split)
    except UserError:
        raise
    except ValueError as error:  # what datasets raises for an unknown split or configuration
        raise UserError(f"{name!r}: {_first_line(error)}") from None
    except (OSError, RuntimeError, NotImplementedError) as error:
        if folder.is_dir():
            raise UserError(f"{name!r} is not a folder that `datasets` can read: {_first_line(error)}") from None
        raise UserError(
            f"{name!r} is neither a file or folder in {str(base.resolve())!r} nor a data set that the hub gives now "
            f"({_first_line(error)}); check the name and the network, or name a local file"
        ) from None
    return [Row(dict(row), f"{name} row {i}") for i, row in enumerate(rows, 1)]


def _load(source: Path | str, split: str) -> Any:
    import datasets

    if isinstance(source, Path):
        if (source / "dataset_dict.json").is_file():
            parts = datasets.load_from_disk(str(source))
            if split not in parts:
                raise UserError(f"{str(source)!r} has the splits {', '.join(parts)}, not {split!r}; name one as :split")
            return parts[split]
        if (source / "state.json").is_file():
            return datasets.load_from_disk(str(source))
        return datasets.load_dataset(str(source), split=split)
    parts = source.split("/")
    if len(parts) > 3 or not all(parts):
        raise UserError(f"{source!r} is neither a file nor a hub id (name, org/name or org/name/config, then :split)")
    return datasets.load_dataset("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split=split)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
