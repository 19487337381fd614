"""Commit rules of the image samplers: which masked tokens of an image a denoising step fixes.

Dimensions: B rows, N tokens of an image. Rows may have different numbers of steps; a row's last step, and any step
after it, commits all remaining tokens.
"""

from __future__ import annotations

from torch import LongTensor, Tensor

from unidiff.sampling.schedules import ANNEALING, Annealing, Schedule
from unidiff.sampling.text import commit_top


def edit_steps(edited_B: Tensor, total: int, steps: int) -> LongTensor:
    """Steps to denoise |M| of an image's n tokens: max(1, ceil(T·|M|/n)).

    edited_B: [B] int64, |M|. total: n. steps: T, for a whole image. Returns [B] int64.
    """
    return ((edited_B * steps + total - 1) // total).clamp(min=1)  # type: ignore[return-value]


def maskgit_commit(
    masked_BN: Tensor,
    log_prob_BN: Tensor,
    step: int,
    steps_B: Tensor,
    total_B: Tensor,
    schedule: Schedule,
    temperature: float,
    gumbel_BN: Tensor,
    annealing: Annealing = ANNEALING["linear"],
) -> Tensor:
    """MaskGIT: keeps floor(N·κ(s)) tokens masked, those with the lowest log p + τ·a·gumbel; a is the annealing.

    masked_BN: bool, masked before this step. log_prob_BN: float32, of the tokens drawn in this step. step: 0-based.
    steps_B: int64. total_B: int64, N: tokens masked before step 0. temperature: τ. gumbel_BN: float32 standard Gumbel
    numbers. Before a row's last step at least 1 token stays masked. Still, every step commits at least 1, so a single
    masked token is committed. Returns [B, N] bool, the tokens to commit. Source: arXiv 2202.04200, §3.2, which anneals
    linearly.
    """
    s_B = ((step + 1) / steps_B.double()).clamp(max=1.0)
    left_B = masked_BN.sum(1)
    # 1e-9: a product that is an exact integer, such as 64·cos(π/3), must not be floored to the integer below.
    keep_B = (total_B * schedule(s_B) + 1e-9).floor().long().clamp(min=1).minimum(left_B - 1)
    keep_B = keep_B.masked_fill(step >= steps_B - 1, 0)
    score_BN = log_prob_BN + temperature * annealing(step, steps_B).float()[:, None] * gumbel_BN
    return commit_top(score_BN, masked_BN, left_B - keep_B)


def emerge_commit(masked_BN: Tensor, step: int, steps_B: Tensor, schedule: Schedule, uniform_BN: Tensor) -> Tensor:
    """Emerge: each masked token appears independently with probability (κ(t) − κ(s))/κ(t).

    masked_BN: bool, masked before this step. step: 0-based. steps_B: int64. uniform_BN: float64 in (0, 1). Returns the
    tokens to commit, [B, N] bool. This is exact ancestral sampling of the absorbing process: a token appears in step i
    with probability κ(i/T) − κ((i+1)/T), independently of the others. Source: MaskGRPO (arXiv 2510.02880),
    Algorithm 4.
    """
    last_B = step >= steps_B - 1
    appears_B = 1 - stay_probability(step, steps_B, schedule)
    return masked_BN & ((uniform_BN < appears_B[:, None]) | last_B[:, None])


def stay_probability(step: int, steps_B: Tensor, schedule: Schedule) -> Tensor:
    """κ(s)/κ(t) [B] float64: the probability that a masked token stays masked in a step; 0 in the last."""
    from_B = (steps_B - 1).clamp(max=step).double()
    return schedule((from_B + 1) / steps_B) / schedule(from_B / steps_B)
