"""Random masking with a rising ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.estimators import register
from unidiff.estimators.independent import Independent


@register("random")
@dataclass(frozen=True)
class RandomMask(Independent):
    """Each sampled token is masked with probability r_i; the prompt stands.

    Source: UniGRPO (MMaDA, arXiv 2505.15809), with the ladder of `ladder.ratio` in place of its ratios.
    """

    min_ratio: float = 0.6

    def probability(self, rank: Tensor, length: Tensor, ratio: float) -> Tensor:
        return torch.full_like(rank, ratio, dtype=torch.float64)
