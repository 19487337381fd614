"""Tests of many rows run all of them, and say which fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tables import each


def test_every_row_is_run_and_every_fault_named() -> None:
    seen = []

    @each(("number", "limit"), [(1, 2), (3, 2), (0, 2), (5, 2)])
    def below(number: int, limit: int) -> None:
        seen.append(number)
        assert number < limit

    with pytest.raises(ExceptionGroup, match="2 of 4 rows") as failed:
        below()
    assert seen == [1, 3, 0, 5]
    assert [fault.__notes__ for fault in failed.value.exceptions] == [["in the row (3, 2)"], ["in the row (5, 2)"]]


@each("word", ["a", "b"])
def test_fixtures_and_marks_are_a_test_s_own(tmp_path: Path, word: str) -> None:
    assert word in "ab" and tmp_path.is_dir()


def test_a_row_that_does_not_fit_or_is_left_out_is_an_error() -> None:
    with pytest.raises(ExceptionGroup, match="1 of 1 rows") as failed:
        each(("a", "b"), [(1,)])(lambda a, b: None)()
    assert "zip" in str(failed.value.exceptions[0])
    with pytest.raises(BaseExceptionGroup, match="2 of 2 rows"):
        each("reason", ["one", "two"])(lambda reason: pytest.skip(reason))()
    with pytest.raises(AssertionError, match="tests nothing"):
        each("a", [])(lambda a: None)
