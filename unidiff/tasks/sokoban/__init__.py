from unidiff.tasks.sokoban.game import SokobanGame
from unidiff.tasks.sokoban.task import Sokoban

__all__ = ["Sokoban", "SokobanGame"]
