"""Random masking with a rising ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unidiff.estimators import ladder
from unidiff.estimators.estimator import Ask
from unidiff.estimators.independent import Independent
from unidiff.estimators.registry import register


@register("random")
@dataclass(frozen=True)
class RandomMask(Independent):
    """ℓ_j = log p(o_j | M masked, the rest of o visible) at j ∈ M; each token of o is in M with probability r_i,
    independently. The prompt stays visible.

    start: "ladder" = r_i of `ladder.ratio`, from min_ratio (MaskGRPO's code). "uniform" = UniGRPO's: each step draws
    one start, uniform in (0, 1), and r_i follows `ladder.from_start`; min_ratio has no effect.

    Source: UniGRPO (MMaDA, arXiv 2505.15809). Two later papers use the same name for other methods: 2603.23500 (text
    and flow-matching pictures with one advantage) and 2603.09538.
    """

    min_ratio: float = 0.6
    start: Literal["ladder", "uniform"] = "ladder"

    def mask_ratio(self, ask: Ask) -> float:
        if self.start == "ladder":
            return super().mask_ratio(ask)
        return ladder.from_start(ask.step_uniform(), ask.iteration, ask.iterations)

    def probability(self, rank: Tensor, length: Tensor, ratio: float) -> Tensor:
        return torch.full_like(rank, ratio, dtype=torch.float64)
