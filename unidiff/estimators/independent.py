"""Methods that mask each sampled token independently of the others, with a probability in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.estimators import ladder
from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.view import View


@dataclass(frozen=True)
class Independent(Estimator):
    """Base of such methods. min_ratio: γ of the ladder of mask ratios, in [0, 1]; ValueError if it is not."""

    min_ratio: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio is {self.min_ratio}; a mask ratio is in [0, 1]")

    def probability(self, rank: Tensor, length: Tensor, ratio: float) -> Tensor:
        """float64, shaped as rank: probability that the rank-th of `length` sampled tokens is masked."""
        raise NotImplementedError

    def mask_ratio(self, ask: Ask) -> float:
        """r_i, the share of the tokens that is masked in this inner iteration."""
        return ladder.ratio(self.min_ratio, ask.iteration, ask.iterations)

    def views(self, ask: Ask) -> list[View]:
        probability = self.probability(ask.rank, ask.length, self.mask_ratio(ask))
        return [View(threshold(ask.uniform(), probability, ask.among, ask.place.run))]


def threshold(uniform: Tensor, probability: Tensor, among: Tensor, run: Tensor) -> Tensor:
    """Masks a token where its uniform number is below its probability; never none of a segment.

    uniform, probability: [B, L] float64. among: [B, L] bool, the tokens to choose from. run: [B, L] int64,
    groups the columns by segment (see `Place`). Where chance would mask nothing in a segment, the token
    nearest to being masked (largest probability − uniform) is masked: a segment that is scored nowhere would
    drop out of the loss. Returns [B, L] bool.
    """
    margin = torch.where(among, probability - uniform, -torch.inf)
    nearest = torch.full_like(margin, -torch.inf).scatter_reduce_(1, run, margin, "amax")
    return among & ((margin > 0) | (margin == nearest.gather(1, run)))
