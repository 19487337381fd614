"""Base of puzzles that are solved in rounds; a round is a move in words and a picture.

`Game` defines one puzzle: rules, move texts and tiles. `Puzzle` makes it a task, with prompts, demonstrations, rewards
and held-out figures.
"""

from unidiff.tasks.puzzles.game import Game
from unidiff.tasks.puzzles.puzzle import Puzzle

__all__ = ["Game", "Puzzle"]
