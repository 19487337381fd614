"""The sliding puzzle: tiles slide into the gap until they are in order.

slide b3 left to b2                the tile at b3 into the gap at b2
answer left up up
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from unidiff.tasks.cells import CELL, DIRECTION, DIRECTIONS, Cell, breadth_first, cell_name, inside, neighbour
from unidiff.tasks.puzzles.game import Game
from unidiff.tasks.sliding_puzzle.tiles import tiles

State = tuple[int, ...]  # the tile of each cell in reading order; 0 = the gap

REACH = 14  # distances are computed up to this number of moves; farther states count as infinitely far


@dataclass(frozen=True)
class SlidingGame(Game):
    """start: tiles 1 … size² - 1 and the gap. gap: the gap's cell in the solved state. pieces: the motif on the tiles;
    "" = numerals."""

    size: int
    start: State
    gap: Cell
    pieces: str = ""

    form = re.compile(rf"slide {CELL} (?:{DIRECTION}) to {CELL}")
    short = re.compile(DIRECTION)

    def moves(self, state: State) -> dict[str, State]:
        return {} if self.solved(state) else _moves(self.size, state)

    def shorten(self, text: str) -> str:
        return text.split()[2]

    @property
    def end(self) -> State:
        return ordered(self.size, self.gap)

    def solved(self, state: State) -> bool:
        return state == self.end

    def distance(self, state: State) -> float:
        return _distances(self.size, self.end).get(state, math.inf)

    def classes(self, state: State) -> np.ndarray:
        return np.array(state).reshape(self.size, self.size)

    def tiles(self, side: int) -> np.ndarray:
        return tiles(side, self.size, self.pieces, self.gap[0] * self.size + self.gap[1])


def ordered(size: int, gap: Cell) -> State:
    """Tiles in order, with the gap at a cell."""
    place = gap[0] * size + gap[1]
    tiles = list(range(1, size**2))
    return (*tiles[:place], 0, *tiles[place:])


def _moves(size: int, state: State) -> dict[str, State]:
    place = state.index(0)
    gap, found = divmod(place, size), {}
    for way, back in zip(DIRECTIONS, (*DIRECTIONS[2:], *DIRECTIONS[:2])):
        tile = neighbour(gap, back)  # the tile that slides this way
        if inside(tile, size):
            other, after = tile[0] * size + tile[1], list(state)
            after[place], after[other] = after[other], 0
            found[f"slide {cell_name(tile)} {way} to {cell_name(gap)}"] = tuple(after)
    return found


@lru_cache(maxsize=32)
def _distances(size: int, end: State) -> dict[State, int]:
    return breadth_first([end], lambda state: _moves(size, state).values(), REACH)


def scrambled(chance: random.Random, size: int, gap: Cell, distance: int) -> State | None:
    """A random state at exactly `distance` moves from the end; None if there is none within REACH."""
    far = _by_distance(size, ordered(size, gap)).get(distance)
    return chance.choice(far) if far else None


@lru_cache(maxsize=32)
def _by_distance(size: int, end: State) -> dict[int, list[State]]:
    found: dict[int, list[State]] = {}
    for state, steps in _distances(size, end).items():
        found.setdefault(steps, []).append(state)
    return found
