"""MaskGRPO's estimator for text: later tokens are masked more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.estimators.independent import Independent
from unidiff.estimators.registry import register


@register("fading_out")
@dataclass(frozen=True)
class FadingOut(Independent):
    """ℓ_j = log p(o_j | M masked, the rest of o visible) at j ∈ M; token j = 0 … L−1 is in M with probability
    1 − min(1, 2(1−r_i)(1 − j/(L−1))), independently, and always if L = 1. r_i: see `ladder.ratio`.

    Text is generated roughly from left to right, so typical states show its beginning.

    For r ≥ 0.5 the mean share of masked tokens is r. Below 0.5 the first tokens' `keep` is capped at 1, and they are
    never trained; hence γ ≥ 0.6. Source: MaskGRPO (arXiv 2510.02880), Algorithm 1, by its code (masked if
    uniform > keep).
    """

    min_ratio: float = 0.6

    def probability(self, rank: Tensor, length: Tensor, ratio: float) -> Tensor:
        return 1 - keep(rank, length, ratio)


def keep(rank: Tensor, length: Tensor, ratio: float) -> Tensor:
    """Probability that token j = rank of L = length stays visible: min(1, 2(1−r)(1 − j/(L−1))); 0 if L = 1.

    rank, length: int64 of one shape. Returns float64. The last token is always masked.
    """
    along = torch.where(length > 1, rank.double() / (length - 1).clamp(min=1), 1.0)
    return (2 * (1 - ratio) * (1 - along)).clamp(max=1.0)
