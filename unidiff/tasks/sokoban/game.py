"""Sokoban: push every box onto a target.

from b2 go right to b3             a step
from b2 push b3 right to b4        a push: the box at b3 to b4, the worker to b3
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
from unidiff.tasks.puzzles.game import Game
from unidiff.tasks.sokoban.tiles import AGENT, BOX, FLOOR, TARGET, WALL, tiles

State = tuple[Cell, frozenset[Cell]]  # the worker, the boxes


@dataclass(frozen=True)
class SokobanGame(Game):
    """walls, targets: cells. start: the worker's cell, and the boxes'. The board's edge is a wall."""

    size: int
    walls: frozenset[Cell]
    targets: frozenset[Cell]
    start: State

    form = re.compile(rf"from {CELL} (?:go (?:{DIRECTION})|push {CELL} (?:{DIRECTION})) to {CELL}")
    short = re.compile(DIRECTION)

    def moves(self, state: State) -> dict[str, State]:
        return {} if self.solved(state) else self._moves(state)

    def _moves(self, state: State) -> dict[str, State]:
        worker, boxes = state
        found: dict[str, State] = {}
        for way in DIRECTIONS:
            to = neighbour(worker, way)
            beyond = neighbour(to, way)
            start = f"from {cell_name(worker)}"
            if not self._free(to):
                continue
            if to not in boxes:
                found[f"{start} go {way} to {cell_name(to)}"] = to, boxes
            elif self._free(beyond) and beyond not in boxes:
                found[f"{start} push {cell_name(to)} {way} to {cell_name(beyond)}"] = to, boxes - {to} | {beyond}
        return found

    def _free(self, cell: Cell) -> bool:
        return inside(cell, self.size) and cell not in self.walls

    def shorten(self, text: str) -> str:
        return text.split()[3 if " go " in text else 4]

    def solved(self, state: State) -> bool:
        return state[1] == self.targets

    def distance(self, state: State) -> float:
        return self._distances.get(state, math.inf)

    @cached_property
    def _distances(self) -> dict[State, int]:
        return self.far()

    def far(self, most: int | None = None) -> dict[State, int]:
        """Moves from each solvable state to the end, up to `most` moves, by breadth-first search back from the end."""
        free = [cell for cell in all_cells(self.size) if self._free(cell) and cell not in self.targets]
        return breadth_first([(cell, self.targets) for cell in free], self._before, most)

    def _before(self, state: State) -> list[State]:
        """The states from which one move leads to this state."""
        worker, boxes = state
        found: list[State] = []
        for way, back in zip(DIRECTIONS, (*DIRECTIONS[2:], *DIRECTIONS[:2])):
            origin, box = neighbour(worker, back), neighbour(worker, way)
            if self._free(origin) and origin not in boxes:
                found.append((origin, boxes))
                if box in boxes:
                    found.append((origin, boxes - {box} | {worker}))
        return found

    @cached_property
    def pushes(self) -> int | None:
        """The minimum number of pushes of a solution; None if there is no solution."""
        best, layer, seen = 0, {self.start}, set()
        while layer:
            walked = set(breadth_first(layer, lambda s: [t for t in self._moves(s).values() if t[1] == s[1]]))
            if any(self.solved(state) for state in walked):
                return best
            seen |= walked
            pushed = {t for s in walked for t in self._moves(s).values() if t[1] != s[1]}
            layer, best = pushed - seen, best + 1
        return None

    def classes(self, state: State) -> np.ndarray:
        worker, boxes = state
        found = np.zeros((self.size, self.size), int)
        for cell in all_cells(self.size):
            if cell in self.walls:
                found[cell] = WALL
                continue
            on = BOX if cell in boxes else AGENT if cell == worker else FLOOR
            found[cell] = on + TARGET * (cell in self.targets and on != AGENT)  # the worker hides a target
        return found

    def tiles(self, side: int) -> np.ndarray:
        return tiles(side)

    def __repr__(self) -> str:
        """Everything except the worker, so that splits do not share a board."""
        return f"sokoban {self.size} {sorted(self.walls)} {sorted(self.targets)} {sorted(self.start[1])}"


def draw_board(chance: random.Random, size: int, boxes: int, walls: int, distance: int) -> SokobanGame | None:
    """A connected board whose start is exactly `distance` moves from the end; None if this draw gives none."""
    cells = all_cells(size)
    chosen = chance.sample(cells, walls + boxes)
    walled, targets = frozenset(chosen[:walls]), frozenset(chosen[walls:])
    free = [cell for cell in cells if cell not in walled]
    around = {cell: [to for to in (neighbour(cell, way) for way in DIRECTIONS) if to in free] for cell in free}
    if len(breadth_first([free[0]], around.__getitem__)) < len(free):
        return None
    empty = SokobanGame(size, walled, targets, (free[0], frozenset()))
    starts = [state for state, moves in empty.far(distance).items() if moves == distance]
    return SokobanGame(size, walled, targets, chance.choice(starts)) if starts else None
