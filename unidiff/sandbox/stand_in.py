"""The parts of pytest that tests of functions use, where pytest itself is not installed."""

import importlib.machinery
import math
import numbers
import re
import types
from typing import Any


class Raises:
    def __init__(self, kinds, match=None):
        self.kinds, self.match = kinds, match

    def __enter__(self):
        return self

    def __exit__(self, kind, value, _):
        if kind is None:
            raise AssertionError(f"{self.kinds} was not raised")
        self.type, self.value = kind, value
        if not issubclass(kind, self.kinds):
            return False
        if self.match is not None and not re.search(self.match, str(value)):
            raise AssertionError(f"{str(value)!r} does not match {self.match!r}")
        return True


def raises(kinds, *call, match=None, **named):
    if not call:
        return Raises(kinds, match)
    with Raises(kinds) as context:
        call[0](*call[1:], **named)
    return context


class approx:
    """Equal to a number, or to numbers in a list, tuple, dictionary or array, within a tolerance."""

    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected, rel=None, abs=None, nan_ok=False):
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs, nan_ok

    def __eq__(self, other):
        return self.close(other, self.expected)

    def close(self, value: Any, expected: Any) -> bool:
        if hasattr(expected, "tolist"):
            expected, value = expected.tolist(), value.tolist() if hasattr(value, "tolist") else value
        if isinstance(expected, dict):
            return isinstance(value, dict) and value.keys() == expected.keys() and all(
                self.close(value[key], expected[key]) for key in expected)  # fmt: skip
        if isinstance(expected, list | tuple):
            return not isinstance(value, str) and hasattr(value, "__len__") and len(value) == len(expected) and all(
                map(self.close, value, expected))  # fmt: skip
        both: tuple[Any, Any] = value, expected
        if value == expected or not all(isinstance(one, numbers.Number) for one in both):
            return bool(value == expected)
        value, expected = map(own_number, both)
        if value != value and expected != expected:
            return self.nan_ok
        tolerance = max((1e-6 if self.rel is None and self.abs is None else self.rel or 0) * abs(expected),
                        1e-12 if self.abs is None else self.abs)  # fmt: skip
        return bool(abs(value - expected) <= tolerance) and not math.isinf(abs(expected))


def own_number(value: Any) -> Any:
    """A number as its builtin kind computes, whatever its class makes of operators."""
    kinds: tuple[Any, ...] = (int, float, complex)
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)


def parametrize(names, values, **_):
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

    def mark(function):
        rows = [dict(zip(names, row if len(names) > 1 else [row])) for row in (getattr(v, "values", v) for v in values)]
        before = getattr(function, "cases", [{}])
        function.cases = [{**one, **row} for one in before for row in rows]
        return function

    return mark


class Mark:
    parametrize = staticmethod(parametrize)

    def __getattr__(self, name):
        """Any other mark, with or without arguments, changes nothing."""
        return lambda *given, **_: given[0] if len(given) == 1 and callable(given[0]) else lambda function: function


KINDS = (Raises, approx, Mark)


def fail(reason="", **_):
    raise AssertionError(reason)


def fixture(function=None, **_):
    def mark(function):
        function.fixture = True
        return function

    return mark(function) if function else mark


class Finder:
    """Gives the module `pytest` where nothing else does: the last of `sys.meta_path`."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "pytest" else None  # type: ignore[arg-type]

    def create_module(self, spec):
        made = types.ModuleType(spec.name)
        made.__dict__.update(
            raises=raises, approx=approx, fail=fail, fixture=fixture, mark=Mark(), main=lambda *_, **__: 0,
            param=lambda *values, **_: types.SimpleNamespace(values=values),
        )  # fmt: skip
        return made

    def exec_module(self, module):
        pass
