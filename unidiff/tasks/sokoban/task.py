"""Sokoban in rounds: each round is a move and a picture."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from unidiff.tasks.puzzles.game import Game
from unidiff.tasks.puzzles.puzzle import Puzzle
from unidiff.tasks.sokoban.game import draw_board
from unidiff.tasks.task import Example


@dataclass(frozen=True)
class Sokoban(Puzzle):
    """Push every box onto a target. See `Puzzle` for the settings.

    boxes: 1 or 2. walls: number of wall cells, besides the board's edge. Difficulty counts steps and pushes; the column
    `pushes` is the minimum number of pushes of a solution.
    """

    boxes: int = 1
    walls: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boxes not in (1, 2):
            raise ValueError(f"boxes: expected 1 or 2, got {self.boxes}")
        if not 0 <= self.walls <= self.size**2 // 2:
            raise ValueError(f"walls: expected 0 to {self.size**2 // 2} for size {self.size}, got {self.walls}")

    def draw_game(self, chance: random.Random, distance: int) -> Game | None:
        return draw_board(chance, self.size, self.boxes, self.walls, distance)

    def question(self, game: Game) -> str:
        return "push every box onto a target" if self.boxes > 1 else "push the box onto the target"

    def example(self, split: str, index: int) -> Example:
        one = super().example(split, index)
        return replace(one, columns={**one.columns, "pushes": one.columns["game"].pushes})
