"""A jigsaw of square pieces: a move swaps two pieces, until the picture is whole.

swap a1 and b2
answer a1 b2 a3 c1
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np

from unidiff.tasks.cells import CELL, all_cells, cell_name
from unidiff.tasks.puzzles.game import Game
from unidiff.tasks.puzzles.motif import pieces

State = tuple[int, ...]  # the piece of each cell in reading order; piece i belongs to cell i


@dataclass(frozen=True)
class JigsawGame(Game):
    """motif: the picture (`puzzles.motif`)."""

    size: int
    start: State
    motif: str

    form = re.compile(rf"swap {CELL} and {CELL}")
    short = re.compile(rf"{CELL} {CELL}")

    def moves(self, state: State) -> dict[str, State]:
        return {} if self.solved(state) else {text: self._swapped(state, pair) for text, pair in self._pairs().items()}

    def _pairs(self) -> dict[str, tuple[int, int]]:
        """All pairs of places, by move text; the first place comes before the second in reading order."""
        names = list(map(cell_name, all_cells(self.size)))
        return {f"swap {names[a]} and {names[b]}": (a, b) for a, b in itertools.combinations(range(len(names)), 2)}

    @staticmethod
    def _swapped(state: State, pair: tuple[int, int]) -> State:
        after = list(state)
        after[pair[0]], after[pair[1]] = state[pair[1]], state[pair[0]]
        return tuple(after)

    def shorten(self, text: str) -> str:
        _, first, _, second = text.split()
        return f"{first} {second}"

    def solved(self, state: State) -> bool:
        return state == tuple(range(len(state)))

    def distance(self, state: State) -> int:
        """The minimum number of swaps: pieces minus cycles of the permutation."""
        left, cycles = set(range(len(state))), 0
        while left:
            cycles, at = cycles + 1, left.pop()
            while (at := state[at]) in left:
                left.remove(at)
        return len(state) - cycles

    def habit(self, state: State, last: str | None) -> list[str]:
        """The pair of places after the last swapped pair, in reading order; any pair before the first move."""
        texts = list(self._pairs())
        return texts if last is None else [texts[(texts.index(last) + 1) % len(texts)]]

    def classes(self, state: State) -> np.ndarray:
        return np.array(state).reshape(self.size, self.size)

    def tiles(self, side: int) -> np.ndarray:
        return pieces(self.motif, self.size, side).reshape(-1, side, side, 3)
