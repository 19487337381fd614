"""The sliding puzzle in rounds: each round is a move and a picture."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from unidiff.tasks.cells import all_cells, cell_name
from unidiff.tasks.puzzles.game import Game
from unidiff.tasks.puzzles.motif import MOTIFS
from unidiff.tasks.puzzles.puzzle import Puzzle
from unidiff.tasks.sliding_puzzle.game import REACH, SlidingGame, scrambled


@dataclass(frozen=True)
class SlidingPuzzle(Puzzle):
    """Slide the tiles into order, with the gap at a cell that the question names. See `Puzzle` for the settings.

    faces: what tiles show: "numerals", "picture" (pieces of a motif), or "both" (a random choice per board).
    """

    size: int = 3
    faces: Literal["numerals", "picture", "both"] = "both"

    sizes = (2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.difficulty[1] + (self.rounds or self.difficulty[1]) > REACH:
            raise ValueError(f"difficulty and rounds: distances are known to {REACH} moves; lower one of the two")

    def draw_game(self, chance: random.Random, distance: int) -> Game | None:
        gap = chance.choice(all_cells(self.size))
        drawn = self.faces == "picture" or (self.faces == "both" and chance.random() < 0.5)
        state = scrambled(chance, self.size, gap, distance)
        return None if state is None else SlidingGame(self.size, state, gap, chance.choice(MOTIFS) if drawn else "")

    def question(self, game: Game) -> str:
        assert isinstance(game, SlidingGame)
        return f"slide the tiles into order with the gap at {cell_name(game.gap)}"
