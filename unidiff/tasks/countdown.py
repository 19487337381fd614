"""Countdown: reach a target from three numbers, each used once, and write the calculation down.

    prompt    make 24 from 25 3 4
    response  25 + 3 = 28 , 28 - 4 = 24 so ( 25 + 3 ) - 4

The task is TinyZero's and d1's (2504.12216) with small numbers: no result on the way is below 1 or above `largest`.
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unidiff.config import check_fields
from unidiff.rewards.reward import Reward, reward
from unidiff.tasks.splits import generator, split_of
from unidiff.tasks.task import Example, Responses, Task

OPERATIONS = ("+", "-", "*")
_STEP = re.compile(r"(\d+) ?([-+*]) ?(\d+) ?= ?(\d+)")
_LONGEST = 200  # characters of an answer that is looked at


@dataclass(frozen=True)
class Problem:
    """numbers: the three to use. target: what to reach."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"make {self.target} from {' '.join(map(str, self.numbers))}"


@dataclass(frozen=True)
class Calculation:
    """steps: (left, sign, right, result) each. answer: the same as one expression."""

    steps: tuple[tuple[int, str, int, int], ...]
    answer: str

    def __str__(self) -> str:
        return " , ".join(f"{a} {sign} {b} = {c}" for a, sign, b, c in self.steps) + f" so {self.answer}"


def problem(chance: random.Random, numbers: int = 25, largest: int = 99) -> tuple[Problem, Calculation]:
    """A problem and a calculation that solves it. numbers: the largest of the three. largest: of all results."""
    given = tuple(chance.randint(1, numbers) for _ in range(3))
    solution = calculate(given, chance, largest)
    return Problem(given, solution.steps[-1][3]), solution


def calculate(numbers: Sequence[int], chance: random.Random, largest: int = 99) -> Calculation:
    """A random calculation with three numbers, whatever it reaches."""
    while True:
        left = [(number, str(number)) for number in numbers]
        steps: list[tuple[int, str, int, int]] = []
        while len(left) > 1:
            chance.shuffle(left)
            (a, first), (b, second), *left = left
            sign = chance.choice(OPERATIONS)
            result = apply(a, sign, b)
            if not 1 <= result <= largest:
                break
            steps.append((a, sign, b, result))
            left.append((result, f"( {first} {sign} {second} )" if left else f"{first} {sign} {second}"))
        else:
            return Calculation(tuple(steps), left[0][1])


def apply(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def steps_right(problem: Problem, text: str) -> float:
    """The share of the calculation's two steps that are right, 0 to 1.

    A step is right if its result is, and if its numbers are still to be used: given ones or results before.
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
    """1.0 if the expression behind "so" uses each number once and reaches the target, 0.1 for another one, 0.0 for none
    (d1's scores)."""
    _, so, expression = f" {text}".rpartition(" so ")
    found = value_of(expression) if so else None
    if found is None:
        return 0.0
    value, used = found
    return 1.0 if value == problem.target and Counter(used) == Counter(problem.numbers) else 0.1


def value_of(expression: str) -> tuple[int, list[int]] | None:
    """An expression's value and its numbers; None unless it has whole numbers, + - * and brackets alone. Python
    parses it and never evaluates it."""
    if len(expression) > _LONGEST:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    numbers: list[int] = []

    def value(node: ast.AST) -> int | None:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= 10**6:
            numbers.append(node.value)
            return node.value
        signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
        if isinstance(node, ast.BinOp) and type(node.op) in signs:
            left, right = value(node.left), value(node.right)
            return None if left is None or right is None else apply(left, signs[type(node.op)], right)
        return None

    found = value(tree)
    return None if found is None else (found, numbers)


@reward(on="text")
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

    numbers: the largest number to begin with. largest: of the target and of all results on the way; both at most 99.
    skill: chance that a demonstration reaches the target; the others are calculations that are right, with the given
    numbers, and reach something else.
    """

    numbers: int = 12
    largest: int = 50
    skill: float = 0.35

    writes = "text"
    room = 24
    prepare = None
    headline = ("success", "steps")

    def __post_init__(self) -> None:
        check_fields(self)
        if not (1 <= self.numbers <= 99 and 3 <= self.largest <= 99):
            raise ValueError(f"numbers and largest are {self.numbers} and {self.largest}; choose 1 to 99, and 3 to 99")

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
        return [str(calculate(example.columns["numbers"], chance, self.largest))]

    def best(self, example: Example) -> list[Any]:
        return [example.columns["solution"]]
