"""One dataclass = one YAML file = one command line.

`parse(Config)` reads `--config file.yaml`, then `--field value` for any field, which win over the file. A key that
does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import difflib
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def parse(config: type[T], argv: Sequence[str] | None = None, description: str = "") -> T:
    """Builds the dataclass from the command line (default: sys.argv). `--help` prints its docstring and defaults.

    Raises SystemExit with a message that a user can act on: an unknown key, a value of the wrong type, a missing file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(f"{description}\n\n{help_text(config)}".strip())
        raise SystemExit(0)
    try:
        given = _flags(words)
        values = from_yaml(given.pop("config")) if "config" in given else {}
        return build(config, {**values, **given})
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def build(config: type[T], values: dict[str, Any]) -> T:
    """The dataclass from a dictionary of strings or typed values. Raises ValueError with the field's name."""
    hints = get_type_hints(config)
    names = [f.name for f in fields(config)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, 1, 0.0)[0]
            raise ValueError(f"unknown setting {name!r}; did you mean {nearest!r}?")
    return config(**{name: convert(value, hints[name], name) for name, value in values.items()})


def from_yaml(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    values = yaml.safe_load(Path(path).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold keys and values, it holds {type(values).__name__}")
    return values


def convert(value: Any, kind: Any, name: str) -> Any:
    """A string, or a value that YAML has typed already, as the type of a field."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in args:
                return None
        return convert(value, next(a for a in args if a is not type(None)), name)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, args))}")
        return value
    if origin in (tuple, list):
        parts = value.split(",") if isinstance(value, str) else list(value)
        return origin(convert(part, args[0], name) for part in parts if part != "")
    return _plain(value, kind, name)


def _plain(value: Any, kind: Any, name: str) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise ValueError(f"{name} is {value!r}; it must be true or false")
        return words[str(value).lower()]
    if kind in (int, float):
        try:
            number = float(value) if kind is float or not isinstance(value, str) else int(value)
        except (TypeError, ValueError):
            number = None
        if number is None or isinstance(value, bool) or (kind is int and number != int(number)):
            raise ValueError(
                f"{name} is {value!r}; it must be {'a whole number' if kind is int else 'a number'}"
            )
        return kind(number)
    return str(value) if kind is str else value


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
    """Every field with its type and default, behind the dataclass's docstring."""
    lines = [(config.__doc__ or "").strip(), ""]
    for f in fields(config):
        default = f.default if f.default is not MISSING else "(required)"
        if f.default_factory is not MISSING:
            default = f.default_factory()
        lines.append(f"  --{f.name}  {default!r}  ({f.type})")
    return "\n".join(lines)
