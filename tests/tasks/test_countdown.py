"""Countdown: solutions earn everything, and every way to be wrong is told apart."""

from __future__ import annotations

import random

import pytest

from tests.tables import each
from unidiff.tasks.countdown import Countdown, Problem, answer_right, calculate, problem, steps_right, total, value_of

GIVEN = Problem((25, 3, 4), 24)


def test_a_solution_earns_everything():
    chance = random.Random(0)
    for made, solution in (problem(chance) for _ in range(300)):
        assert answer_right(made, str(solution)) == steps_right(made, str(solution)) == 1.0
        assert made.prompt.startswith(f"make {made.target} from ") and len(made.numbers) == 3


def test_the_sum_is_right_in_its_steps_and_seldom_the_target():
    chance = random.Random(1)
    problems = [problem(chance)[0] for _ in range(300)]
    texts = [str(total(made.numbers)) for made in problems]
    assert all(steps_right(made, text) == 1.0 for made, text in zip(problems, texts))
    assert 0.05 < sum(answer_right(made, text) == 1.0 for made, text in zip(problems, texts)) / 300 < 0.2


def test_a_calculation_stays_within_its_bounds():
    chance = random.Random(2)
    for _ in range(300):
        signs = chance.choices("+-*", k=2)
        made = calculate([chance.randint(1, 12) for _ in range(3)], signs, chance, 40)
        assert made is None or [step[1] for step in made.steps] == signs
        assert made is None or all(1 <= result <= 40 for *_, result in made.steps)
    assert calculate((1, 1, 1), "--", chance, 99) is None


def test_demonstrations_reach_the_target_or_add_up():
    task = Countdown()
    examples = [task.example("train", i) for i in range(400)]
    said = [task.demonstration(e)[0] for e in examples]
    right = [e.columns["solution"] == text for e, text in zip(examples, said)]
    assert all(good or text == str(total(e.columns["numbers"])) for e, text, good in zip(examples, said, right))
    assert 0.3 < sum(right) / 400 < 0.45
    with pytest.raises(ValueError, match="numbers and largest are 40 and 99"):
        Countdown(numbers=40, largest=99)


@each(
    ("text", "steps", "answer"),
    [
        ("25 + 3 = 28 , 28 - 4 = 24 so ( 25 + 3 ) - 4", 1.0, 1.0),
        ("25 + 3 = 28 , 28 - 4 = 25 so 25 + 3 - 4", 0.5, 1.0),  # a wrong result on the way
        ("25 + 3 = 28 , 28 - 3 = 25 so 25 + 3 - 3", 0.5, 0.1),  # 3 is used up
        ("25 - 4 = 21 , 21 + 3 = 24 so 25 - 4", 1.0, 0.1),  # not every number
        ("so 24", 0.0, 0.1),
        ("25 + 3 = 28 , 28 - 4 = 24", 1.0, 0.0),  # no answer
        ("25 + 3 = 28 , 25 + 3 = 28 so 25 ** 3", 0.5, 0.0),
        ("so __import__('os')", 0.0, 0.0),
        ("so " + "(" * 150 + "1" + ")" * 150, 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_what_a_text_earns(text, steps, answer):
    assert (steps_right(GIVEN, text), answer_right(GIVEN, text)) == (steps, answer)


@each("bad", ["", "1 +", "a", "1.5", "True", "2 ** 9", "1 / 0", "1 // 2", "-3", "9" * 9, "f(1)", "1 if 1 else 2"])
def test_what_is_no_expression_of_numbers_has_no_value(bad):
    assert value_of(bad) is None
    assert value_of("( 2 + 3 ) * 4") == (20, [2, 3, 4])
    assert value_of("1 / 3 * 3") == (1, [1, 3, 3])
