"""Judges of a puzzle: they score each move, each picture, and the answer.

A malformed segment earns 0 from every reward. A picture after a malformed text earns 0 too, because a copy of the last
picture would be right. An illegal move changes nothing, so the picture after it is right if it shows the same board.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unidiff.rewards.reward import Reward, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.tasks.puzzles.frame import Frame, nearest
from unidiff.tasks.puzzles.game import Game, State
from unidiff.tasks.rounds import Rounds


@dataclass(frozen=True)
class Replay:
    """The result of carrying out the rounds' texts from the start; one entry per text.

    well_formed: the text has exactly the form of a move. legal: it is a legal move. progressed: it is legal and reduces
    the distance to the solution. state: after the last text.
    """

    well_formed: tuple[bool, ...]
    legal: tuple[bool, ...]
    progressed: tuple[bool, ...]
    state: State


def replay(game: Game, texts: Sequence[str]) -> Replay:
    """Carries out the rounds' texts in order. A text that is not a legal move changes nothing."""
    state, flags = game.start, []
    for text in texts:
        after = game.moves(state).get(text)
        legal = after is not None
        flags.append((bool(game.form.fullmatch(text)), legal, legal and game.distance(after) < game.distance(state)))
        state = after if legal else state
    well_formed, legal, progressed = zip(*flags) if flags else ((), (), ())
    return Replay(well_formed, legal, progressed, state)


def judge_answer(game: Game, texts: Sequence[str], text: str) -> dict[str, bool]:
    """Judges an answer by the puzzle and by the rounds before it.

    format: the answer is well formed. success: its moves, carried out from the start, solve the puzzle. agreement: it
    lists exactly the moves of the rounds; False if the answer or a round is malformed.
    """
    shorts = game.parse_answer(text)
    if shorts is None:
        return {"success": False, "agreement": False, "format": False}
    rounds = all(game.form.fullmatch(one) for one in texts)
    agreement = rounds and shorts == tuple(map(game.shorten, texts))
    return {"success": game.solved(game.carry_out(shorts)), "agreement": agreement, "format": True}


_rounds = Rounds(replay, judge_answer)


@reward(on="text", weight=0.3)
def legal_move(segments: list[SegmentView], game: list[Game]) -> list[float | None]:
    """1 for a legal move."""
    return _rounds.moves(segments, game, "legal")


@reward(on="text", weight=0.7)
def progress(segments: list[SegmentView], game: list[Game]) -> list[float | None]:
    """1 for a legal move that reduces the exact distance to the solution."""
    return _rounds.moves(segments, game, "progressed")


@reward(on="text", weight=1.0)
def success(segments: list[SegmentView], game: list[Game]) -> list[float | None]:
    """1 for an answer that solves the puzzle."""
    return _rounds.answers(segments, game, "success")


@reward(on="text", weight=0.5)
def agreement(segments: list[SegmentView], game: list[Game]) -> list[float | None]:
    """1 for an answer that lists exactly the moves of the rounds."""
    return _rounds.answers(segments, game, "agreement")


@reward(on="text", weight=0.3)
def answer_format(segments: list[SegmentView], game: list[Game]) -> list[float | None]:
    """1 for a well-formed answer."""
    return _rounds.answers(segments, game, "format")


def cells_right(views: Sequence[SegmentView], games: Sequence[Game], frame: Sequence[Frame]) -> np.ndarray:
    """[N] share of each picture's cells that show the board after the preceding moves; 0 after a malformed text."""
    share = np.zeros(len(views))
    for i, (view, game, place) in enumerate(zip(views, games, frame)):
        texts = view.texts_before
        if texts and game.form.fullmatch(texts[-1]):
            assert view.pixels is not None
            found = nearest(place.cells(view.pixels), game.tiles(place.tile))
            share[i] = (found == game.classes(replay(game, texts).state)).mean()
    return share


@reward(on="image", weight=0.5)
def picture_cells(segments: list[SegmentView], game: list[Game], frame: list[Frame]) -> list[float]:
    """Share of cells that show the board after the preceding moves."""
    return cells_right(segments, game, frame).tolist()


@reward(on="image", weight=1.0)
def picture_exact(segments: list[SegmentView], game: list[Game], frame: list[Frame]) -> list[float]:
    """1 for a picture without a wrong cell."""
    return (cells_right(segments, game, frame) == 1).astype(float).tolist()


REWARDS: tuple[Reward, ...] = (
    legal_move,
    progress,
    success,
    agreement,
    answer_format,
    picture_cells,
    picture_exact,
)


def measure(rows: Sequence[tuple[SegmentView, ...]], examples: Sequence[Any]) -> dict[str, np.ndarray]:
    """Held-out figures of responses; see `Rounds.measure`."""
    games, frames = ([e.columns[name] for e in examples] for name in ("game", "frame"))

    def cells(views: list[SegmentView], owner: np.ndarray) -> np.ndarray:
        return cells_right(views, [games[i] for i in owner], [frames[i] for i in owner])

    return _rounds.measure(rows, games, cells)
