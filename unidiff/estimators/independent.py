"""Base of methods that mask each sampled token independently, with a closed-form probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.estimators import ladder
from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.view import View


@dataclass(frozen=True)
class Independent(Estimator):
    """min_ratio: γ of the ladder of mask ratios (see `ladder.ratio`). Raises ValueError if it is outside [0, 1]."""

    min_ratio: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio is {self.min_ratio}; a mask ratio is in [0, 1]")

    def probability(self, rank: Tensor, length: Tensor, ratio: float) -> Tensor:
        """float64, shaped as rank: probability that the rank-th of `length` sampled tokens is masked."""
        raise NotImplementedError

    def mask_ratio(self, ask: Ask) -> float:
        """r_i, the share of tokens to mask in this inner iteration."""
        return ladder.ratio(self.min_ratio, ask.iteration, ask.iterations)

    def views(self, ask: Ask) -> list[View]:
        probability = self.probability(ask.rank, ask.length, self.mask_ratio(ask))
        return [View(threshold(ask.uniform(), probability, ask.among, ask.place.run))]


def threshold(uniform: Tensor, probability: Tensor, among: Tensor, run: Tensor) -> Tensor:
    """Masks tokens whose uniform number is below their probability, at least one per segment.

    uniform, probability: [B, L] float64. among: [B, L] bool, the tokens to choose from. run: [B, L] int64, groups the
    columns by segment (see `Place`). The token with the largest probability − uniform is always masked, because a
    segment without a scored token would drop out of the loss. Returns [B, L] bool.
    """
    margin = torch.where(among, probability - uniform, -torch.inf)
    nearest = torch.full_like(margin, -torch.inf).scatter_reduce_(1, run, margin, "amax")
    return among & ((margin > 0) | (margin == nearest.gather(1, run)))
