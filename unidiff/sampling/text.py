"""Commit rules of the text sampler: which masked tokens of a block a denoising step fixes.

Dimensions: B rows, N tokens of a block, V words, E end tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unidiff.sampling.config import SamplerConfig


@dataclass
class Block:
    """The tokens of a block in one step. All but `log_probs` are [B, N].

    masked: bool, masked before the step. free: bool, those that may be committed (`eligible`). drawn: int64, indices
    into V. sure: float32, their probabilities. log_probs: [B, N, V]. uniform: float64, only for random order.
    """

    masked: Tensor
    free: Tensor
    drawn: Tensor
    sure: Tensor
    log_probs: Tensor
    uniform: Tensor


def planned_steps(size: int, whole: int, config: SamplerConfig) -> tuple[int, int]:
    """Planned and maximum steps of a block of `size` tokens in a canvas of `whole`. The maximum is larger if text_gap
    may delay tokens."""
    if config.text_order == "dilated":
        planned = dilated_steps(size)
    elif config.text_entropy_bound is None and config.text_threshold is None:
        planned = math.ceil(config.text_steps * size / whole)
    else:
        planned = size
    return planned, size + planned if config.text_gap > 1 else planned


def chosen(block: Block, step: int | Tensor, planned: int, config: SamplerConfig) -> Tensor:
    """[B, N] bool: the tokens that a step of a block commits. Except in dilated order, every row with free tokens
    commits at least one. step: from 0, or int64 [B, 1] of each row. planned: see `planned_steps`."""
    score = block.sure
    if config.text_order == "dilated":
        commit = commit_dilated(block.free, step)
    elif config.text_entropy_bound is not None:
        score = confidence("entropy", block.log_probs, block.drawn, block.uniform)
        commit = commit_entropy(-score, block.free, config.text_entropy_bound)
    elif config.text_threshold is not None:
        commit = commit_threshold(score, block.free, config.text_threshold)
    else:
        score = confidence(config.text_order, block.log_probs, block.drawn, block.uniform)
        commit = commit_top(score, block.free, commit_count(block.masked, step, planned))
    return apart(commit, score, block.masked, config)


def apart(commit: Tensor, score: Tensor, masked: Tensor, config: SamplerConfig) -> Tensor:
    """[B, N] bool: the tokens to commit that respect `text_gap`."""
    if config.text_gap == 1:
        return commit
    left, size = masked.sum(1), masked.shape[1]
    return spaced(commit, score, (left * config.text_gap // size).clamp(min=2))


def eligible(ids_BN: Tensor, masked_BN: Tensor, text_end_E: Tensor) -> Tensor:
    """[B, N] bool: masked positions that are not after the first end token.

    ids_BN: int64, committed tokens, and where masked the tokens drawn in this step. masked_BN: bool. text_end_E: int64
    ids. An end token counts whether it is committed or only drawn in this step.
    """
    return masked_BN & ~_behind(torch.isin(ids_BN, text_end_E))


def finished(ids_BN: Tensor, masked_BN: Tensor, text_end_E: Tensor) -> Tensor:
    """[B] bool: no token is masked before the first committed end token, or no token is masked at all.

    ids_BN: int64, any value where masked. masked_BN: bool. text_end_E: int64 ids.
    """
    return ~eligible(ids_BN.masked_fill(masked_BN, -1), masked_BN, text_end_E).any(1)


def _behind(end_BN: Tensor) -> Tensor:
    return (end_BN.long().cumsum(1) - end_BN.long()) > 0


def confidence(kind: str, log_probs_BNV: Tensor, drawn_BN: Tensor, uniform_BN: Tensor) -> Tensor:
    """The model's confidence at each position, [B, N] float32; larger = committed earlier.

    kind:
    - "confidence": probability of the drawn token (LLaDA, arXiv 2502.09992)
    - "margin": probability of the likeliest token minus that of the second (arXiv 2502.06768)
    - "entropy": Σ p log p, the negative entropy (Dream, arXiv 2508.15487)
    - "random": the uniform number

    log_probs_BNV: float32. drawn_BN: int64, indices into V. uniform_BN: float64. Raises ValueError on an
    unknown kind.
    """
    if kind == "confidence":
        return log_probs_BNV.gather(2, drawn_BN[..., None])[..., 0].exp()
    if kind == "margin":
        best = log_probs_BNV.topk(2, dim=2).values.exp()
        return best[..., 0] - best[..., 1]
    if kind == "entropy":
        return -torch.special.entr(log_probs_BNV.exp()).sum(2)
    if kind == "random":
        return uniform_BN.float()
    raise ValueError(f"confidence {kind!r} is not known; known: confidence, margin, entropy, random")


def commit_count(masked_BN: Tensor, step: int | Tensor, steps: int) -> Tensor:
    """How many tokens each row commits in a step, [B] int64: ceil(masked now / steps left).

    masked_BN: bool, masked before this step. step: 0-based, or int64 [B, 1]. This equals the published plan: with k
    tokens masked before step 0, each step commits k//T, and each of the first k mod T steps one more. From step T on,
    all.
    """
    left = (steps - torch.as_tensor(step, device=masked_BN.device)).clamp(min=1)
    return (masked_BN.sum(1, keepdim=True) + left - 1).floor_divide(left)[:, 0]


def commit_top(score_BN: Tensor, eligible_BN: Tensor, count_B: Tensor) -> Tensor:
    """[B, N] bool: the count_B eligible tokens with the highest scores.

    Ties go to the left. If fewer are eligible, all of them. score_BN: float. eligible_BN: bool. count_B: int64.
    """
    return eligible_BN & (_rank(score_BN, eligible_BN) < count_B[:, None])


def _rank(score_BN: Tensor, eligible_BN: Tensor) -> Tensor:
    """[B, N] int64 rank by falling score; eligible tokens come first, equal ones from left to right."""
    lowest = torch.finfo(score_BN.dtype).min
    score_BN = score_BN.clamp(min=lowest).masked_fill(~eligible_BN, -torch.inf)
    order = score_BN.sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def commit_threshold(probability_BN: Tensor, eligible_BN: Tensor, threshold: float) -> Tensor:
    """[B, N] bool: eligible tokens of at least this probability, and always the likeliest one.

    Source: Fast-dLLM (arXiv 2505.22618), confidence-aware parallel decoding.
    """
    first = _rank(probability_BN, eligible_BN) == 0
    return eligible_BN & ((probability_BN >= threshold) | first)


def commit_entropy(entropy_BN: Tensor, eligible_BN: Tensor, bound: float | Tensor) -> Tensor:
    """[B, N] bool: the largest set of lowest-entropy eligible tokens whose sum of entropies, without the largest, is at
    most the bound; at least one token. The sum bounds the error of drawing the tokens independently.

    entropy_BN: float32, nats. bound: a number, or [B, 1]. Source: EB-Sampler (arXiv 2505.24857), with the entropy as
    the measure of error.
    """
    rank = _rank(-entropy_BN, eligible_BN)
    ordered = torch.zeros_like(entropy_BN).scatter_(1, rank, entropy_BN.masked_fill(~eligible_BN, 0.0))
    before = torch.zeros_like(ordered)  # the largest of a prefix is its last
    before[:, 1:] = ordered.cumsum(1)[:, :-1]
    return eligible_BN & (rank < (before <= bound).sum(1, keepdim=True))


def dilated_steps(size: int) -> int:
    """Steps of `commit_dilated` for a block of this size: ceil(log2(size)), at least 1."""
    return max((size - 1).bit_length(), 1)


def commit_dilated(eligible_BN: Tensor, step: int | Tensor) -> Tensor:
    """[B, N] bool: every s-th token of a block of N, with s = N/2, N/4, … 1 in successive steps, so that tokens drawn
    together are far apart. N is rounded up to a power of 2.

    Source: Dilated Unmasking (arXiv 2506.19037).
    """
    size = eligible_BN.shape[1]
    stride = 2 ** (dilated_steps(size) - 1 - torch.as_tensor(step, device=eligible_BN.device)).clamp(min=0)
    return eligible_BN & (torch.arange(size, device=eligible_BN.device) % stride == 0)


def spaced(commit_BN: Tensor, score_BN: Tensor, gap_B: Tensor) -> Tensor:
    """[B, N] bool: a subset of the tokens to commit, at least gap_B positions apart, chosen greedily by score.

    gap_B: int64, at least 2. The best token of a row is always kept.
    """
    place = torch.arange(commit_BN.shape[1], device=commit_BN.device)
    rank = _rank(score_BN, commit_BN)
    kept, left = torch.zeros_like(commit_BN), commit_BN
    for _ in range((len(place) + 1) // 2):
        best = rank.masked_fill(~left, len(place)).argmin(1, keepdim=True)
        kept = kept | (left & (place == best))
        left = left & ((place - best).abs() >= gap_B[:, None])
    return kept


def commit_factor(probability_BN: Tensor, eligible_BN: Tensor, factor: float) -> Tensor:
    """[B, N] bool: the n likeliest eligible tokens, for the largest n ≥ 1 with c_n ≥ 1 − f/(n+1).

    c_n: the n-th highest probability. factor: f. Source: Fast-dLLM (arXiv 2505.22618): under this condition the
    likeliest token at each position is also the joint mode.
    """
    rank = _rank(probability_BN, eligible_BN)
    enough = eligible_BN & (probability_BN >= 1 - factor / (rank + 2))  # the token of rank n-1 is the n-th
    count_B = torch.where(enough, rank + 1, 1).amax(1)
    return eligible_BN & (rank < count_B[:, None])
