"""One dataclass = one YAML file = one command line.

`parse(Config)` reads `--config file.yaml`, then `--field value` for any field, which win over the file. A key that
does not exist is an error that names the nearest one that does. Fields are bool, int, float, str, Literal, tuple, list,
dict, or a union of them with None.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import sys
import types
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def parse(config: type[T], argv: Sequence[str] | None = None, description: str = "", others: Collection[str] = ()) -> T:
    """Builds the dataclass from the command line (default: sys.argv). `--help` prints its docstring and defaults.
    others: keys that a file may hold for another program.

    Raises SystemExit with a message that a user can act on: an unknown key, a value of the wrong type, a missing file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(f"{description}\n\n{help_text(config)}".strip())
        raise SystemExit(0)
    try:
        given = _flags(words)
        values = from_yaml(given.pop("config")) if "config" in given else {}
        return build(config, {**{k: v for k, v in values.items() if k not in others}, **given})
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def build(config: type[T], values: dict[str, Any]) -> T:
    """The dataclass from a dictionary of strings or typed values. Raises ValueError with the field's name."""
    hints = get_type_hints(config)
    known: dict[str, Field[Any]] = {f.name: f for f in fields(config)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, 1, 0.0)
            raise ValueError(f"unknown setting {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"setting {name!r} is required; give --{name}")
    return config(**{name: convert(value, hints[name], name) for name, value in values.items()})


def from_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a file; none if it is empty. Raises FileNotFoundError, or ValueError with the file's name."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold keys and values, it holds {type(values).__name__}")
    return values


def convert(value: Any, kind: Any, name: str) -> Any:
    """A string, or a value that YAML has typed already, as the type of a field."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(value, args, name)
    if origin is Literal:
        for choice in args:
            if value == choice or str(value) == str(choice):
                return choice
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, args))}")
    if (origin or kind) in (tuple, list):
        return _several(value, origin or kind, args, name)
    if (origin or kind) is dict:
        return _mapping(value, args, name)
    return _plain(value, kind, name)


def _one_of(value: Any, kinds: Sequence[Any], name: str) -> Any:
    """The first kind of a union that fits; None only where the union has it."""
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return convert(value, kind, name)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _several(value: Any, kind: Any, args: Sequence[Any], name: str) -> Any:
    """A list from YAML, or words with commas between them."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {value!r}; it must be a list, or values with commas between them")
    if kind is list or args[1:] == (...,) or not args:
        return kind(convert(part, args[0], name) if args else part for part in value)
    if len(value) != len(args):
        raise ValueError(f"{name} is {value!r}; it must be {len(args)} values")
    return tuple(convert(part, arg, name) for part, arg in zip(value, args))


def _mapping(value: Any, args: Sequence[Any], name: str) -> dict[Any, Any]:
    """A mapping from YAML, or name=value with commas between them."""
    if isinstance(value, str):
        pairs = [part.split("=", 1) for part in value.split(",") if part.strip()]
        if all(len(pair) == 2 for pair in pairs):
            value = {k.strip(): v.strip() for k, v in pairs}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}; it must be a mapping, or name=value with commas between them")
    return {k: convert(v, args[1], f"{name}.{k}") if args else v for k, v in value.items()}


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _plain(value: Any, kind: Any, name: str) -> Any:
    if kind not in _WANTED:
        return value
    scalar = isinstance(value, (str, int, float)) and (kind is bool or not isinstance(value, bool))
    whole = kind is not int or not isinstance(value, float) or value.is_integer()
    if scalar and whole:
        with contextlib.suppress(ValueError, KeyError):
            return _BOOLEANS[str(value).lower()] if kind is bool else kind(value)
    raise ValueError(f"{name} is {value!r}; it must be {_WANTED[kind]}")


def _flags(words: list[str]) -> dict[str, str]:
    """--name value, --name=value, and a bare --name for true."""
    given: dict[str, str] = {}
    at = 0
    while at < len(words):
        word = words[at]
        if not word.startswith("--"):
            raise ValueError(f"expected --setting value, got {word!r}")
        name, has_value, value = word[2:].partition("=")
        if not has_value and at + 1 < len(words) and not words[at + 1].startswith("--"):
            at, value, has_value = at + 1, words[at + 1], "="
        given[name.replace("-", "_")] = value if has_value else "true"
        at += 1
    return given


def help_text(config: type) -> str:
    """Every field with its type and default, behind the docstrings of the dataclass and of those it extends."""
    docs = [inspect.getdoc(c) or "" for c in config.__mro__ if is_dataclass(c) and "__doc__" in vars(c)]
    lines = [*docs, ""]
    for f in fields(config):
        default = f.default if f.default is not MISSING else "(required)"
        if f.default_factory is not MISSING:
            default = f.default_factory()
        lines.append(f"  --{f.name}  {default!r}  ({f.type})")
    return "\n".join(lines)
