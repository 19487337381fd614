"""Small functions: the solution passes its tests, others do not, and no test is shown in the prompt."""

from __future__ import annotations

import random

import torch

from tests.tables import each
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import reward_table
from unidiff.sandbox.fences import code_of
from unidiff.sequence import Modality
from unidiff.tasks.functions import EXAMPLES, FAMILIES, TESTS, Functions, Problem, by_adding, problem, written


def passes(response: str, tests: tuple[str, ...]) -> bool:
    names: dict = {}
    exec(code_of(response), names)  # ours, not a model's
    try:
        for test in tests:
            exec(test, names)
    except AssertionError:
        return False
    return True


@each("family", FAMILIES)
def test_the_solution_passes_and_a_constant_does_not(family):
    chance = random.Random(family.body)
    for constant in family.constants:
        made = problem(chance, family, constant)
        assert len(made.examples) == EXAMPLES and len(set(made.tests)) == TESTS
        assert passes(made.solution, made.tests) and made.solution == written(family, constant)
        assert not passes("```python\ndef f(*given): return None\n```", made.tests)
        for given, value in made.examples:
            assert f"assert f({', '.join(map(repr, given))}) == {value!r}" not in made.tests


def test_a_prompt_is_words_with_spaces_between():
    made = problem(random.Random(0), FAMILIES[0], 4)
    (a, x), (b, y) = made.examples
    assert made.prompt == f"write f ( x ) so that f ( {a[0]} ) == {x} and f ( {b[0]} ) == {y}"


def test_rewards():
    task = Functions()
    examples = [task.example("test", i) for i in range(2)]
    texts = [examples[0].columns["problem"].solution, "def f ( x ) : return"]
    rows = [
        link_row([SegmentView(modality=Modality.TEXT, tokens=torch.arange(3), text=text)], columns=e.columns)
        for text, e in zip(texts, examples)
    ]
    table = reward_table(task.rewards(), rows)
    assert table.weights == (2.0, 0.5)
    assert table.row_means_BF.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_demonstrations_are_right_or_add_what_explains_the_first_example():
    task = Functions()
    examples = [task.example("train", i) for i in range(300)]
    said = [task.demonstration(e)[0] for e in examples]
    right = [e.columns["problem"].solution == text for e, text in zip(examples, said)]
    assert 0.35 < sum(right) / 300 < 0.6  # by_adding may be the solution
    for example, text in zip(examples, said):
        given = example.columns["problem"]
        if text == given.solution:
            continue
        assert text == by_adding(given)
        arguments, value = given.examples[0]
        names: dict = {}
        exec(code_of(text), names)
        found = names["f"](*arguments)
        assert found == value if not isinstance(value, list) else found[:1] == value[:1] or not value


@each(
    ("body", "arguments", "value", "expected"),
    [
        ("x * {a}", (4,), 28, "x + 24"),
        ("{a} - x", (4,), 2, "x - 2"),
        ("x > {a}", (4,), True, "x - 3"),
        ("x * y - {a}", (2, 3), 1, "x + y - 4"),
        ("len ( xs ) * {a}", ([1, 2, 3],), 6, "sum ( xs ) + 0"),
        ("[ x * {a} for x in xs ]", ([2, 3, 4],), [6, 9, 12], "[ x + 4 for x in xs ]"),
        ("[ x for x in xs if x > {a} ]", ([2, 3, 4],), [], "[ x - 2 for x in xs ]"),
    ],
)
def test_adding(body, arguments, value, expected):
    family = next(f for f in FAMILIES if f.body == body)
    given = Problem(family, 1, ((arguments, value),), ())
    assert by_adding(given).splitlines()[1].endswith(f" : return {expected}")
