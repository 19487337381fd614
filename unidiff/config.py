"""One dataclass = one YAML file = one command line.

`setting(group, default, text)` makes a field with its line of --help. `build` makes the dataclass from words or values;
an unknown key is an error that names the nearest known one. command_line.py reads the words.

Fields are bool, int, float, str, Literal, tuple, list, dict, or a union of them with None. A float is finite, unless
its type is `Unbounded`. In a `FilePath`, ~ and $NAME are expanded as in a shell.

`check_fields(self)` in a dataclass's `__post_init__` checks values from Python against the same types; `@typed` does
this for a function's arguments.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
Call = TypeVar("Call", bound=Callable[..., Any])
Unbounded = Annotated[float, math.inf]  # a float that may be infinite
FilePath = Annotated[str, "path"]  # ~ and $NAME in it are replaced
GROUPS = ("run", "data", "rollout", "estimator", "loss", "optimizer", "schedule")  # of settings, in the order of --help


def setting(group: str, default: Any, text: str) -> Any:
    """A field of a config. group: one of GROUPS, or "". text: one line for --help."""
    how: dict[str, Any] = {"default_factory": default} if callable(default) else {"default": default}
    return field(**how, metadata={"group": group, "help": text})


def with_defaults(config: type[T], **values: Any) -> type[T]:
    """A subclass of a config with other defaults, for recipes."""
    hints, known = _hints(config), {f.name: f for f in fields(config)}  # type: ignore[arg-type]
    own = [(n, hints[n], setting(known[n].metadata["group"], v, known[n].metadata["help"])) for n, v in values.items()]
    frozen = config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return make_dataclass("Config", own, bases=(config,), frozen=frozen)


def build(config: type[T], values: dict[str, Any]) -> T:
    """The dataclass from a dictionary of strings or typed values. Raises ValueError with the field's name."""
    hints = _hints(config)
    known: dict[str, Field[Any]] = {f.name: f for f in fields(config)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}{nearest(name, known, 0.0)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"setting {name!r} is required; give --{name}")
    return config(**{name: convert(value, hints[name], name) for name, value in values.items()})


def nearest(name: Any, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """The end of an error message about an unknown name: "; did you mean …?", or "" if no name is near."""
    found = difflib.get_close_matches(str(name), map(str, known), 1, cutoff)
    return f"; did you mean {found[0]!r}?" if found and found[0] != name else ""


def check_fields(settings: Any, prefix: str = "") -> None:
    """Checks the fields of a dataclass against their types, and normalises them (a numpy scalar becomes an int or
    float, a list a tuple if the field is a tuple). Raises ValueError with the prefix and the field's name."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    for name, value in checked(values, type(settings), prefix).items():
        object.__setattr__(settings, name, value)  # the dataclass may be frozen


def checked(values: Mapping[str, Any], owner: type | Callable[..., Any], prefix: str = "") -> dict[str, Any]:
    """Converts values to the annotated types of a class or function. Raises ValueError with the name."""
    hints = _hints(owner)
    return {k: convert(v, hints[k], prefix + k, words=False) for k, v in values.items() if k in hints}


def typed(function: Call) -> Call:
    """Decorator: checks a call's arguments against the function's annotations, as `check_fields` does for fields."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(checked(bound.arguments, function, f"{function.__name__}: "))
        return function(*bound.args, **bound.kwargs)

    return cast(Call, call)


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    try:
        return get_type_hints(owner, include_extras=True)
    except NameError:  # an annotation exists only for type checkers
        return {}


def convert(value: Any, kind: Any, name: str, words: bool = True) -> Any:
    """Converts a value to a field's type. words: strings are parsed, as on the command line and in YAML; otherwise a
    string stays a text. Types that the module does not list accept any value."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = _plain(value, args[0], name, words, finite=math.inf not in args)
        return expanded(found, name) if kind == FilePath else found
    if origin in (Union, types.UnionType):
        return _one_of(value, args, name, words)
    if origin is Literal:
        return _choice(value, args, name, words)
    if (origin or kind) in (tuple, list, Sequence):
        return _several(value, list if (origin or kind) is list else tuple, args, name, words)
    if (origin or kind) is dict:
        return _mapping(value, args, name, words)
    return _plain(value, kind, name, words)


def expanded(path: str, name: str) -> str:
    """Expands a path as a shell does. Raises ValueError for an unknown user or variable."""
    found = os.path.expandvars(os.path.expanduser(path))
    if unknown := re.match(r"~[^/]*", found) or re.search(r"\$(\w+|\{[^}]*\})", found):
        raise ValueError(f"{name} is {path!r}; {unknown[0]} is not known here")
    return found


def _choice(value: Any, choices: Sequence[Any], name: str, words: bool) -> Any:
    for choice in choices:
        same = isinstance(value, type(choice)) and isinstance(value, bool) == isinstance(choice, bool)
        if (same and value == choice) or (words and str(value) == str(choice)):
            return choice
    raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}{nearest(value, choices)}")


def _one_of(value: Any, kinds: Sequence[Any], name: str, words: bool) -> Any:
    """Converts to the first type of a union that fits; None only if the union has it."""
    spelled = words and isinstance(value, str) and value.lower() in ("none", "null")
    if type(None) in kinds and (value is None or spelled):
        return None
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return convert(value, kind, name, words)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _several(value: Any, kind: type, args: Sequence[Any], name: str, words: bool) -> Any:
    """A list from YAML, or comma-separated words."""
    if words and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {value!r}; it must be a list" + ", or values with commas between them" * words)
    if args[1:] == (...,) or len(args) < 2:
        return kind(convert(part, args[0], name, words) if args else part for part in value)
    if len(value) != len(args):
        raise ValueError(f"{name} is {value!r}; it must be {len(args)} values")
    return tuple(convert(part, arg, name, words) for part, arg in zip(value, args))


def _mapping(value: Any, args: Sequence[Any], name: str, words: bool) -> dict[Any, Any]:
    """A mapping from YAML, or comma-separated name=value."""
    if words and isinstance(value, str):
        pairs = [part.split("=", 1) for part in value.split(",") if part.strip()]
        if all(len(pair) == 2 for pair in pairs):
            value = {k.strip(): v.strip() for k, v in pairs}
    if not isinstance(value, dict):
        raise ValueError(
            f"{name} is {value!r}; it must be a mapping" + ", or name=value with commas between them" * words
        )
    return {k: convert(v, args[1], f"{name}.{k}", words) if args else v for k, v in value.items()}


_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _plain(value: Any, kind: Any, name: str, words: bool, finite: bool = True) -> Any:
    if kind not in _WANTED:
        return value
    try:
        found = _read(value, kind) if words and isinstance(value, str) else _typed(value, kind, words)
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{name} is {value!r}; it must be {_WANTED[kind]}") from None
    if kind is float and (math.isnan(found) or (finite and math.isinf(found))):
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    return found


def _read(value: str, kind: type) -> Any:
    """Parses a string of the command line or of YAML. Raises ValueError, KeyError or OverflowError."""
    if kind is bool:
        return _BOOLEANS[value.lower()]
    if kind is float:
        return float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", value, flags=re.IGNORECASE))  # YAML has a point there
    try:
        return kind(value)
    except ValueError:
        return _typed(float(value), kind, words=False)  # 3.0 and 2e4 are whole numbers


def _typed(value: Any, kind: type, words: bool) -> Any:
    """Converts a value of a matching type (also numpy's scalars and paths). Raises ValueError."""
    if type(value).__name__ in ("bool", "bool_"):  # a bool is a number in Python, but not in numpy
        if kind is bool:
            return bool(value)
    elif isinstance(value, numbers.Real):
        found: Any = value
        if kind is float or (kind is int and (isinstance(found, numbers.Integral) or found % 1 == 0)):
            return kind(found)
        if words and kind in (str, bool):  # YAML reads an unquoted number as a number
            return _read(str(found), kind)
    elif kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    raise ValueError
