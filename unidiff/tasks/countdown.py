"""Countdown: reach a target from three numbers, each used once, and write the calculation down.

    prompt    make 24 from 25 3 4
    response  25 + 3 = 28 , 28 - 4 = 24 so ( 25 + 3 ) - 4

The task is TinyZero's and d1's (2504.12216) with small numbers: every result is from 1 to 99.
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST = 99  # of the target and of every result on the way
NUMBERS = 25  # the largest number to begin with
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


def problem(chance: random.Random) -> tuple[Problem, Calculation]:
    """A problem and a calculation that solves it."""
    numbers = tuple(chance.randint(1, NUMBERS) for _ in range(3))
    solution = calculate(numbers, chance)
    return Problem(numbers, solution.steps[-1][3]), solution


def calculate(numbers: Sequence[int], chance: random.Random) -> Calculation:
    """A random calculation with three numbers, whatever it reaches."""
    while True:
        left = [(number, str(number)) for number in numbers]
        steps: list[tuple[int, str, int, int]] = []
        while len(left) > 1:
            chance.shuffle(left)
            (a, first), (b, second), *left = left
            sign = chance.choice(OPERATIONS)
            result = apply(a, sign, b)
            if not 1 <= result <= LARGEST:
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
