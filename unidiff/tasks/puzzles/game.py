"""The rules of one puzzle, and what its moves are called."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from unidiff.tasks.cells import turns

State = Any  # hashable, and never changed


class Game(ABC):
    """One puzzle at its start. A subclass is a frozen dataclass, with what does not move as its fields.

    A move is a text ("from b2 go right to b3"); it names every cell that it changes. An answer lists moves in short
    ("right").
    """

    size: int
    start: State
    form: ClassVar[re.Pattern[str]]  # of a move's text
    short: ClassVar[re.Pattern[str]]  # of a move in an answer

    @abstractmethod
    def moves(self, state: State) -> dict[str, State]:
        """The texts of all legal moves, and the state that each makes; none once the puzzle is solved."""

    @abstractmethod
    def shorten(self, text: str) -> str:
        """A move's words in an answer."""

    @abstractmethod
    def solved(self, state: State) -> bool: ...

    @abstractmethod
    def distance(self, state: State) -> float:
        """Moves of a shortest solution; infinite if there is none."""

    @abstractmethod
    def classes(self, state: State) -> np.ndarray:
        """[size, size] int: what each cell shows, as an index of `tiles`."""

    @abstractmethod
    def tiles(self, side: int) -> np.ndarray:
        """uint8 [classes, side, side, 3]: all that a cell can show."""

    # --- what follows from these

    def habit(self, state: State, last: str | None) -> list[str]:
        """The legal moves that a wanderer may make whose last move was `last`: straight on, else left, right or back;
        any move before the first. For moves that are directions in short; other games define their own."""
        ways = {self.shorten(text): text for text in self.moves(state)}
        if last is None:
            return list(ways.values())
        return [next(ways[way] for way in turns(self.shorten(last)) if way in ways)]

    @cached_property
    def answer(self) -> re.Pattern[str]:
        """The form of an answer."""
        return re.compile(f"answer((?: (?:{self.short.pattern}))+)")

    def answer_text(self, moves: Iterable[str]) -> str:
        return " ".join(("answer", *map(self.shorten, moves)))

    def parse_answer(self, text: str) -> tuple[str, ...] | None:
        """The moves of an answer in short; None unless the whole text is an answer with one move or more."""
        match = self.answer.fullmatch(text)
        return tuple(found[0] for found in self.short.finditer(match[1])) if match else None

    def carry_out(self, shorts: Iterable[str]) -> State:
        """The state after the moves of an answer, from the start; an illegal one ends it, where it is."""
        state = self.start
        for short in shorts:
            found = {self.shorten(text): after for text, after in self.moves(state).items()}
            if short not in found:
                return state
            state = found[short]
        return state
