"""Estimators by name: registering a method, and reading one from a setting such as "elbo:samples=4"."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from unidiff import plugins
from unidiff.config import convert, nearest
from unidiff.estimators.estimator import Estimator

ESTIMATORS: dict[str, type[Estimator]] = {}
_E = TypeVar("_E", bound=type[Estimator])


def register(name: str) -> Callable[[_E], _E]:
    """Class decorator: adds a method to the registry. Raises TypeError for a class that is not an `Estimator` or not a
    dataclass, ValueError for an impossible name or unit."""

    def add(estimator: _E) -> _E:
        if not (isinstance(estimator, type) and issubclass(estimator, Estimator)):
            raise TypeError(f"estimator {name!r} must be a class derived from unidiff.estimators.Estimator")
        if not is_dataclass(estimator):
            raise TypeError(f"estimator {name!r} must be a dataclass: write @dataclass(frozen=True) below @register")
        if not name or set(name) & set(".:=") or estimator.unit not in ("token", "segment"):
            raise ValueError(f"estimator {name!r}: a name has no . : or =, and unit is 'token' or 'segment'")
        ESTIMATORS[name] = estimator
        return estimator

    return add


def make(name: str, **options: Any) -> Estimator:
    """A registered estimator with its options. Raises ValueError if the name or an option is unknown, or if an option
    without a default is missing."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r} is not known{_nearest(name, ESTIMATORS)}")
    known = {f.name: f for f in fields(ESTIMATORS[name])}  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise ValueError(f"estimator {name!r} has no option {option!r}{_nearest(option, known)}")
    for option, field in known.items():
        if field.default is field.default_factory is MISSING and option not in options:
            raise ValueError(f"estimator {name!r} needs its option {option!r}")
    return ESTIMATORS[name](**options)


def parse(text: str, min_ratio: float | None = None) -> Estimator:
    """Parses an estimator setting: "trace", or with options "elbo:samples=4:antithetic=no". A module is imported if it
    is named: "package.module:name:option=value" or "package.module.name:option=value".

    An option is converted to the type of its default: bool, int, float or str. min_ratio: the default of this option,
    for methods that have it. Raises ValueError as `make` does, and for unknown or repeated options.
    """
    name, *pairs = text.split(":")
    if pairs and "=" not in pairs[0] and name not in ESTIMATORS:
        name = f"{name}:{pairs.pop(0)}"
    name, options = _imported(name), {}
    # Use the defaults' types: a plug-in's annotations may name types that do not exist at run time.
    defaults = {f.name: f.default for f in fields(ESTIMATORS[name])} if name in ESTIMATORS else {}  # type: ignore[arg-type]
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"estimator {text!r}: {pair!r} is not an option; write name:option=value")
        if option in options:
            raise ValueError(f"estimator {text!r}: {option} is given twice")
        default = defaults.get(option)
        if option in defaults and not isinstance(default, (bool, int, float, str)):
            raise ValueError(
                f"estimator {text!r}: {option} cannot be written so, for it has no plain default; use make"
            )
        options[option] = convert(value, type(default), f"{name}.{option}") if option in defaults else value
    if min_ratio is not None and "min_ratio" in defaults:
        options.setdefault("min_ratio", min_ratio)
    return make(name, **options)


def _imported(name: str) -> str:
    """The registered name of a method. "package.module:name" imports the module first; there `name` may also be the
    class's name."""
    if not plugins.is_path(name):
        return name
    try:
        module, last = plugins.split(name)
        own = vars(plugins.import_module(module))
    except ValueError as error:
        raise ValueError(f"estimator {name}: {error}") from error
    return next((known for known, kind in ESTIMATORS.items() if kind is own.get(last)), last)


def _nearest(word: str, known: Collection[str]) -> str:
    return f"; known: {', '.join(sorted(known)) or 'none'}{nearest(word, known, 0.0)}"
