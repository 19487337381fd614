"""A maze: walls between cells, a marker, and a goal.

from b2 go right to b3
answer right right down
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unidiff.tasks.cells import (
    CELL,
    DIRECTION,
    DIRECTIONS,
    Cell,
    all_cells,
    breadth_first,
    cell_name,
    inside,
    neighbour,
)
from unidiff.tasks.maze.tiles import CONTENTS, tiles
from unidiff.tasks.puzzles.game import Game

_MOVE = re.compile(rf"from {CELL} go ({DIRECTION}) to {CELL}")


@dataclass(frozen=True)
class MazeGame(Game):
    """open: pairs of cells without a wall between them, each in reading order. A state is the marker's cell."""

    size: int
    open: frozenset[tuple[Cell, Cell]]
    start: Cell
    goal: Cell

    form = _MOVE
    short = re.compile(DIRECTION)

    def ways(self, cell: Cell) -> dict[str, Cell]:
        """The next cell for each direction without a wall."""
        found = {direction: neighbour(cell, direction) for direction in DIRECTIONS}
        return {way: to for way, to in found.items() if (min(cell, to), max(cell, to)) in self.open}

    def moves(self, state: Cell) -> dict[str, Cell]:
        if self.solved(state):
            return {}
        return {self._text(state, way, to): to for way, to in self.ways(state).items()}

    @staticmethod
    def _text(cell: Cell, way: str, to: Cell) -> str:
        return f"from {cell_name(cell)} go {way} to {cell_name(to)}"

    def shorten(self, text: str) -> str:
        return text.split()[3]

    def solved(self, state: Cell) -> bool:
        return state == self.goal

    def distance(self, state: Cell) -> float:
        return self._distances.get(state, math.inf)

    @cached_property
    def _distances(self) -> dict[Cell, int]:
        return breadth_first([self.goal], lambda cell: self.ways(cell).values())

    def habit(self, state: Cell, last: str | None) -> list[str]:
        """Straight on, else the first open way of DIRECTIONS, even back; any way before the first move. (Always keeping
        left would solve most mazes.)"""
        ways = self.ways(state)
        chosen = list(ways)
        if last is not None:
            chosen = [next(way for way in (self.shorten(last), *DIRECTIONS) if way in ways)]
        return [self._text(state, way, ways[way]) for way in chosen]

    def classes(self, state: Cell) -> np.ndarray:
        found = np.zeros((self.size, self.size), int)
        for cell in all_cells(self.size):
            walls = sum(1 << i for i, way in enumerate(DIRECTIONS) if way not in self.ways(cell))
            found[cell] = walls * CONTENTS + (1 if cell == state else 2 * (cell == self.goal))
        return found

    def tiles(self, side: int) -> np.ndarray:
        return tiles(side)

    def __repr__(self) -> str:
        """Only the walls, so that splits do not share a maze."""
        return f"maze {self.size} {sorted(self.open)}"


def carve(chance: random.Random, size: int) -> frozenset[tuple[Cell, Cell]]:
    """A maze by depth-first search, without cycles: exactly one path between any two cells."""
    path, seen, opened = [(chance.randrange(size), chance.randrange(size))], set(), set()
    seen.add(path[0])
    while path:
        cell = path[-1]
        fresh = [to for to in (neighbour(cell, way) for way in DIRECTIONS) if inside(to, size) and to not in seen]
        if not fresh:
            path.pop()
            continue
        to = chance.choice(fresh)
        opened.add((min(cell, to), max(cell, to)))
        seen.add(to)
        path.append(to)
    return frozenset(opened)
