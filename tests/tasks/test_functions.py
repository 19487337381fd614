"""Small functions: the solution passes its tests, others do not, and no test is shown in the prompt."""

from __future__ import annotations

import random

import pytest

from unidiff.sandbox.fences import code_of
from unidiff.tasks.functions import EXAMPLES, FAMILIES, TESTS, problem, written


def passes(response: str, tests: tuple[str, ...]) -> bool:
    names: dict = {}
    exec(code_of(response), names)  # ours, not a model's
    try:
        for test in tests:
            exec(test, names)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.body)
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
