"""Cuts a step into micro-batches and forward passes.

Views of one rollout share a forward pass, because a block-causal model then runs the clean tokens once for all of them.
To bound memory, a pass has at most the tokens of micro_batch_size rollouts with one view each. With more views, a pass
holds fewer rollouts. Only if a single rollout exceeds the limit are its views split over several passes.
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
    """R rollouts of a step, with all that one inner iteration needs.

    iteration: its number. rows: int64 [R], indices into the experience. canvas, draw, guidance: of these rows
    (guidance None = plain scores). advantage_RL, weight_RL: float32 [R, L], per token. passes: for each forward pass,
    its slice of the draw's views. old_RL, reference_RL: values of the old and the reference policy, None until they
    are computed; with old_RL None the loss uses the new policy's values, detached. drawn_RL: log-probabilities of the
    tokens when they were committed, for `importance_cap`. warmth_RL: a schedule's factors on the temperatures.
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
        """Selects rows; old and reference values are dropped."""
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
    """Cuts rows int64 [R] of a canvas into micro-batches. Each is its rows, and a slice of views for each pass. Rows of
    similar length go together, to save padding.

    size: the limit of a pass, in rollouts with one view each. attention: the model's `ModelSpec.attention`.
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
    """Tokens that a forward pass runs for each row: [B] shared by all views, and [K, B] for each view."""
    clean, noisy = canvas.clean, canvas.noisy
    touched_KBS = touched_segments(canvas, torch.stack([view.scored for view in views]))
    segments = torch.arange(touched_KBS.shape[2], device=clean.segment.device)
    copied_BNS = (noisy.segment[:, :, None] == segments) & noisy.valid[:, :, None]
    if attention == "block_causal":
        return before_last_sampled(canvas).valid.sum(1), (touched_KBS * copied_BNS.sum(1)).sum(2)
    # One row per segment: the tokens before it, its own, and the rest of a text's canvas.
    before_BS = ((clean.segment[:, :, None] <= segments) & clean.valid[:, :, None]).sum(1)
    beyond_BS = (copied_BNS & (canvas.source < 0)[:, :, None]).sum(1)
    return torch.zeros_like(before_BS[:, 0]), (touched_KBS * (before_BS + beyond_BS)).sum(2)


def _passes(canvas: Canvas, views: list[View], limit: int, attention: str) -> list[slice]:
    shared_B, own_KB = view_tokens(canvas, views, attention)
    shared, own = int(shared_B.max()), own_KB.amax(1).tolist()
    if len(shared_B) > 1:
        return [slice(0, len(own))]  # `cut` puts rows together only if all views fit
    cuts, tokens = [0], shared
    for k, more in enumerate(own):
        if k > cuts[-1] and tokens + more > limit:
            cuts.append(k)
            tokens = shared
        tokens += more
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(own)])]
