"""Countdown: reach a target with three numbers, each used once, and write down the calculation.

    prompt    make 24 from 25 3 4
    response  25 + 3 = 28 , 28 - 4 = 24 so ( 25 + 3 ) - 4

The task is that of TinyZero and d1 (2504.12216) with small numbers: intermediate results are from 1 to `largest`.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from unidiff.config import check_fields
from unidiff.rewards.reward import Reward, reward
from unidiff.tasks.splits import generator, split_of
from unidiff.tasks.task import Example, Responses, Task

OPERATIONS = ("+", "-", "*")
_STEP = re.compile(r"(\d+) ?([-+*]) ?(\d+) ?= ?(\d+)")
_SIGNS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 200  # maximum characters of an answer


@dataclass(frozen=True)
class Problem:
    """numbers: the three to use. target: the value to reach."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"make {self.target} from {' '.join(map(str, self.numbers))}"


@dataclass(frozen=True)
class Calculation:
    """steps: (left, sign, right, result) tuples. answer: the same calculation as one expression."""

    steps: tuple[tuple[int, str, int, int], ...]
    answer: str

    def __str__(self) -> str:
        return " , ".join(f"{a} {sign} {b} = {c}" for a, sign, b, c in self.steps) + f" so {self.answer}"


def problem(chance: random.Random, numbers: int = 25, largest: int = 99) -> tuple[Problem, Calculation]:
    """A problem and its solution. numbers: the maximum of the given numbers. largest: the maximum of all results.

    Signs are drawn first, then numbers until they fit, so that differences are as frequent as sums.
    """
    signs = (chance.choice(OPERATIONS), chance.choice(OPERATIONS))
    while True:
        given = [chance.randint(1, numbers) for _ in range(3)]
        if (solution := calculate(given, signs, chance, largest)) is not None:
            return Problem(tuple(given), solution.steps[-1][3]), solution


def calculate(numbers: Sequence[int], signs: Sequence[str], chance: random.Random, largest: int) -> Calculation | None:
    """A calculation with three numbers and two signs, in random order; None if a result is below 1 or above
    `largest`."""
    left = [(number, str(number)) for number in numbers]
    steps: list[tuple[int, str, int, int]] = []
    for sign in signs:
        chance.shuffle(left)
        (a, first), (b, second), *left = left
        result = apply(a, sign, b)
        if not 1 <= result <= largest:
            return None
        steps.append((a, sign, b, result))
        left.append((result, f"( {first} {sign} {second} )" if left else f"{first} {sign} {second}"))
    return Calculation(tuple(steps), left[0][1])


def total(numbers: Sequence[int]) -> Calculation:
    """The sum of the three numbers in order, for any target."""
    a, b, c = numbers
    return Calculation(((a, "+", b, a + b), (a + b, "+", c, a + b + c)), f"( {a} + {b} ) + {c}")


def apply(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def steps_right(problem: Problem, text: str) -> float:
    """The share of the calculation's two steps that are right, 0 to 1.

    A step is right if its result is right and its numbers are still unused: given numbers or earlier results.
    """
    left = Counter(problem.numbers)
    right = 0
    for a, sign, b, result in _STEP.findall(text[:_LONGEST].partition(" so ")[0]):
        used = Counter((int(a), int(b)))
        if used <= left and apply(int(a), sign, int(b)) == int(result):
            left = left - used + Counter((int(result),))
            right += 1
    return min(right, 2) / 2


def answer_right(problem: Problem, text: str) -> float:
    """d1's scores: 1.0 if the expression after "so" uses each number once and reaches the target, 0.1 for another
    valid expression, 0.0 without one."""
    _, so, expression = f" {text}".rpartition(" so ")
    found = value_of(expression) if so else None
    if found is None:
        return 0.0
    value, used = found
    return 1.0 if value == problem.target and Counter(used) == Counter(problem.numbers) else 0.1


def value_of(expression: str) -> tuple[Fraction, list[int]] | None:
    """An expression's value and its numbers. None if it contains anything but whole numbers, + - * / and brackets, or
    divides by 0. The text is parsed by `ast` and never evaluated."""
    if len(expression) > _LONGEST:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    numbers: list[int] = []

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= 10**6:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
            return _SIGNS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("no expression of whole numbers")

    try:
        return value(tree), numbers
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


@reward(on="text", weight=0.2)
def steps(segments: Sequence[Any], **columns: Any) -> list[float]:
    """The share of the calculation's steps that are right (see `steps_right`)."""
    return [steps_right(s.columns["problem"], s.text) for s in segments]


@reward(on="text", weight=2.0)
def answer(segments: Sequence[Any], **columns: Any) -> list[float]:
    """d1's scores of the answer (see `answer_right`)."""
    return [answer_right(s.columns["problem"], s.text) for s in segments]


@dataclass(frozen=True)
class Countdown(Task):
    """The task, with its demonstrator.

    numbers: the maximum of the given numbers. largest: the maximum of the target and of all intermediate results; at
    most 99. skill: probability that a demonstration reaches the target; the others just add the numbers. So imitation
    teaches calculation and how to reach targets, but the model's greedy answer is the sum.
    """

    numbers: int = 12
    largest: int = 40
    skill: float = 0.35

    writes = "text"
    room = 24
    prepare = None
    headline = ("success", "steps")

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.numbers >= 1 and 3 * self.numbers <= self.largest <= 99):
            raise ValueError(
                f"numbers and largest are {self.numbers} and {self.largest}; choose numbers of at least 1 and largest "
                "from three times that (the sum of three) to 99"
            )

    def example(self, split: str, index: int) -> Example:
        chance = generator("countdown", split, index)
        while True:
            given, solution = problem(chance, self.numbers, self.largest)
            if split_of(given.prompt) == split:
                columns = {"problem": given, "numbers": list(given.numbers), "target": given.target}
                columns |= {"solution": str(solution), "place": (split, index)}
                return Example([given.prompt], columns, title=f"{split} problem {index}")

    def rewards(self) -> tuple[Reward, ...]:
        return steps, answer

    def measure(self, rows: Responses, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        pairs = [
            (e.columns["problem"], (row[-1].text or "") if row[-1].ended else "") for row, e in zip(rows, examples)
        ]
        return {
            "success": np.array([answer_right(given, text) == 1.0 for given, text in pairs], float),
            "steps": np.array([steps_right(given, text) for given, text in pairs]),
        }

    def demonstration(self, example: Example, attempt: int = 0) -> list[Any]:
        chance = generator("countdown demonstration", *example.columns["place"], attempt)
        if chance.random() < self.skill:
            return [example.columns["solution"]]
        return [str(total(example.columns["numbers"]))]

    def best(self, example: Example) -> list[Any]:
        return [example.columns["solution"]]
