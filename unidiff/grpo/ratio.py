"""Checks that the importance ratio of an unchanged policy is 1.

A row's log-probabilities must not depend on the other rows of its pass, nor on their padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unidiff.estimators import draw_views, make
from unidiff.grpo.batches import MicroBatch, cut
from unidiff.grpo.experience import Experience
from unidiff.guidance import Guidance

Values = Callable[[MicroBatch], Tensor]  # a policy's values [R, L] of a micro-batch's tokens
_ALONE = 4  # at most this many rows are scored alone
_REPLAYED = 2  # at most this many rows are replayed


def company_gap(values: Values, experience: Experience, batches: Sequence[MicroBatch]) -> float:
    """Largest |ρ − 1| between rows scored one by one, without padding, and the same rows in their micro-batch.

    batches: of the first inner iteration. The micro-batch with the most padding is used. If it has one row only, that
    row is paired with the longest other row.
    """
    length_B = experience.canvas.clean.valid.sum(1)

    def padding(batch: MicroBatch) -> tuple[int, int]:
        own = length_B[batch.rows]
        return int((own.max() - own).sum()), len(own)

    batch = max(batches, key=padding)
    if len(batch.rows) == 1:
        longest = length_B.index_fill(0, batch.rows, -1).argmax()
        batch = experience.micro_batch(0, torch.stack([batch.rows[0], longest]), batch.passes)
    among = values(batch)
    some = torch.linspace(0, len(among) - 1, min(_ALONE, len(among)), device=batch.rows.device).long()
    alone = torch.cat([values(batch.take(one[None])) for one in some])
    return _gap(alone, among[some])


def guidance_gap(
    values: Values, experience: Experience, guidance: Guidance | None, group: int, size: int, attention: str
) -> float:
    """Largest |ρ − 1| between scores with and without guidance, over the first rollout of each prompt (so it does not
    depend on micro-batches or processes). group: rollouts per prompt. size, attention: see `batches.cut`."""
    guided = dataclasses.replace(experience, guidance=guidance)
    rows = torch.arange(0, experience.canvas.shape[0], group, device=experience.canvas.ids.device)
    parts = cut(experience.canvas, experience.draws[0], rows, size, attention)
    plain, compared = (torch.cat([values(e.micro_batch(0, *part)) for part in parts]) for e in (experience, guided))
    return _gap(plain, compared)


def rollout_drift(log_probs: Values, experience: Experience, size: int, attention: str) -> Tensor:
    """float64 [3]: sum, count and maximum of |log p scored − log p sampled|, in nats, over the tokens of a few rollouts
    that are replayed step by step (`trace`). Zeros if a rollout has no step map.

    With exact caches the difference is rounding, plus one effect: tokens committed after the position of a later end
    token were visible in sampling, but are not replayed. A larger difference comes from approximate caches, or from
    rollouts and updates in different precision. log_probs: of a micro-batch, [K, R, L]. size, attention: see
    `batches.cut`.
    """
    canvas = experience.canvas
    rows = torch.arange(min(_REPLAYED, canvas.shape[0]), device=canvas.ids.device)
    if bool((canvas.step < 0)[canvas.sampled].any()) or not bool(canvas.sampled[rows].any()):
        return torch.zeros(3, dtype=torch.float64, device=canvas.ids.device)
    trace = make("trace")
    (draw,) = draw_views(canvas, trace, trace, 1, torch.zeros(canvas.shape[0], dtype=torch.int64, device=rows.device))
    gaps = []
    for part in cut(canvas, draw, rows, size, attention):
        batch = experience.micro_batch(0, *part, draw=draw)
        gap_RL = log_probs(batch).sum(0) - experience.drawn_BL[batch.rows]  # each token is scored in one view
        gaps.append(gap_RL[batch.canvas.sampled].abs().double())
    gap = torch.cat(gaps)
    return torch.stack([gap.sum(), gap.new_tensor(float(len(gap))), gap.max()])


def _gap(new: Tensor, old: Tensor) -> float:
    return float((new - old).exp().sub(1).abs().max())
