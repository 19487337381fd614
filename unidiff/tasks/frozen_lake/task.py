"""FrozenLake: find a safe way over the ice, one sentence and one picture per move.

A prompt is a question and a picture of the board. A solution alternates sentences ("from b2 go right to b3") with
pictures of the board after that move, and ends with "answer right right down". Maps and dynamics are those of
gymnasium's FrozenLake (not slippery). Everything is a deterministic function of the task's settings and of
(split, index) or (split, index, attempt).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from unidiff.config import check_fields
from unidiff.rewards.reward import Reward
from unidiff.sequence import Writes
from unidiff.tasks.cells import DIRECTIONS, Cell, turns
from unidiff.tasks.frozen_lake.board import (
    MAX_SIZE,
    MIN_SIZE,
    Board,
    answer_text,
    board_classes,
    distances_from,
    move_text,
    region,
    replay,
)
from unidiff.tasks.frozen_lake.render import check_tile, draw, read
from unidiff.tasks.frozen_lake.rewards import REWARDS, measure
from unidiff.tasks.frozen_lake.text import REWARDS as TEXT_REWARDS
from unidiff.tasks.frozen_lake.text import measure as measure_text
from unidiff.tasks.frozen_lake.text import question
from unidiff.tasks.rounds import FIGURES, picture_elsewhere
from unidiff.tasks.task import Example, Responses, Task

TILE = 16  # default side of a cell in pixels
QUESTION = "find a safe way to the goal"
SPLITS: dict[str, range] = {"train": range(0, 8), "dev": range(8, 9), "test": range(9, 10)}  # layout % 10
_MAX_DRAWS = 20_000
_EXAMPLE, _DEMONSTRATION, _RANDOM = 0, 1, 2  # first word of a seed, so that uses do not share a stream


@dataclass(frozen=True, kw_only=True)
class LakeExample(Example):
    """One prompt of the task: the question and the picture of the board with the agent at the start."""

    prompt: list[str | Image.Image] = field(repr=False)
    columns: dict[str, Any] = field(default_factory=dict, repr=False)
    board: Board
    split: str
    index: int


@dataclass(frozen=True)
class FrozenLake(Task):
    """The task, with its boards and its demonstrator.

    size: cells per side, 3 to 8.
    frozen_probability: probability that a cell is ice and not a hole, 0.5 to 0.95.
    min_distance, max_distance: the shortest path from start to goal is uniform between the two, in moves.
    max_rounds: after this number of moves a demonstration always answers; None = max_distance.
    goal_directed: probability that the demonstrator takes a best move; otherwise it wanders straight on.
    tile: side of a cell in pixels, a multiple of 8. None = the board fills the model's picture in a run; 16 elsewhere.
    pictures: False = a response is one text with all moves and the answer. It needs a model that was trained for it
        (`recipes/supervised.py --pictures false`).
    board: "text" = the prompt shows the board in letters and the format of the answer, for a text-only model; it needs
        pictures False.

    Raises ValueError, with the field's name, for a value out of its range.
    """

    size: int = 4
    frozen_probability: float = 0.75
    min_distance: int = 3
    max_distance: int = 4
    max_rounds: int | None = None
    goal_directed: float = 0.3
    tile: int | None = None
    pictures: bool = True
    board: Literal["picture", "text"] = "picture"

    prepare = None  # boards are drawn in the model's own size
    headline = FIGURES

    @property
    def writes(self) -> Writes:  # type: ignore[override]
        return "interleaved" if self.pictures else "text"

    def __post_init__(self) -> None:
        check_fields(self)
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"size: expected {MIN_SIZE} to {MAX_SIZE} cells, got {self.size}")
        if not 0.5 <= self.frozen_probability <= 0.95:
            raise ValueError(f"frozen_probability: expected 0.5 to 0.95, got {self.frozen_probability}")
        if not 1 <= self.min_distance <= self.max_distance <= 2 * (self.size - 1):
            raise ValueError(
                f"min_distance, max_distance: expected 1 <= min_distance <= max_distance <= "
                f"{2 * (self.size - 1)} for size {self.size}, got {self.min_distance} and {self.max_distance}"
            )
        if self.max_rounds is not None and self.max_rounds < 1:
            raise ValueError(f"max_rounds: expected 1 or more, or None, got {self.max_rounds}")
        if not 0 <= self.goal_directed <= 1:
            raise ValueError(f"goal_directed: expected a probability from 0 to 1, got {self.goal_directed}")
        if self.board == "text" and self.pictures:
            raise ValueError(f"board: expected 'picture', or 'text' with pictures False, got {self.board!r}")
        check_tile(self._tile)

    @property
    def rounds(self) -> int:
        """The maximum number of moves of a demonstration."""
        return self.max_distance if self.max_rounds is None else self.max_rounds

    @property
    def _tile(self) -> int:
        return self.tile or TILE

    def fitted(self, model: Any) -> FrozenLake:
        """The task with boards that fill the model's picture, unless `tile` is set; for a text-only model, with boards
        in letters. Raises ValueError if a board cannot fill the picture."""
        if model.images is None:
            if self.pictures:
                raise ValueError(f"family {model.spec.family} is one of text alone; set --pictures false")
            return replace(self, board="text")
        if self.tile is not None:
            return self
        height, width = (n * model.images.factor for n in model.spec.image_grid)
        if height != width or height % self.size:
            raise ValueError(
                f"board_size is {self.size}, but its cells do not fill the model's picture of {height} x {width} "
                "pixels; choose another, or give the pixels of a cell's side (--tile)"
            )
        return replace(self, tile=height // self.size)

    # --- boards -----------------------------------------------------------------------------------

    def example(self, split: str, index: int) -> LakeExample:
        """The index-th example of a split. Splits do not share layouts of holes.

        Raises ValueError for an unknown split or a negative index.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if index < 0:
            raise ValueError(f"index: expected 0 or more, got {index}")
        board = self._board(split, _generator(_EXAMPLE, split, index))
        distance = int(board.distance(board.start))
        columns = {"board": board, "split": split, "index": index, "distance": distance}
        prompt: list[str | Image.Image] = [QUESTION, self.render(board, board.start)]
        if self.board == "text":
            prompt = [question(board)]
        title = f"{split} board {index}"
        return LakeExample(prompt=prompt, columns=columns, title=title, board=board, split=split, index=index)

    def _board(self, split: str, rng: np.random.Generator) -> Board:
        distance = int(rng.integers(self.min_distance, self.max_distance + 1))
        for _ in range(_MAX_DRAWS):
            seed = int(rng.integers(2**31))
            rows = [row.translate(_ALL_FROZEN) for row in _map(self.size, self.frozen_probability, seed)]
            pairs = _pairs(rows, distance) if layout_bucket(rows) in SPLITS[split] else []
            if pairs:
                start, goal = pairs[rng.integers(len(pairs))]
                return Board(_place(rows, {start: "S", goal: "G"}))
        raise ValueError(
            f"max_distance: no {split} board of size {self.size} and frozen_probability "
            f"{self.frozen_probability} has a way of {distance} moves; lower it or allow more holes"
        )

    # --- the demonstrator -------------------------------------------------------------------------

    def demonstration(self, example: LakeExample, attempt: int = 0) -> list[str | Image.Image]:
        """A walk as text, picture, text, picture, ..., answer; or as one text. It is always legal, but does not always
        reach the goal."""
        return self._walk(example, _DEMONSTRATION, attempt, self.walker_probabilities)

    def random_walk(self, example: LakeExample, attempt: int = 0) -> list[str | Image.Image]:
        """A baseline: uniformly random safe moves, with correct pictures."""

        def chances(board: Board, cell: Cell, last: str | None) -> np.ndarray:
            safe = np.array([board.safe(board.neighbour(cell, direction)) for direction in DIRECTIONS])
            return safe / safe.sum()

        return self._walk(example, _RANDOM, attempt, chances)

    def _walk(
        self,
        example: LakeExample,
        use: int,
        attempt: int,
        walker: Callable[[Board, Cell, str | None], np.ndarray],
    ) -> list[str | Image.Image]:
        if attempt < 0:
            raise ValueError(f"attempt: expected 0 or more, got {attempt}")
        board, rng = example.board, _generator(use, example.split, example.index, attempt)
        parts: list[str | Image.Image] = []
        moves: list[str] = []
        cell = board.start
        while cell != board.goal and len(moves) < self.rounds:
            probabilities = walker(board, cell, moves[-1] if moves else None)
            moves.append(DIRECTIONS[rng.choice(len(DIRECTIONS), p=probabilities)])
            parts.append(move_text(board, cell, moves[-1]))
            cell, _ = board.step(cell, moves[-1])
            parts.append(self.render(board, cell))
        parts.append(answer_text(moves))
        return parts if self.pictures else [" ".join(p for p in parts if isinstance(p, str))]

    def best(self, example: LakeExample) -> list[str | Image.Image]:
        """A shortest path."""
        return replace(self, goal_directed=1.0, max_rounds=self.max_distance).demonstration(example)

    def walker_probabilities(self, board: Board, cell: Cell, last_direction: str | None) -> np.ndarray:
        """[4] float64: the probability of each of DIRECTIONS for a walker at `cell` that came by `last_direction`.

        With probability `goal_directed` it takes one of the best moves. Otherwise it wanders: straight on if that is
        safe, else the first safe of left, right and back; any safe direction before its first move. After the first
        move this habit outweighs the goal, so more imitation cannot remove it.
        """
        safe = np.array([board.safe(board.neighbour(cell, direction)) for direction in DIRECTIONS])
        best = np.array([board.distance(board.neighbour(cell, d)) < board.distance(cell) for d in DIRECTIONS])
        wander = safe.astype(float)
        if last_direction is not None:
            habit = next(d for d in turns(last_direction) if safe[DIRECTIONS.index(d)])
            wander = np.array([direction == habit for direction in DIRECTIONS], float)
        return self.goal_directed * best / best.sum() + (1 - self.goal_directed) * wander / wander.sum()

    def walker_success(self, example: LakeExample) -> tuple[float, float]:
        """Exact probability that the demonstrator reaches the goal: (sampled, greedy).

        Greedy takes the most likely move at each step; ties share the probability evenly.
        """
        return self._reach(example.board, greedy=False), self._reach(example.board, greedy=True)

    def _reach(self, board: Board, greedy: bool) -> float:
        states: dict[tuple[Cell, str | None], float] = {(board.start, None): 1.0}
        reached = 0.0
        for _ in range(self.rounds):
            following: dict[tuple[Cell, str | None], float] = defaultdict(float)
            for (cell, last), mass in states.items():
                probabilities = self.walker_probabilities(board, cell, last)
                if greedy:
                    ties = np.isclose(probabilities, probabilities.max())
                    probabilities = ties / ties.sum()
                for direction, probability in zip(DIRECTIONS, probabilities):
                    if probability:
                        following[board.step(cell, direction)[0], direction] += mass * probability
            reached += sum(mass for (cell, _), mass in following.items() if cell == board.goal)
            states = {state: mass for state, mass in following.items() if state[0] != board.goal}
        return reached

    # --- pictures ---------------------------------------------------------------------------------

    def render(self, board: Board, agent: Cell | None) -> Image.Image:
        """The picture of a board, RGB, size * tile pixels a side; `agent` None leaves the agent out."""
        return render(board, agent, self._tile)

    def parse(self, pixels: np.ndarray) -> np.ndarray:
        """Cell classes [N, size, size] of pictures uint8 [N, H, W, 3]. Raises ValueError for another size."""
        return read(pixels, self.size, self._tile)

    def region(self, text: str, grid: tuple[int, int]) -> np.ndarray:
        """[rows, columns] bool: the image tokens of the cells that the text names."""
        return region(text, self.size, grid)

    def simulate(self, example: LakeExample, texts: Sequence[str], other: bool = False) -> Image.Image:
        """The board after the texts; other: a board of another example's demonstration, after as many moves."""
        if not other:
            return self.render(example.board, replay(example.board, texts).agent)
        return picture_elsewhere(self, example.split, example.index, len(texts))

    # --- judging ------------------------------------------------------------------------------------------------

    def rewards(self) -> tuple[Reward, ...]:
        """The task's own reward functions; see `rewards`."""
        return REWARDS if self.pictures else TEXT_REWARDS

    def measure(self, rows: Responses, examples: Sequence[LakeExample]) -> dict[str, np.ndarray]:
        """Held-out figures of responses, one value per row: success, image_exact, format, ..."""
        return (measure if self.pictures else measure_text)(rows, [e.board for e in examples])


def render(board: Board, agent: Cell | None, tile: int = 16) -> Image.Image:
    """The picture of a board, RGB, size * tile pixels a side; `agent` None leaves the agent out."""
    return Image.fromarray(draw(board_classes(board, agent)[None], tile)[0])


def layout_bucket(rows: Sequence[str]) -> int:
    """0 to 9, by a hash of the layout of holes; start and goal do not matter."""
    layout = "\n".join(row.translate(_ALL_FROZEN) for row in rows)
    return int.from_bytes(hashlib.sha256(layout.encode()).digest()[:8], "big") % 10


_ALL_FROZEN = str.maketrans("SG", "FF")


def _map(size: int, frozen_probability: float, seed: int) -> list[str]:
    from gymnasium.envs.toy_text.frozen_lake import generate_random_map  # imported here, as other tasks do not need it

    return generate_random_map(size=size, p=frozen_probability, seed=seed)


def _pairs(rows: Sequence[str], distance: int) -> list[tuple[Cell, Cell]]:
    """Every ordered pair of frozen cells that are exactly `distance` moves apart."""
    return [
        (start, goal)
        for start in _frozen(rows)
        for goal, steps in distances_from(start, rows).items()
        if steps == distance
    ]


def _frozen(rows: Sequence[str]) -> Iterator[Cell]:
    return ((r, c) for r, row in enumerate(rows) for c, letter in enumerate(row) if letter == "F")


def _place(rows: Sequence[str], letters: dict[Cell, str]) -> tuple[str, ...]:
    return tuple("".join(letters.get((r, c), letter) for c, letter in enumerate(row)) for r, row in enumerate(rows))


def _generator(use: int, split: str, *words: int) -> np.random.Generator:
    """A separate generator for each use, split and index; the global random state does not change."""
    return np.random.default_rng(np.random.SeedSequence([use, list(SPLITS).index(split), *words]))
