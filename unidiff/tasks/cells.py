"""Cells of square boards: names, directions, cells named in a text, and distances.

A cell is `(row, column)`, counted from 0 at the top left; its name is a row letter and a column number, so (0, 0) is
"a1", (1, 2) is "b3" and the cell below that is "c3".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import Any

Cell = tuple[int, int]

DIRECTIONS = ("left", "down", "right", "up")  # the order of gymnasium's actions 0..3; each is a left turn of the last
DELTAS: dict[str, Cell] = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
CELL = r"[a-h][1-8]"
DIRECTION = "|".join(DIRECTIONS)
_NAMED = re.compile(rf"\b{CELL}\b")


def cell_name(cell: Cell) -> str:
    """The name of a cell: (0, 0) is "a1", (1, 2) is "b3"."""
    return f"{chr(ord('a') + cell[0])}{cell[1] + 1}"


def cell_at(name: str) -> Cell:
    """The cell with this name, on a board of any size. Raises ValueError if it is not a cell name."""
    if not re.fullmatch(CELL, name):
        raise ValueError(f"name: {name!r} is not a cell; a cell is a row letter a-h and a column 1-8, as 'b3'")
    return ord(name[0]) - ord("a"), int(name[1]) - 1


def neighbour(cell: Cell, direction: str) -> Cell:
    """The adjacent cell in a direction; it may be off the board."""
    row, column = DELTAS[direction]
    return cell[0] + row, cell[1] + column


def inside(cell: Cell, size: int) -> bool:
    return 0 <= cell[0] < size and 0 <= cell[1] < size


def all_cells(size: int) -> list[Cell]:
    """In reading order."""
    return [(row, column) for row in range(size) for column in range(size)]


def named_cells(text: str, size: int) -> list[Cell]:
    """The cells of a board that a text names, each once, in order. The text need not be well formed."""
    cells = dict.fromkeys(cell_at(name) for name in _NAMED.findall(text))
    return [cell for cell in cells if max(cell) < size]


def turns(heading: str) -> list[str]:
    """The order in which a wanderer tries directions: straight on, left, right, back."""
    at = DIRECTIONS.index(heading)
    return [DIRECTIONS[(at + turn) % len(DIRECTIONS)] for turn in (0, 1, 3, 2)]


def breadth_first(
    origins: Iterable[Hashable], neighbours: Callable[[Any], Iterable[Hashable]], most: int | None = None
) -> dict[Any, int]:
    """Steps from the nearest origin to each reachable state, up to `most` steps."""
    steps: dict[Any, int] = dict.fromkeys(origins, 0)
    frontier = list(steps)
    while frontier and (most is None or steps[frontier[0]] < most):
        reached = []
        for state in frontier:
            for after in neighbours(state):
                if after not in steps:
                    steps[after] = steps[state] + 1
                    reached.append(after)
        frontier = reached
    return steps
