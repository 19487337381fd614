"""FrozenLake without pictures in the response: all moves and the answer in one text.

    from b2 go right to b3 from b3 go down to c3 answer right down

The judges of the interleaved task run on the sentences, as if each were its own segment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unidiff.rewards.reward import Reward
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.sequence import Modality
from unidiff.tasks.frozen_lake import rewards as interleaved
from unidiff.tasks.frozen_lake.board import Board

_SENTENCE = re.compile(r"\s+(?=(?:from|answer)\b)")


def question(board: Board) -> str:
    """The prompt for a text-only model such as LLaDA: the board in letters and the format of an answer."""
    lines = [f"{chr(ord('a') + i)} {' '.join(row)}" for i, row in enumerate(board.rows)]
    return (
        "find a safe way to the goal . the board , with S the start , F ice , H a hole and G the goal :\n"
        + "\n".join([" ".join([" ", *(str(i + 1) for i in range(len(board.rows)))]), *lines])
        + "\nsay every move , then all directions , in this form : "
        "from a1 go right to a2 from a2 go down to b2 answer right down"
    )


def sentences(row: Sequence[SegmentView]) -> tuple[SegmentView, ...]:
    """The row with each text cut before every "from" and "answer". Only a text's last sentence may be cut off."""
    parts = []
    for view in row:
        if view.modality is Modality.IMAGE:
            parts.append(view)
            continue
        texts = _SENTENCE.split(view.text or "")
        parts += [replace(view, text=text, ended=view.ended or i + 1 < len(texts)) for i, text in enumerate(texts)]
    first = row[0]
    return link_row(parts, prompt=first.prompt, task=first.task, columns=first.columns)


def _over_sentences(judge: Reward) -> Reward:
    """A reward of a whole solution: the mean of `judge` over its sentences, 0 if none applies."""

    def judged(segments: list[SegmentView], board: list[Board]) -> list[float]:
        return [_mean(judge.function(list(sentences([v])), [b] * len(sentences([v])))) for v, b in zip(segments, board)]

    return replace(judge, function=judged, name=f"{judge.name}_in_text")


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else 0.0


REWARDS: tuple[Reward, ...] = tuple(_over_sentences(judge) for judge in interleaved.REWARDS if judge.on == "text")


def measure(rows: Sequence[tuple[SegmentView, ...]], boards: Sequence[Board]) -> dict[str, np.ndarray]:
    """Held-out figures as in the interleaved task; figures of pictures are NaN."""
    return interleaved.measure([sentences(row) for row in rows], boards)
