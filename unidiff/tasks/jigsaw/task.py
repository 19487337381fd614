"""A jigsaw in rounds: each round is a swap and a picture."""

from __future__ import annotations

import random
from dataclasses import dataclass

from unidiff.tasks.jigsaw.game import JigsawGame
from unidiff.tasks.puzzles.game import Game
from unidiff.tasks.puzzles.motif import MOTIFS
from unidiff.tasks.puzzles.puzzle import Puzzle


@dataclass(frozen=True)
class Jigsaw(Puzzle):
    """Put the pieces of a picture in their places. See `Puzzle` for the settings; difficulty counts swaps."""

    size: int = 3
    difficulty: tuple[int, int] = (2, 3)

    sizes = (2, 3)

    def draw_game(self, chance: random.Random, distance: int) -> Game | None:
        state, motif = list(range(self.size**2)), chance.choice(MOTIFS)
        for _ in range(distance):
            a, b = chance.sample(range(len(state)), 2)
            state[a], state[b] = state[b], state[a]
        game = JigsawGame(self.size, tuple(state), motif)
        return game if game.distance(game.start) == distance else None

    def question(self, game: Game) -> str:
        return "swap pieces until the picture is whole"
