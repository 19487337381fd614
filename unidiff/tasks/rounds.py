"""Judging shared by FrozenLake and the puzzles: responses alternate moves and pictures and end with an answer.

The last text of a response counts as its answer; every other text is a move, followed by a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from PIL import Image

from unidiff.rewards.segment_view import SegmentView
from unidiff.sequence import Modality
from unidiff.tasks.task import ELSEWHERE, Task

FIGURES = ("success", "image_exact", "format", "agreement", "progress", "legal", "image_cells")
_OF_TEXTS = ("success", "agreement", "format", "legal", "progress")

Board = TypeVar("Board")


class Moves(Protocol):
    """The result of carrying out moves; one entry per text."""

    @property
    def well_formed(self) -> tuple[bool, ...]: ...
    @property
    def legal(self) -> tuple[bool, ...]: ...
    @property
    def progressed(self) -> tuple[bool, ...]: ...


@dataclass(frozen=True)
class Rounds(Generic[Board]):
    """A game's judges. replay: carries out the moves' texts on a board. answer: judges an answer by the board and the
    moves before it: success, agreement, format."""

    replay: Callable[[Board, Sequence[str]], Moves]
    answer: Callable[[Board, Sequence[str], str], dict[str, bool]]

    def moves(self, views: Sequence[SegmentView], boards: Sequence[Board], quality: str) -> list[float | None]:
        """The field `quality` of `Moves` for each text; None for an answer."""
        return [
            None if v.last else float(getattr(self.replay(b, [*v.texts_before, v.text or ""]), quality)[-1])
            for v, b in zip(views, boards)
        ]

    def answers(self, views: Sequence[SegmentView], boards: Sequence[Board], quality: str) -> list[float | None]:
        """The value `quality` of each answer, 0 if it was cut off; None for a move."""
        return [
            float(v.ended and self.answer(b, v.texts_before, v.text or "")[quality]) if v.last else None
            for v, b in zip(views, boards)
        ]

    def measure(
        self,
        rows: Sequence[tuple[SegmentView, ...]],
        boards: Sequence[Board],
        cells_right: Callable[[list[SegmentView], np.ndarray], np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Held-out figures of responses, one value per row [B]: success, agreement, format (every text well formed,
        including the answer), legal and progress (share of the moves, 0 without any), image_exact and image_cells (mean
        over the pictures, NaN without any).

        cells_right: (N pictures, their rows [N]) -> [N] share of correct cells.
        """
        words = [self._texts(row, board) for row, board in zip(rows, boards)]
        figures = {name: np.array([w[name] for w in words], float) for name in _OF_TEXTS}
        pictures = [(i, v) for i, row in enumerate(rows) for v in row if v.modality is Modality.IMAGE]
        owner = np.array([i for i, _ in pictures], int)
        share = cells_right([v for _, v in pictures], owner)
        count = np.bincount(owner, minlength=len(rows))
        for name, value in (("image_exact", share == 1), ("image_cells", share)):
            total = np.bincount(owner, weights=value.astype(float), minlength=len(rows))
            figures[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return figures

    def _texts(self, row: tuple[SegmentView, ...], board: Board) -> dict[str, float]:
        """One response's figures `_OF_TEXTS`."""
        texts = [v.text or "" for v in row if v.modality is Modality.TEXT and not v.last]
        moves, final = self.replay(board, texts), row[-1]
        answer = self.answer(board, texts, final.text or "" if final.ended else "")
        return {
            **answer,
            "format": answer["format"] and all(moves.well_formed),
            "legal": float(np.mean(moves.legal or 0.0)),
            "progress": float(np.mean(moves.progressed or 0.0)),
        }


def picture_elsewhere(task: Task, split: str, index: int, moves: int) -> Image.Image:
    """A picture of another example's demonstration, after the same number of moves, or its last picture."""
    parts: Any = task.demonstration(task.example(split, index + ELSEWHERE))
    pictures = parts[1::2]
    return pictures[min(moves, len(pictures)) - 1]
