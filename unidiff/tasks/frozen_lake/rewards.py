"""Rewards of FrozenLake: each move judged where it is named, each picture where it is drawn, the answer at the end.

A malformed segment earns nothing from anything, nor does a picture that follows a malformed text: it would be paid
for a copy. Text rewards see what the model wrote; the board comes from the task's own column.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unidiff.rewards.reward import Reward, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.tasks.frozen_lake.board import Board, board_after, judge_answer, parse_move, replay
from unidiff.tasks.frozen_lake.render import read
from unidiff.tasks.rounds import Rounds

_rounds = Rounds(replay, judge_answer)


@reward(on="text", weight=0.3)
def legal_move(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for a move that is well formed, starts where the agent is and leads to a safe cell, as it says."""
    return _rounds.moves(segments, board, "legal")


@reward(on="text", weight=0.7)
def progress(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for a legal move that brings the agent nearer to the goal."""
    return _rounds.moves(segments, board, "progressed")


@reward(on="text", weight=1.0)
def success(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for an answer whose moves lead to the goal."""
    return _rounds.answers(segments, board, "success")


@reward(on="text", weight=0.5)
def agreement(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for an answer that lists just the moves named before it."""
    return _rounds.answers(segments, board, "agreement")


@reward(on="text", weight=0.3)
def answer_format(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for a well-formed answer."""
    return _rounds.answers(segments, board, "format")


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
    """Held-out figures of responses, one value a row [B]; see `Rounds.measure`."""
    return _rounds.measure(rows, boards, lambda views, owner: cells_right(views, [boards[i] for i in owner]))
