"""A puzzle as a task. A prompt is a question and a picture of the board. A response alternates moves with pictures of
the resulting board, and ends with an answer that lists the moves."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from unidiff.config import check_fields
from unidiff.rewards.reward import Reward
from unidiff.sequence import Locate
from unidiff.tasks.cells import named_cells
from unidiff.tasks.puzzles.frame import Frame, nearest
from unidiff.tasks.puzzles.game import Game, State
from unidiff.tasks.puzzles.judge import REWARDS, measure, replay
from unidiff.tasks.rounds import FIGURES, picture_elsewhere
from unidiff.tasks.splits import check_place, generator, split_of
from unidiff.tasks.task import Example, Responses, Task

_MAX_DRAWS = 20_000


@dataclass(frozen=True)
class Puzzle(Task):
    """Base of puzzles. A subclass defines `draw_game`, `question`, `sizes` and its own default size.

    size: cells per side.
    difficulty: minimum and maximum moves of a shortest solution; the number is uniform between the two.
    rounds: after this number of moves a demonstration always answers; None = the maximum of difficulty.
    goal_directed: probability that the demonstrator makes a best move; otherwise it follows the game's habit.
    side: pixels of the picture's side; None = the model's picture in a run, 64 elsewhere. step: pixels per token.

    Raises ValueError, with the field's name, for a value out of its range.
    """

    size: int = 4
    difficulty: tuple[int, int] = (3, 4)
    rounds: int | None = None
    goal_directed: float = 0.3
    side: int | None = None
    step: int = 8

    sizes: ClassVar[tuple[int, int]] = (3, 6)  # minimum and maximum of `size`
    prepare = None  # boards are drawn in the model's own size
    headline = FIGURES

    def __post_init__(self) -> None:
        check_fields(self)
        low, high = self.sizes
        if not low <= self.size <= high:
            raise ValueError(f"size: expected {low} to {high} cells, got {self.size}")
        if len(self.difficulty) != 2 or not 1 <= self.difficulty[0] <= self.difficulty[1]:
            raise ValueError(
                f"difficulty: expected the least and the most moves, at least 1 and in order, got {self.difficulty}"
            )
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds: expected 1 or more, or None, got {self.rounds}")
        if not 0 <= self.goal_directed <= 1:
            raise ValueError(f"goal_directed: expected a probability from 0 to 1, got {self.goal_directed}")
        if self.step < 1 or (self.side is not None and self.side < 1):
            raise ValueError(f"side and step are {self.side} and {self.step}; both must be above 0")
        _ = self.frame

    # --- defined by subclasses

    def draw_game(self, chance: random.Random, distance: int) -> Game | None:
        """A random game whose shortest solution has `distance` moves; None if this draw failed."""
        raise NotImplementedError

    def question(self, game: Game) -> str:
        """The text of a prompt."""
        raise NotImplementedError

    # --- examples

    @property
    def frame(self) -> Frame:
        return Frame(self.size, self.side or 64, self.step)

    def fitted(self, model: Any) -> Puzzle:
        """The task with boards in the model's picture size, unless `side` is set. Raises ValueError for a text-only
        model and for boards that do not fit."""
        if model.images is None:
            raise ValueError(f"family {model.spec.family} is one of text alone; {type(self).__name__} needs pictures")
        if self.side is not None:
            return self
        height, width = (n * model.images.factor for n in model.spec.image_grid)
        if height != width:
            raise ValueError(f"the model's picture is {height} x {width} pixels; a board needs a square one")
        return replace(self, side=height, step=model.images.factor)

    def example(self, split: str, index: int) -> Example:
        """The index-th example of a split. Splits do not share boards. Raises ValueError for an unknown split or a
        negative index."""
        check_place(split, index)
        chance, frame = generator(type(self).__name__, split, index), self.frame
        distance = chance.randint(*self.difficulty)
        for _ in range(_MAX_DRAWS):
            game = self.draw_game(chance, distance)
            if game is not None and split_of(repr(game)) == split:
                columns = {"game": game, "frame": frame, "distance": distance, "place": (split, index)}
                prompt = [self.question(game), self.picture(game, game.start)]
                return Example(prompt, columns, title=f"{split} board {index}")
        raise ValueError(f"difficulty: no board of size {self.size} has a solution of {distance} moves; lower it")

    def picture(self, game: Game, state: State) -> Image.Image:
        """The picture of a board, RGB."""
        frame = self.frame
        return frame.draw(game.tiles(frame.tile)[game.classes(state)])

    def read(self, game: Game, picture: Image.Image) -> np.ndarray:
        """[size, size] int: the classes of the cells of a picture."""
        frame = self.frame
        return nearest(frame.cells(np.asarray(picture)), game.tiles(frame.tile))

    # --- demonstrations

    def demonstration(self, example: Example, attempt: int = 0) -> list[str | Image.Image]:
        """Alternating moves and pictures, then the answer. It is always legal, but does not always solve the puzzle."""
        return self._walk(example, "demonstration", attempt, self.walker)

    def random_walk(self, example: Example, attempt: int = 0) -> list[str | Image.Image]:
        """A baseline: uniformly random legal moves, with correct pictures."""
        return self._walk(example, "random walk", attempt, lambda game, state, _: dict.fromkeys(game.moves(state), 1.0))

    def _walk(
        self, example: Example, what: str, attempt: int, walker: Callable[[Game, State, str | None], dict[str, float]]
    ) -> list[str | Image.Image]:
        game = example.columns["game"]
        chance = generator(f"{type(self).__name__} {what}", *example.columns["place"], attempt)
        state, moves, parts = game.start, [], []
        while not game.solved(state) and len(moves) < (self.rounds or self.difficulty[1]):
            chances = walker(game, state, moves[-1] if moves else None)
            moves.append(chance.choices(list(chances), list(chances.values()))[0])
            state = game.moves(state)[moves[-1]]
            parts += [moves[-1], self.picture(game, state)]
        return [*parts, game.answer_text(moves)]

    def best(self, example: Example) -> list[str | Image.Image]:
        """A shortest solution."""
        return replace(self, goal_directed=1.0, rounds=example.columns["distance"]).demonstration(example)

    def walker(self, game: Game, state: State, last: str | None) -> dict[str, float]:
        """The demonstrator's probability of each legal move. After the first move the habit outweighs the goal, so more
        imitation cannot remove it."""
        after = game.moves(state)
        best = [text for text in after if game.distance(after[text]) < game.distance(state)]
        habit = game.habit(state, last)
        directed = self.goal_directed if best else 0.0  # some states have no solution
        return {
            text: directed * (text in best) / max(len(best), 1) + (1 - directed) * (text in habit) / len(habit)
            for text in after
        }

    def walker_success(self, example: Example) -> tuple[float, float]:
        """Exact probability that the demonstrator solves the puzzle: (sampled, greedy). Greedy makes the most likely
        move; ties share the probability evenly."""
        return self._reach(example.columns["game"], False), self._reach(example.columns["game"], True)

    def _reach(self, game: Game, greedy: bool) -> float:
        states: dict[tuple[State, str | None], float] = {(game.start, None): 1.0}
        solved = 0.0
        for _ in range(self.rounds or self.difficulty[1]):
            following: dict[tuple[State, str | None], float] = {}
            for (state, last), mass in states.items():
                chances, after = self.walker(game, state, last), game.moves(state)
                if greedy:
                    most = max(chances.values())
                    ties = [text for text, chance in chances.items() if np.isclose(chance, most)]
                    chances = dict.fromkeys(ties, 1 / len(ties))
                for text, chance in chances.items():
                    if game.solved(after[text]):
                        solved += mass * chance
                    elif chance:
                        key = after[text], text
                        following[key] = following.get(key, 0.0) + mass * chance
            states = following
        return solved

    # --- edits and judging

    def region(self, text: str, grid: tuple[int, int]) -> np.ndarray:
        """[rows, columns] bool: the image tokens of the cells that the text names."""
        return self.frame.region(named_cells(text, self.size), grid)

    def locate(self, example: Example) -> Locate:
        return self.region

    def simulate(self, example: Example, texts: Sequence[str], other: bool = False) -> Image.Image:
        """The board after the texts; other: a board of another example's demonstration, after as many moves."""
        if not other:
            game = example.columns["game"]
            return self.picture(game, replay(game, texts).state)
        split, index = example.columns["place"]
        return picture_elsewhere(self, split, index, len(texts))

    def rewards(self) -> tuple[Reward, ...]:
        return REWARDS

    def measure(self, rows: Responses, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Held-out figures of responses; see `judge.measure`."""
        return measure(rows, examples)
