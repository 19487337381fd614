"""Mazes in rounds: each round is a move and a picture."""

from __future__ import annotations

import random
from dataclasses import dataclass

from unidiff.tasks.cells import all_cells
from unidiff.tasks.maze.game import MazeGame, carve
from unidiff.tasks.puzzles.game import Game
from unidiff.tasks.puzzles.puzzle import Puzzle


@dataclass(frozen=True)
class Maze(Puzzle):
    """Find the only path through a maze made by depth-first search. See `Puzzle` for the settings."""

    difficulty: tuple[int, int] = (3, 5)

    def draw_game(self, chance: random.Random, distance: int) -> Game | None:
        opened, cells = carve(chance, self.size), all_cells(self.size)
        goal = chance.choice(cells)
        game = MazeGame(self.size, opened, goal, goal)
        far = [cell for cell in cells if game.distance(cell) == distance]
        return MazeGame(self.size, opened, chance.choice(far), goal) if far else None

    def question(self, game: Game) -> str:
        return "find the way to the goal"
