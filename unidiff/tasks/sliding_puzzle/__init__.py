from unidiff.tasks.sliding_puzzle.game import SlidingGame
from unidiff.tasks.sliding_puzzle.task import SlidingPuzzle

__all__ = ["SlidingGame", "SlidingPuzzle"]
