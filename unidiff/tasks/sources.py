"""Rows of a data set: a list of dicts, a `datasets.Dataset`, or a file (JSONL, JSON, CSV, parquet)."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unidiff.config import nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """Rows of one split. name: the file's name, or a description. folder: base of relative picture paths."""

    rows: Sequence[Mapping[str, Any]]
    name: str
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Mapping[str, Any]:
        """One row. Raises TypeError if it is not a mapping."""
        row = self.rows[index]
        if not isinstance(row, Mapping):
            raise TypeError(f"{self.place(index)} is a {type(row).__name__}; every row is an object with named columns")
        return row

    def place(self, index: int) -> str:
        """A row's place in words, counted from 1."""
        return f"{self.name}, row {index + 1}"


def read(given: Any, split: str) -> Source:
    """Reads the rows of a split. Raises FileNotFoundError, TypeError, or ValueError with the file's name and line if it
    is empty, damaged or of another kind; ImportError for parquet without pyarrow."""
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"split {split!r}: {path} {'is a folder' if path.is_dir() else 'does not exist'}")
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"split {split!r}: {path} ends with {path.suffix!r}; known: {', '.join(SUFFIXES)}")
        reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[path.suffix.lower()]
        source = Source(reader(path), str(path), path.parent)
    elif isinstance(given, Mapping) or not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise TypeError(
            f"split {split!r} is a {type(given).__name__}; it must be a list of dicts, a datasets.Dataset or a file"
        )
    else:
        source = Source(given, f"the {split} rows", Path())
    if not len(source):
        raise ValueError(f"split {split!r}: {source.name} has no rows")
    return source


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}); each line is one object") from error
    return rows


def _json(path: Path) -> list[Any]:
    try:
        rows = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; expected a list of objects (or name it .jsonl)")
    return rows


def _csv(path: Path) -> list[dict[str, Any]]:
    rows = []
    reader = csv.DictReader(_text(path).splitlines(keepends=True))
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {reader.line_num} has another number of fields than the first line")
        rows.append(row)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(f'{path}: parquet needs pyarrow; pip install "unidiff[data]"') from error
    try:
        return parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises many error types
        raise ValueError(f"{path} is not a parquet file that can be read ({error})") from error


def column(row: Mapping[str, Any], name: str) -> Any:
    """A value by its name, which may be nested ("meta.answer", "choices.0"). JSON text inside a column is parsed.
    Raises KeyError with the known names."""
    value: Any = row
    for part in name.split("."):
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(value)
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            known = list(value) if isinstance(value, Mapping) else []
            raise KeyError(f"no column {name!r}{nearest(part, map(str, known)) or f'; there are: {_names(known)}'}")
    return value


def _names(known: Sequence[Any]) -> str:
    return ", ".join(map(str, known)) or "none"
