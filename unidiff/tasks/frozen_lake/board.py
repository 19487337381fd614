"""Frozen-lake boards, the sentences that describe a walk, and the verifiers of these sentences.

Everything here is a pure function of a board and of texts: no models, pixels or random numbers. For cells and their
names see unidiff/tasks/cells.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unidiff.tasks.cells import (
    CELL,
    DIRECTION,
    DIRECTIONS,
    Cell,
    breadth_first,
    cell_at,
    cell_name,
    inside,
    named_cells,
    neighbour,
)

LETTERS = "FHSG"  # frozen, hole, start, goal
CLASSES = 2 * len(LETTERS)  # a cell's class is 2 * LETTERS.index(letter) + (agent stands on it)
MIN_SIZE, MAX_SIZE = 3, 8

_MOVE = re.compile(rf"from ({CELL}) go ({DIRECTION}) to ({CELL})")
_ANSWER = re.compile(rf"answer((?: (?:{DIRECTION}))+)")


@dataclass(frozen=True)
class Board:
    """A map in gymnasium's FrozenLake format, with its dynamics (not slippery).

    rows: one string per row, of the letters S (start), F (frozen), H (hole) and G (goal).

    Raises ValueError if the map is not square, is not 3 to 8 cells wide, contains another letter, or does not have
    exactly one start and one goal.
    """

    rows: tuple[str, ...]

    def __post_init__(self) -> None:
        letters = "".join(self.rows)
        if not MIN_SIZE <= self.size <= MAX_SIZE or any(len(row) != self.size for row in self.rows):
            raise ValueError(f"rows: expected a square map of {MIN_SIZE} to {MAX_SIZE} rows, got {self.rows!r}")
        if set(letters) - set(LETTERS) or letters.count("S") != 1 or letters.count("G") != 1:
            raise ValueError(f"rows: expected letters S F H G with one S and one G, got {self.rows!r}")

    @property
    def size(self) -> int:
        return len(self.rows)

    @cached_property
    def start(self) -> Cell:
        return self._find("S")[0]

    @cached_property
    def goal(self) -> Cell:
        return self._find("G")[0]

    @cached_property
    def holes(self) -> frozenset[Cell]:
        return frozenset(self._find("H"))

    @cached_property
    def classes(self) -> np.ndarray:
        """[size, size] int64: the cells' classes without an agent on the board."""
        return np.array([[2 * LETTERS.index(letter) for letter in row] for row in self.rows])

    def letter(self, cell: Cell) -> str:
        return self.rows[cell[0]][cell[1]]

    def contains(self, cell: Cell) -> bool:
        return inside(cell, self.size)

    def neighbour(self, cell: Cell, direction: str) -> Cell:
        """The adjacent cell in a direction; it may be off the board."""
        return neighbour(cell, direction)

    def safe(self, cell: Cell) -> bool:
        """Whether the cell is on the board and not a hole."""
        return self.contains(cell) and self.letter(cell) != "H"

    def step(self, cell: Cell, direction: str) -> tuple[Cell, bool]:
        """The cell after one move, and whether it is a hole.

        A move off the board leaves the agent in place. So does any move from a hole or the goal, because the game is
        over there.
        """
        if self.letter(cell) not in "HG":
            target = self.neighbour(cell, direction)
            cell = target if self.contains(target) else cell
        return cell, self.letter(cell) == "H"

    def distance(self, cell: Cell) -> float:
        """The length of a shortest safe path from the cell to the goal; infinite for holes and cut-off cells."""
        return self._distances.get(cell, math.inf)

    @cached_property
    def _distances(self) -> dict[Cell, int]:
        return distances_from(self.goal, self.rows)

    def _find(self, letter: str) -> list[Cell]:
        return [(r, c) for r, row in enumerate(self.rows) for c, found in enumerate(row) if found == letter]


def distances_from(origin: Cell, rows: Sequence[str]) -> dict[Cell, int]:
    """Breadth-first distances from a cell to each cell that is reachable without crossing a hole."""

    def ways(cell: Cell) -> list[Cell]:
        around = (neighbour(cell, direction) for direction in DIRECTIONS)
        return [target for target in around if inside(target, len(rows)) and rows[target[0]][target[1]] != "H"]

    return breadth_first([origin], ways)


def board_classes(board: Board, agent: Cell | None) -> np.ndarray:
    """[size, size] int64: the class of each cell with the agent at `agent` (None: nowhere)."""
    classes = board.classes.copy()
    if agent is not None:
        classes[agent] += 1
    return classes


# --- sentences ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """The parsed text of one round."""

    origin: Cell
    direction: str
    target: Cell


def move_text(board: Board, cell: Cell, direction: str) -> str:
    """The text of a round: "from b2 go right to b3"."""
    return f"from {cell_name(cell)} go {direction} to {cell_name(board.step(cell, direction)[0])}"


def answer_text(directions: Sequence[str]) -> str:
    """The text of an answer: "answer right right down"."""
    return " ".join(("answer", *directions))


def parse_move(text: str) -> Move | None:
    """The move that a round's text states; None unless the whole text has the format of `move_text`."""
    match = _MOVE.fullmatch(text)
    return Move(cell_at(match[1]), match[2], cell_at(match[3])) if match else None


def parse_answer(text: str) -> tuple[str, ...] | None:
    """The directions of an answer; None unless the whole text is "answer" and at least one direction."""
    match = _ANSWER.fullmatch(text)
    return tuple(match[1].split()) if match else None


def region(text: str, size: int, grid: tuple[int, int]) -> np.ndarray:
    """[rows, columns] bool: the image tokens that cover the cells a text names.

    It depends only on the text and not on the true board, because edits use it at inference. Raises ValueError if the
    grid of image tokens does not divide evenly into the board's cells.
    """
    if any(side < size or side % size for side in grid):
        raise ValueError(f"grid: {grid} tokens do not divide into {size} x {size} cells; use multiples")
    named = np.zeros((size, size), dtype=bool)
    for cell in named_cells(text, size):
        named[cell] = True
    return named.repeat(grid[0] // size, axis=0).repeat(grid[1] // size, axis=1)


# --- verifiers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """The result of carrying out the rounds' texts from the start; one entry per text.

    cells: the agent's cell after the text.
    well_formed: the text has exactly the format of a round.
    legal: it is well formed, the game is not over, the agent is at the first named cell, the direction leads to the
        second named cell, and that cell is on the board and not a hole.
    progressed: it is legal, and the agent is nearer to the goal than before.
    """

    start: Cell
    cells: tuple[Cell, ...]
    well_formed: tuple[bool, ...]
    legal: tuple[bool, ...]
    progressed: tuple[bool, ...]
    fell: bool
    reached: bool

    @property
    def agent(self) -> Cell:
        """The agent's final cell."""
        return self.cells[-1] if self.cells else self.start


def replay(board: Board, texts: Sequence[str]) -> Replay:
    """Carries out the rounds' texts in order.

    A malformed text changes nothing. For a well-formed text, the direction is carried out from the agent's true cell,
    whatever cells the text names. In a hole or on the goal the agent stays for ever.
    """
    agent, cells, flags = board.start, [], []
    for text in texts:
        move, before = parse_move(text), agent
        if move is not None:
            agent, _ = board.step(before, move.direction)
        legal = move is not None and _legal(board, before, move)
        flags.append((move is not None, legal, legal and board.distance(agent) < board.distance(before)))
        cells.append(agent)
    well_formed, legal, progressed = zip(*flags) if flags else ((), (), ())
    return Replay(
        start=board.start,
        cells=tuple(cells),
        well_formed=well_formed,
        legal=legal,
        progressed=progressed,
        fell=board.letter(agent) == "H",
        reached=agent == board.goal,
    )


def _legal(board: Board, agent: Cell, move: Move) -> bool:
    running = board.letter(agent) not in "HG"
    consistent = move.origin == agent and move.target == board.neighbour(agent, move.direction)
    return running and consistent and board.safe(move.target)


def judge_answer(board: Board, round_texts: Sequence[str], text: str) -> dict[str, bool]:
    """Judges an answer by the board and by the rounds before it.

    format: the answer is well formed.
    success: its moves, carried out from the start, reach the goal without a hole on the way.
    agreement: it repeats the directions of the rounds. False if the answer or any round is malformed: two malformed
        parts must not count as agreeing.
    """
    moves = parse_answer(text)
    if moves is None:
        return {"success": False, "agreement": False, "format": False}
    agent = board.start
    for direction in moves:
        agent, _ = board.step(agent, direction)
    rounds = [parse_move(round_text) for round_text in round_texts]
    agreement = all(rounds) and moves == tuple(move.direction for move in rounds if move)
    return {"success": agent == board.goal, "agreement": agreement, "format": True}


def board_after(board: Board, texts: Sequence[str]) -> np.ndarray:
    """[size, size] int64: the cells' classes after the texts are carried out, to compare with pictures."""
    return board_classes(board, replay(board, texts).agent)
