"""Random masking with a rising ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.estimators.independent import Independent
from unidiff.estimators.registry import register


@register("random")
@dataclass(frozen=True)
class RandomMask(Independent):
    """ℓ_j = log p(o_j | M masked, the rest of o visible) at j ∈ M; each token of o is in M with probability r_i,
    independently; the prompt stands. r_i: see `ladder.ratio`.

    Source: UniGRPO (MMaDA, arXiv 2505.15809), with the ladder of `ladder.ratio` in place of its ratios.
    """

    min_ratio: float = 0.6

    def probability(self, rank: Tensor, length: Tensor, ratio: float) -> Tensor:
        return torch.full_like(rank, ratio, dtype=torch.float64)
