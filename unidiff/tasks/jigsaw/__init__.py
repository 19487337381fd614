from unidiff.tasks.jigsaw.game import JigsawGame
from unidiff.tasks.jigsaw.task import Jigsaw

__all__ = ["Jigsaw", "JigsawGame"]
