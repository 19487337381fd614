"""Small Python functions: write the body from a signature and two examples; hidden unit tests judge it.

prompt    write f ( x ) so that f ( 3 ) == 7 and f ( 5 ) == 11
response  ```python
          def f ( x ) : return x * 2 + 1
          ```
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unidiff.config import check_fields
from unidiff.rewards.names import as_reward
from unidiff.rewards.reward import Reward
from unidiff.rewards.table import reward_table
from unidiff.tasks.splits import generator, split_of
from unidiff.tasks.task import Example, Responses, Task

EXAMPLES, TESTS = 2, 5
_CONSTANTS = range(1, 10)
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Family:
    """Functions that differ in a constant `a`. body: the source, with {a} for the constant. run: the same function."""

    signature: str
    body: str
    run: Callable[..., Any]

    @property
    def constants(self) -> tuple[int, ...]:
        return tuple(_CONSTANTS) if "{a}" in self.body else (0,)


FAMILIES = (
    Family("x", "x + {a}", lambda a, x: x + a),
    Family("x", "x - {a}", lambda a, x: x - a),
    Family("x", "{a} - x", lambda a, x: a - x),
    Family("x", "x * {a}", lambda a, x: x * a),
    Family("x", "x * x + {a}", lambda a, x: x * x + a),
    Family("x", "x * 2 + {a}", lambda a, x: x * 2 + a),
    Family("x", "x % ( {a} + 1 )", lambda a, x: x % (a + 1)),
    Family("x", "max ( x , {a} )", lambda a, x: max(x, a)),
    Family("x", "min ( x , {a} )", lambda a, x: min(x, a)),
    Family("x", "x > {a}", lambda a, x: x > a),
    Family("x y", "x + y + {a}", lambda a, x, y: x + y + a),
    Family("x y", "x * y - {a}", lambda a, x, y: x * y - a),
    Family("x y", "max ( x , y ) + {a}", lambda a, x, y: max(x, y) + a),
    Family("x y", "abs ( x - y )", lambda a, x, y: abs(x - y)),
    Family("xs", "sum ( xs )", lambda a, xs: sum(xs)),
    Family("xs", "sum ( xs ) + {a}", lambda a, xs: sum(xs) + a),
    Family("xs", "len ( xs ) * {a}", lambda a, xs: len(xs) * a),
    Family("xs", "max ( xs ) - min ( xs )", lambda a, xs: max(xs) - min(xs)),
    Family("xs", "sorted ( xs )", lambda a, xs: sorted(xs)),
    Family("xs", "xs [ : : - 1 ]", lambda a, xs: xs[::-1]),
    Family("xs", "[ x + {a} for x in xs ]", lambda a, xs: [x + a for x in xs]),
    Family("xs", "[ x * {a} for x in xs ]", lambda a, xs: [x * a for x in xs]),
    Family("xs", "[ x for x in xs if x > {a} ]", lambda a, xs: [x for x in xs if x > a]),
)


@dataclass(frozen=True)
class Problem:
    """One function to write. examples: (arguments, value), shown in the prompt. tests: assertions, hidden."""

    family: Family
    constant: int
    examples: tuple[tuple[Arguments, Any], ...]
    tests: tuple[str, ...]

    @property
    def prompt(self) -> str:
        shown = " and ".join(f"f ( {spaced(given)} ) == {spaced((value,))}" for given, value in self.examples)
        return f"write f ( {' , '.join(self.family.signature.split())} ) so that {shown}"

    @property
    def solution(self) -> str:
        return written(self.family, self.constant)


def written(family: Family, constant: int) -> str:
    """A response: one function of a family."""
    return fenced(family, family.body.format(a=constant))


def fenced(family: Family, body: str) -> str:
    """A function with a family's signature in a fenced block."""
    return f"```python\ndef f ( {' , '.join(family.signature.split())} ) : return {body}\n```"


def by_adding(given: Problem) -> str:
    """A function that fits only the first example: it adds a number to the argument, to the sum of the arguments or to
    each element of a list."""
    arguments, value = given.examples[0]
    (first, *_), each = arguments, isinstance(value, list)
    if each:
        before, after, body = [*first, 0][0], [*value, 0][0], "x"
    else:
        before, after = sum(first) if isinstance(first, list) else sum(arguments), int(value)
        body = {"x": "x", "x y": "x + y", "xs": "sum ( xs )"}[given.family.signature]
    body += f" {'-' if after < before else '+'} {abs(after - before)}"
    return fenced(given.family, f"[ {body} for x in xs ]" if each else body)


def problem(chance: random.Random, family: Family, constant: int) -> Problem:
    """A problem with random examples and tests; all have different arguments."""
    cases: dict[str, tuple[Arguments, Any]] = {}
    while len(cases) < EXAMPLES + TESTS:
        given = tuple(
            [chance.randint(0, 9) for _ in range(3)] if name == "xs" else chance.randint(0, 9)
            for name in family.signature.split()
        )
        cases[repr(given)] = given, family.run(constant, *given)
    *examples, _ = list(cases.values())[: EXAMPLES + 1]
    tests = [
        f"assert f({', '.join(map(repr, given))}) == {value!r}" for given, value in list(cases.values())[EXAMPLES:]
    ]
    return Problem(family, constant, tuple(examples), tuple(tests))


def spaced(values: Arguments) -> str:
    """Values as single words: `[ 1 , 2 ] , 3`."""
    return " , ".join(
        f"[ {' , '.join(map(str, value))} ]"
        if isinstance(value, list) and value
        else "[ ]"
        if value == []
        else str(value)
        for value in values
    )


@dataclass(frozen=True)
class Functions(Task):
    """The task, with its demonstrator.

    skill: probability that a demonstration is right; the others fit only the first example, by adding a number
    (`by_adding`). So imitation teaches Python and how to find functions, but the model's greedy answer only adds.
    """

    skill: float = 0.35

    writes = "text"
    room = 32
    prepare = None
    headline = ("success", "passed")

    def __post_init__(self) -> None:
        check_fields(self)

    def example(self, split: str, index: int) -> Example:
        chance = generator("functions", split, index)
        while True:
            family = chance.choice(FAMILIES)
            given = problem(chance, family, chance.choice(family.constants))
            if split_of(given.prompt) == split:
                columns = {"tests": list(given.tests), "problem": given, "place": (split, index)}
                return Example([given.prompt], columns, title=f"{split} function {index}")

    def rewards(self) -> tuple[Reward, ...]:
        """As in MaskGRPO: 2 × the share of passed tests, plus 0.5 for a code block without a syntax error."""
        return as_reward("gated_code_tests=2.0"), as_reward("code_format=0.5")

    def measure(self, rows: Responses, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        judged = reward_table(["code_tests"], rows).row_means_BF[:, 0].numpy()
        return {"success": np.where(np.isnan(judged), np.nan, judged == 1.0), "passed": judged}

    def demonstration(self, example: Example, attempt: int = 0) -> list[Any]:
        chance = generator("functions demonstration", *example.columns["place"], attempt)
        given = example.columns["problem"]
        if chance.random() < self.skill:
            return [given.solution]
        return [by_adding(given)]

    def best(self, example: Example) -> list[Any]:
        return [example.columns["problem"].solution]
