"""The rules of one puzzle, and the texts of its moves."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from unidiff.tasks.cells import turns

State = Any  # hashable and immutable


class Game(ABC):
    """One puzzle at its start. A subclass is a frozen dataclass; its fields hold everything that does not move.

    A move is a text ("from b2 go right to b3") that names every cell it changes. An answer lists moves in short form
    ("right").
    """

    size: int
    start: State
    form: ClassVar[re.Pattern[str]]  # of a move's text
    short: ClassVar[re.Pattern[str]]  # of a move in an answer

    @abstractmethod
    def moves(self, state: State) -> dict[str, State]:
        """The texts of all legal moves and the states they lead to; empty if the puzzle is solved."""

    @abstractmethod
    def shorten(self, text: str) -> str:
        """A move's short form in an answer."""

    @abstractmethod
    def solved(self, state: State) -> bool: ...

    @abstractmethod
    def distance(self, state: State) -> float:
        """The number of moves of a shortest solution; infinite if there is none."""

    @abstractmethod
    def classes(self, state: State) -> np.ndarray:
        """[size, size] int: the tile that each cell shows, an index into `tiles`."""

    @abstractmethod
    def tiles(self, side: int) -> np.ndarray:
        """uint8 [classes, side, side, 3]: all tiles that a cell can show."""

    # --- derived from these

    def habit(self, state: State, last: str | None) -> list[str]:
        """The legal moves that a wanderer may make after the move `last`: straight on, else left, right or back; any
        move if `last` is None. For games whose short moves are directions; others override it."""
        ways = {self.shorten(text): text for text in self.moves(state)}
        if last is None:
            return list(ways.values())
        return [next(ways[way] for way in turns(self.shorten(last)) if way in ways)]

    @cached_property
    def answer(self) -> re.Pattern[str]:
        """The pattern of an answer."""
        return re.compile(f"answer((?: (?:{self.short.pattern}))+)")

    def answer_text(self, moves: Iterable[str]) -> str:
        return " ".join(("answer", *map(self.shorten, moves)))

    def parse_answer(self, text: str) -> tuple[str, ...] | None:
        """The short moves of an answer; None unless the whole text is an answer with at least one move."""
        match = self.answer.fullmatch(text)
        return tuple(found[0] for found in self.short.finditer(match[1])) if match else None

    def carry_out(self, shorts: Iterable[str]) -> State:
        """The state after an answer's moves, from the start. It stops before the first illegal move."""
        state = self.start
        for short in shorts:
            found = {self.shorten(text): after for text, after in self.moves(state).items()}
            if short not in found:
                return state
            state = found[short]
        return state
