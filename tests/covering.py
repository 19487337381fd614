"""Covering sets: so few combinations of several axes that every two values of two axes meet in one of them.

A fault that shows where two settings meet shows in such a set too, at a fraction of the cases of the whole product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def pairs(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combinations, a value of each axis in turn, in which every two values of different axes meet. Always the same.

    Greedy: each combination begins with the first two values that have not met, and takes of every other axis the value
    that meets most of those taken already for the first time.
    """
    values = [list(axis) for axis in axes]
    sizes = [range(len(axis)) for axis in values]
    left = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(range(len(axes)), 2)
        for i in sizes[a]
        for j in sizes[b]
    }
    used = [[0] * len(axis) for axis in values]
    found = []
    while left:
        taken = dict(next(iter(left)))
        for axis in sorted(set(range(len(axes))) - taken.keys(), key=lambda axis: -len(values[axis])):
            new = [sum(tuple(sorted([(axis, i), one])) in left for one in taken.items()) for i in sizes[axis]]
            taken[axis] = min(sizes[axis], key=lambda i: (-new[i], used[axis][i]))
        for axis, i in taken.items():
            used[axis][i] += 1
        for met in itertools.combinations(sorted(taken.items()), 2):
            left.pop(met, None)
        found.append(tuple(values[axis][taken[axis]] for axis in range(len(axes))))
    return found


def couples(values: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Two by two, so that each is in one couple: for axes whose values do not touch one another."""
    known = list(values)
    half = (len(known) + 1) // 2
    return list(zip(known[:half], [*known[half:], *known[:1]]))


def slow_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """The same cases; those after the first `count` are marked slow. For tests with many cases that take .1 s each."""
    known = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] * (i >= count)) for i, case in enumerate(known)]
