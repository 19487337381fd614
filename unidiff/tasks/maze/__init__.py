from unidiff.tasks.maze.game import MazeGame
from unidiff.tasks.maze.task import Maze

__all__ = ["Maze", "MazeGame"]
