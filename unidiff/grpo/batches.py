"""Which rollouts, and which views of them, share a forward pass.

Several views of a rollout cost little in one pass of a block-causal model: its clean tokens run once for all of them.
So that memory does not grow with the number of views, a pass has at most the tokens of micro_batch_size rollouts with
one view each: rollouts with many views come fewer at a time, and only where a single rollout is too wide do its views
go apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.attention import before_last_sampled, touched_segments
from unidiff.canvas import Canvas
from unidiff.estimators import Draw, View
from unidiff.guidance import Guidance


@dataclass(frozen=True)
class MicroBatch:
    """Some rollouts of a step, R of them, with what one inner iteration needs of them.

    iteration: which one. rows: int64 [R], their places in the experience. canvas, draw, guidance: of these rows
    (guidance None = scores are not guided). advantage_RL, weight_RL: float32 [R, L], of each token. passes: the views
    of the draw that each forward pass holds. old_RL, reference_RL: values of the old and of the reference policy, once
    they are known; old None = those of the new policy. drawn_RL: log-probabilities of the tokens when they were
    committed, for `importance_cap`. warmth_RL: what a schedule multiplied their temperatures with.
    """

    iteration: int
    rows: Tensor
    canvas: Canvas
    draw: Draw
    advantage_RL: Tensor
    weight_RL: Tensor
    guidance: Guidance | None
    passes: list[slice]
    old_RL: Tensor | None = None
    reference_RL: Tensor | None = None
    drawn_RL: Tensor | None = None
    warmth_RL: Tensor | None = None

    def take(self, index: Tensor) -> MicroBatch:
        """Some of its rows, before old and reference values are known."""
        return MicroBatch(
            iteration=self.iteration,
            rows=self.rows[index],
            canvas=self.canvas.rows(index),
            draw=self.draw.rows(index),
            advantage_RL=self.advantage_RL[index],
            weight_RL=self.weight_RL[index],
            guidance=None if self.guidance is None else self.guidance.rows(index),
            passes=self.passes,
            warmth_RL=None if self.warmth_RL is None else self.warmth_RL[index],
        )


def cut(canvas: Canvas, draw: Draw, rows: Tensor, size: int, attention: str) -> list[tuple[Tensor, list[slice]]]:
    """Cuts rows int64 [R] of a canvas into micro-batches: their rows, and the views of each of their passes. Rows of
    like length go together, so that little is padded.

    size: rollouts with one view each in a pass. attention: of the model (`ModelSpec.attention`).
    """
    shared_B, own_KB = view_tokens(canvas, draw.views, attention)
    once_B = shared_B + view_tokens(canvas, [View(draw.mask)], attention)[1][0]
    limit = size * int(once_B[rows].max())
    width_B = shared_B + own_KB.sum(0)
    order = rows[width_B[rows].argsort(stable=True)]
    batches, start = [], 0
    for end, width in enumerate(width_B[order].tolist()):
        if end > start and (end - start == size or (end - start + 1) * width > limit):
            batches.append(order[start:end])
            start = end
    batches.append(order[start:])
    return [(own, _passes(canvas.rows(own), draw.rows(own).views, limit, attention)) for own in batches]


def view_tokens(canvas: Canvas, views: Sequence[View], attention: str) -> tuple[Tensor, Tensor]:
    """Tokens that a forward pass runs of each row: [B] for all views together, and [K, B] of each view's own."""
    clean, noisy = canvas.clean, canvas.noisy
    touched_KBS = touched_segments(canvas, torch.stack([view.scored for view in views]))
    segments = torch.arange(touched_KBS.shape[2], device=clean.segment.device)
    copied_BNS = (noisy.segment[:, :, None] == segments) & noisy.valid[:, :, None]
    if attention == "block_causal":
        return before_last_sampled(canvas).valid.sum(1), (touched_KBS * copied_BNS.sum(1)).sum(2)
    # A row for each segment: the tokens before it, its own, and what a text's canvas has beyond it.
    before_BS = ((clean.segment[:, :, None] <= segments) & clean.valid[:, :, None]).sum(1)
    beyond_BS = (copied_BNS & (canvas.source < 0)[:, :, None]).sum(1)
    return torch.zeros_like(before_BS[:, 0]), (touched_KBS * (before_BS + beyond_BS)).sum(2)


def _passes(canvas: Canvas, views: list[View], limit: int, attention: str) -> list[slice]:
    shared_B, own_KB = view_tokens(canvas, views, attention)
    shared, own = int(shared_B.max()), own_KB.amax(1).tolist()
    if len(shared_B) > 1:
        return [slice(0, len(own))]  # there are several rows only where all of their views have room
    cuts, tokens = [0], shared
    for k, more in enumerate(own):
        if k > cuts[-1] and tokens + more > limit:
            cuts.append(k)
            tokens = shared
        tokens += more
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(own)])]
