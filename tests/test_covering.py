"""The covering sets by which other tests choose their cases."""

from __future__ import annotations

import itertools

import pytest

from tests.covering import pairs

AXES = [
    ("abc", "xy"),
    ("abcd", "abcd"),
    (range(13), range(4), range(3)),
    (range(2),) * 7,
    ("abc", range(5), "xy", "pq"),
]


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: "x".join(str(len(axis)) for axis in axes))
def test_every_two_values_meet_and_hardly_more_often_than_they_must(axes: tuple) -> None:
    """In at least as many combinations as the two longest axes have, and in less than a third more."""
    found = pairs(*axes)
    for a, b in itertools.combinations(range(len(axes)), 2):
        assert {(one[a], one[b]) for one in found} == set(itertools.product(axes[a], axes[b]))
    least = max(len(a) * len(b) for a, b in itertools.combinations(axes, 2))
    assert len(set(found)) == len(found) and least <= len(found)
    assert len(found) <= 1.3 * least or least == 4  # seven axes of two values need six
    assert pairs(*axes) == found
