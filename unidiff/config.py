"""One dataclass = one YAML file = one command line.

`setting(group, default, text)` makes a field with the line that --help prints. `build` makes the dataclass from words
or values; a key that does not exist is an error that names the nearest one that does. command_line.py reads the words.

Fields are bool, int, float, str, Literal, tuple, list, dict, or a union of them with None. A float is finite, unless
its type is `Unbounded`. In a `FilePath`, ~ and $NAME mean what they mean in a shell.

`check_fields(self)` in a dataclass's `__post_init__` holds values from Python to the same types; `@typed` does so with
the arguments of a function.
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
    """The same settings with other defaults, as a recipe has them."""
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
    """The end of a message about a name that is not known: the nearest one that is."""
    found = difflib.get_close_matches(str(name), map(str, known), 1, cutoff)
    return f"; did you mean {found[0]!r}?" if found and found[0] != name else ""


def check_fields(settings: Any, prefix: str = "") -> None:
    """Holds the fields of a dataclass to their types, and keeps them in plain form (a numpy scalar becomes an int or
    float, a list a tuple where the field is one). Raises ValueError with the field's name behind the prefix."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    for name, value in checked(values, type(settings), prefix).items():
        object.__setattr__(settings, name, value)  # the dataclass may be frozen


def checked(values: Mapping[str, Any], owner: type | Callable[..., Any], prefix: str = "") -> dict[str, Any]:
    """Values by name as the annotations of a class or a function say. Raises ValueError with the name."""
    hints = _hints(owner)
    return {k: convert(v, hints[k], prefix + k, words=False) for k, v in values.items() if k in hints}


def typed(function: Call) -> Call:
    """Decorator: holds the arguments of a call to the function's annotations, as `check_fields` does with fields."""
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
    except NameError:  # an annotation names what exists for type checkers only
        return {}


def convert(value: Any, kind: Any, name: str, words: bool = True) -> Any:
    """A value as the type of a field. words: strings are read as what they spell, as on the command line and in YAML;
    otherwise a string is a text. Types that are not listed above take any value."""
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
    """A path as a shell reads it. Raises ValueError if it names a user or a variable that is not there."""
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
    """The first kind of a union that fits; None only where the union has it."""
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
    """A list from YAML, or words with commas between them."""
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
    """A mapping from YAML, or name=value with commas between them."""
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
    """What a string spells, on the command line or in YAML. Raises ValueError, KeyError or OverflowError."""
    if kind is bool:
        return _BOOLEANS[value.lower()]
    if kind is float:
        return float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", value, flags=re.IGNORECASE))  # YAML has a point there
    try:
        return kind(value)
    except ValueError:
        return _typed(float(value), kind, words=False)  # 3.0 and 2e4 are whole numbers


def _typed(value: Any, kind: type, words: bool) -> Any:
    """A value that has the kind, numpy's scalars and paths among them. Raises ValueError."""
    if type(value).__name__ in ("bool", "bool_"):  # a number for Python, for numpy not
        if kind is bool:
            return bool(value)
    elif isinstance(value, numbers.Real):
        found: Any = value
        if kind is float or (kind is int and (isinstance(found, numbers.Integral) or found % 1 == 0)):
            return kind(found)
        if words and kind in (str, bool):  # YAML reads an unquoted number as one
            return _read(str(found), kind)
    elif kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    raise ValueError
