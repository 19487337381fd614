"""What a data set's row says about how code is judged, in the forms that data sets have.

    ["assert f(2) == 4", …] or one such text                  tests
    {"tests": […], "setup": …, "entry_point": "f"}            the same, with what they need, and whom `check` checks
    {"inputs": […], "outputs": […]}                           a program, by what it prints for what it reads
    {"fn_name": "f", "inputs": […], "outputs": […]}           a function, by its arguments and values
    [{"input": …, "output": …, "fn_name": …}, …]              either of these, case by case

or JSON text of any of them.
"""

from __future__ import annotations

import decimal
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .sandbox import Case, Sandbox, TestReport


@dataclass(frozen=True)
class Row:
    """tests (with setup), or cases of a function of this name, or what programs read and print."""

    tests: tuple[str, ...] = ()
    setup: str = ""
    name: str = ""
    cases: tuple[Case, ...] = ()
    programs: tuple[tuple[str, str], ...] = ()


def read(value: Any) -> Row:
    """What a row says. Raises ValueError or TypeError, which name what is odd in it."""
    value = _plain(_parsed(value))
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        if value and all(isinstance(one, Mapping) for one in value):
            return _read_cases(value)
        return Row(tests=_texts("tests", value))
    if not isinstance(value, Mapping):
        raise TypeError(f"a {type(value).__name__} says nothing about how code is judged")
    given = {key: one for key, one in value.items() if one is not None}
    if "inputs" in given or "outputs" in given:
        inputs, outputs = (_parsed(given.get(key, [])) for key in ("inputs", "outputs"))
        return _pairs(given.get("fn_name"), _list("inputs", inputs), _list("outputs", outputs))
    if "tests" not in given:
        has = ", ".join(map(repr, value)) or "nothing"
        raise ValueError(f"it has {has}; it needs 'tests', or 'inputs' and 'outputs'")
    tests, setup = _parsed(given["tests"]), given.get("setup", "")
    tests = _texts("tests", [tests] if isinstance(tests, str) else _list("tests", tests))
    if entry := given.get("entry_point"):
        tests = tuple(f"{one}\n\ncheck({entry})\n" if "def check(" in one else one for one in tests)
    return Row(tests=tests, setup="\n".join(_texts("setup", [setup] if isinstance(setup, str) else setup)))


def judge(sandbox: Sandbox, code: str, row: Row, tolerance: float = 0.0) -> TestReport:
    """Runs what the row asks for. tolerance: relative and absolute, of numbers that are given back or printed."""
    if row.cases:
        return sandbox.call(code, row.name, row.cases, tolerance)
    if row.programs:
        return sandbox.programs(code, row.programs, tolerance)
    return sandbox.test(code, row.tests, row.setup)


def _read_cases(cases: Sequence[Mapping[str, Any]]) -> Row:
    names = {case.get("fn_name") for case in cases}
    if len(names) > 1:
        raise ValueError(f"its cases have more than one fn_name: {', '.join(sorted(map(str, names)))}")
    for i, case in enumerate(cases):
        if "input" not in case or "output" not in case:
            raise ValueError(f"case {i} has {', '.join(map(repr, case))}; it needs 'input' and 'output'")
    return _pairs(names.pop(), [case["input"] for case in cases], [case["output"] for case in cases])


def _pairs(name: str | None, inputs: list[Any], outputs: list[Any]) -> Row:
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs: there must be as many, and at least one")
    if name is None:
        pairs = enumerate(zip(inputs, outputs))
        return Row(programs=tuple((_text(f"inputs[{i}]", a), _text(f"outputs[{i}]", b)) for i, (a, b) in pairs))
    if not isinstance(name, str) or not name:
        raise ValueError(f"fn_name is {name!r}; it must be the name of a function")
    boxed = all(isinstance(one, list) and len(one) == 1 for one in outputs)  # some data sets wrap each value in a list
    cases = []
    for i, (given, wanted) in enumerate(zip(inputs, outputs)):
        if given is None:
            raise ValueError(f"inputs[{i}] is None; it must be a list of arguments")
        if isinstance(given, str):  # one argument a line, and the value, as JSON
            given, wanted = [_from_json(line) for line in given.split("\n") if line.strip()], _from_json(wanted)
        arguments = given if isinstance(given, list) else [given]
        cases.append(Case(tuple(arguments), (wanted, wanted[0]) if boxed and isinstance(wanted, list) else (wanted,)))
    return Row(name=name, cases=tuple(cases))


def _text(name: str, value: Any) -> str:
    """What is read or printed: text, a number, or a list of lines."""
    if isinstance(value, list):
        return "\n".join(" ".join(map(str, line)) if isinstance(line, list) else _text(name, line) for line in value)
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name} is {value!r:.100}; it must be text, a number or a list of lines")
    return str(decimal.Decimal(value)) if type(value) is int else str(value)  # of any length


def _texts(name: str, values: Sequence[Any]) -> tuple[str, ...]:
    if not values and name == "tests":
        raise ValueError("tests is empty: there is nothing to judge by")
    for i, one in enumerate(values):
        if not isinstance(one, str):
            raise TypeError(f"{name}[{i}] is {one!r:.100}; it must be text")
    return tuple(values)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a list")
    return value


def _plain(value: Any) -> Any:
    """Arrays and tuples as lists, a table's scalars as Python's."""
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _parsed(value: Any) -> Any:
    """What JSON text holds, if it holds a list, an object or text; else the value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{", '"'):
        found = _from_json(value)
        if isinstance(found, str) and found != value:
            return _parsed(found)
        return found
    return value


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value, parse_int=lambda digits: int(decimal.Decimal(digits)))  # of any length
    except (ValueError, TypeError, RecursionError):
        return value
