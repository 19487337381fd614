"""Plain and plain-like values as JSON and back. Nothing is evaluated, imported by name or unpickled.

JSON's own types are kept; anything else is {"kind": [parts]}.
"""

import collections
import datetime
import decimal
import fractions
import sys
from typing import Any

SMALL = 1 << 62  # larger integers go as hexadecimal, which has no limit of digits
FACTORIES = {kind.__name__: kind for kind in (int, float, str, list, dict, set)}
ARRAYS = "biufcU"  # kinds of numpy data that a list of Python values holds


class NotPlain(BaseException):
    """A value has no such form. A test that needs it has to share an interpreter with the code."""


def pairs(mapping):
    return [list(pair) for pair in mapping.items()]


def text(value):
    return [str(value)]


# kind: its parts, and the value from them
KINDS = {
    tuple: (list, lambda *parts: parts),
    set: (list, lambda *parts: set(parts)),
    frozenset: (list, lambda *parts: frozenset(parts)),
    dict: (pairs, lambda *parts: dict(parts)),
    collections.OrderedDict: (pairs, lambda *parts: collections.OrderedDict(parts)),
    collections.Counter: (pairs, lambda *parts: collections.Counter(dict(parts))),
    collections.defaultdict: (
        lambda v: [getattr(v.default_factory, "__name__", None), *pairs(v)],
        lambda factory, *parts: collections.defaultdict(FACTORIES.get(factory), parts),
    ),
    collections.deque: (lambda v: [v.maxlen, *v], lambda most, *items: collections.deque(items, most)),
    bytes: (lambda v: [v.hex()], bytes.fromhex),
    bytearray: (lambda v: [v.hex()], bytearray.fromhex),
    complex: (lambda v: [v.real, v.imag], complex),
    range: (lambda v: [v.start, v.stop, v.step], range),
    decimal.Decimal: (text, decimal.Decimal),
    fractions.Fraction: (lambda v: [v.numerator, v.denominator], fractions.Fraction),
    datetime.date: (text, datetime.date.fromisoformat),
    datetime.time: (text, datetime.time.fromisoformat),
    datetime.datetime: (text, datetime.datetime.fromisoformat),
    datetime.timedelta: (lambda v: [v.days, v.seconds, v.microseconds], datetime.timedelta),
    type({}.keys()): (list, lambda *parts: dict.fromkeys(parts).keys()),
    type({}.values()): (list, lambda *parts: dict(enumerate(parts)).values()),
    type({}.items()): (lambda v: pairs(dict(v)), lambda *parts: dict(parts).items()),
}
NAMES = {kind.__name__: make for kind, (_, make) in KINDS.items()}
PLAIN = (type(None), bool, int, float, str, list, *KINDS)
MUTABLE = (list, dict, set, bytearray, collections.deque, collections.Counter, collections.defaultdict,
           collections.OrderedDict)  # fmt: skip
CONTAINERS = (tuple, *MUTABLE)


def can_change(value: Any) -> bool:
    return type(value) in CONTAINERS or hasattr(value, "dtype")


def shared(*holders: Any) -> bool:
    """Whether anything else holds what is mutable in these containers, or one of them holds it twice. Copies of it do
    not change together."""
    todo = list(holders)
    while todo:
        holder = todo.pop()
        for part in holder.values() if isinstance(holder, dict) else holder:
            if type(part) in MUTABLE and sys.getrefcount(part) > HELD_ONCE:
                return True
            if type(part) in CONTAINERS:
                todo.append(part)
    return False


def held_once() -> int:
    for part in [[]]:  # as `shared` goes through them
        return sys.getrefcount(part)
    return 0


HELD_ONCE = held_once()


def refuse(value: Any) -> Any:
    raise NotPlain(f"a {type(value).__name__} is not plain data")


def encode(value: Any, other: Any = refuse) -> Any:
    """A value as JSON can hold it. other: gives this for a value that is not plain; else it raises NotPlain."""
    kind = type(value)
    if value is None or kind in (bool, float, str) or (kind is int and -SMALL < value < SMALL):
        return value
    if kind is int:
        return {"int": [hex(value)]}
    if kind is list:
        return [encode(item, other) for item in value]
    if kind in KINDS:
        return {kind.__name__: [encode(part, other) for part in KINDS[kind][0](value)]}
    numpy = sys.modules.get("numpy")
    if numpy and kind is numpy.ndarray and value.dtype.kind in ARRAYS:
        return {"ndarray": [value.dtype.str, encode(value.ravel().tolist(), other), list(value.shape)]}
    if numpy and isinstance(value, numpy.generic) and value.dtype.kind in ARRAYS:
        return {"scalar": [value.dtype.str, encode(value.item(), other)]}
    return other(value)


def decode(data: Any, find: Any = None) -> Any:
    """The value of what `encode` made. find: gives what a name of the code means. ValueError or TypeError if data is
    not of this form."""
    if isinstance(data, list):
        return [decode(item, find) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, parts),) = data.items()
    if kind == "name" and find:
        return find(*parts)
    if kind == "int":
        return int(parts[0], 16)
    parts = [decode(part, find) for part in parts]
    if kind in ("ndarray", "scalar"):
        return numpy_value(*parts)
    if kind not in NAMES:
        raise ValueError(f"{kind!r} is not a kind of value")
    return NAMES[kind](*parts)


def numpy_value(dtype, content, shape=None):
    import numpy

    kind = numpy.dtype(dtype)
    if kind.kind not in ARRAYS:
        raise ValueError(f"{dtype!r} is not a plain kind of array")
    return kind.type(content) if shape is None else numpy.array(content, kind).reshape(shape)
