"""Puzzles that are solved in rounds of a move in words and a picture: what they share.

`Game` is what one puzzle needs: rules, words and tiles. `Puzzle` makes a task of it, with prompts, demonstrations,
rewards and held-out figures.
"""

from unidiff.tasks.puzzles.game import Game
from unidiff.tasks.puzzles.puzzle import Puzzle

__all__ = ["Game", "Puzzle"]
