"""Rewards of FrozenLake: they score each move, each picture, and the answer.

A malformed segment earns 0 from every reward. A picture after a malformed text earns 0 too, because a copy of the last
picture would be right. Text rewards see the model's text; the board comes from the task's column.
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
    """1 for a well-formed move that starts at the agent's cell and leads to the safe cell that it names."""
    return _rounds.moves(segments, board, "legal")


@reward(on="text", weight=0.7)
def progress(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for a legal move towards the goal."""
    return _rounds.moves(segments, board, "progressed")


@reward(on="text", weight=1.0)
def success(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for an answer whose moves lead to the goal."""
    return _rounds.answers(segments, board, "success")


@reward(on="text", weight=0.5)
def agreement(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for an answer that lists exactly the moves of the rounds."""
    return _rounds.answers(segments, board, "agreement")


@reward(on="text", weight=0.3)
def answer_format(segments: list[SegmentView], board: list[Board]) -> list[float | None]:
    """1 for a well-formed answer."""
    return _rounds.answers(segments, board, "format")


def cells_right(views: Sequence[SegmentView], boards: Sequence[Board]) -> np.ndarray:
    """[N] share of each picture's cells that show the board after the preceding moves; 0 after a malformed text.
    Pictures are read in one batch per board size."""
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
    """Share of cells that show the board after the preceding moves."""
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
    """Held-out figures of responses, one value per row [B]; see `Rounds.measure`."""
    return _rounds.measure(rows, boards, lambda views, owner: cells_right(views, [boards[i] for i in owner]))
