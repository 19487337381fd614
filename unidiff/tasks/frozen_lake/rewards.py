"""Rewards of FrozenLake: each move judged where it is named, each picture where it is drawn, the answer at the end.

A malformed segment earns nothing from anything, nor does a picture that follows a malformed text: it would be paid
for a copy. Text rewards see what the model wrote; the board comes from the task's own column.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unidiff.rewards.reward import Reward, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.sequence import Modality
from unidiff.tasks.frozen_lake.board import Board, board_after, judge_answer, parse_move, replay
from unidiff.tasks.frozen_lake.render import read


def _is_answer(view: SegmentView) -> bool:
    """The last text of a response is its answer, whatever it says; the others announce a picture."""
    return view.last


def _moves(views: list[SegmentView], board: list[Board], quality: str) -> list[float | None]:
    return [
        None if _is_answer(v) else float(getattr(replay(b, [*v.texts_before, v.text or ""]), quality)[-1])
        for v, b in zip(views, board)
    ]


@reward(on="text", weight=0.3)
def legal_move(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for a move that is well formed, starts where the agent is and leads to a safe cell, as it says."""
    return _moves(segments, board, "legal")


@reward(on="text", weight=0.7)
def progress(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for a legal move that brings the agent nearer to the goal."""
    return _moves(segments, board, "progressed")


def _answers(views: list[SegmentView], board: list[Board], quality: str) -> list[float | None]:
    return [
        float(v.ended and judge_answer(b, v.texts_before, v.text or "")[quality]) if _is_answer(v) else None
        for v, b in zip(views, board)
    ]


@reward(on="text", weight=1.0)
def success(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for an answer whose moves lead to the goal."""
    return _answers(segments, board, "success")


@reward(on="text", weight=0.5)
def agreement(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for an answer that lists just the moves named before it."""
    return _answers(segments, board, "agreement")


@reward(on="text", weight=0.3)
def answer_format(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for a well-formed answer."""
    return _answers(segments, board, "format")


def cells_right(views: Sequence[SegmentView], boards: Sequence[Board]) -> np.ndarray:
    """[N] share of each picture's cells that show the board after the moves named before it; 0 behind a malformed
    text. Pictures are read back in one batch for each board size."""
    share = np.zeros(len(views))
    judged = [i for i, v in enumerate(views) if v.texts_before and parse_move(v.texts_before[-1]) is not None]
    for size in {boards[i].size for i in judged}:
        at = [i for i in judged if boards[i].size == size]
        pixels = np.stack([views[i].pixels for i in at])  # type: ignore[arg-type]
        for i, cells in zip(at, read(pixels, size, pixels.shape[1] // size)):
            share[i] = (cells == board_after(boards[i], views[i].texts_before)).mean()
    return share


@reward(on="image", weight=0.5)
def picture_cells(segments: list[SegmentView], board: list[Board]) -> list[float]:
    """Share of cells that show what the moves named so far lead to."""
    return cells_right(segments, board).tolist()


@reward(on="image", weight=1.0)
def picture_exact(segments: list[SegmentView], board: list[Board]) -> list[float]:
    """1 for a picture without a wrong cell."""
    return (cells_right(segments, board) == 1).astype(float).tolist()


REWARDS: tuple[Reward, ...] = (
    legal_move,
    progress,
    success,
    agreement,
    answer_format,
    picture_cells,
    picture_exact,
)


def measure(rows: Sequence[tuple[SegmentView, ...]], boards: Sequence[Board]) -> dict[str, np.ndarray]:
    """Held-out figures of responses, one value a row [B]: success, agreement, format (every segment well formed, answer
    included), legal and progress (share of the moves, 0 without any), image_exact and image_cells (mean over the
    pictures, NaN without any)."""
    words = [_measure_texts(row, board) for row, board in zip(rows, boards)]
    figures = {name: np.array([w[name] for w in words], float) for name in _TEXT_FIGURES}
    pictures = [(i, v) for i, row in enumerate(rows) for v in row if v.modality is Modality.IMAGE]
    owner = np.array([i for i, _ in pictures], int)
    share = cells_right([v for _, v in pictures], [boards[i] for i in owner])
    count = np.bincount(owner, minlength=len(rows))
    for name, value in (("image_exact", share == 1), ("image_cells", share)):
        total = np.bincount(owner, weights=value.astype(float), minlength=len(rows))
        figures[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return figures


_TEXT_FIGURES = ("success", "agreement", "format", "legal", "progress")


def _measure_texts(row: tuple[SegmentView, ...], board: Board) -> dict[str, float]:
    """One response's `_TEXT_FIGURES`."""
    texts = [v.text or "" for v in row if v.modality is Modality.TEXT and not v.last]
    moves, final = replay(board, texts), row[-1]
    answer = judge_answer(board, texts, final.text or "" if final.ended else "")
    return {
        **answer,
        "format": answer["format"] and all(moves.well_formed),
        "legal": float(np.mean(moves.legal or 0.0)),
        "progress": float(np.mean(moves.progressed or 0.0)),
    }
