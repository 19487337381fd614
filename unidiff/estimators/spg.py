"""SPG: raises a lower bound of the likelihood where A ≥ 0, lowers an upper bound where A < 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unidiff.estimators.elbo import mean_of_masked
from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.registry import register
from unidiff.estimators.view import Place, View


@register("spg")
@dataclass(frozen=True)
class Spg(Estimator):
    """Loss −A · value, without a ratio; a segment's value is, per token,

        A ≥ 0:  ELBO / L   = 1/K Σ_k mean_{j ∈ M_k} ℓ_kj
        A < 0:  mix · EUBO / L + (1 − mix) · ELBO / L
        EUBO = (1/b) Σ_j log [ 1/K Σ_k (L / |M_k|) · 1(j ∈ M_k) · exp(ℓ_kj)^b ]

    EUBO's sum runs over tokens that some view scores, and is divided by their number instead of L.

    Block masks: a view draws a block, in proportion to its length, and masks and scores a random set M_k of its tokens.
    Earlier blocks are visible; later blocks are masked but not scored. So ELBO is that of block-by-block generation.
    The K views' blocks are stratified over the segment.

    samples: K. block: tokens per block. power: b. mix: the weight of EUBO. Source: SPG (arXiv 2510.09541), without its
    random masking of the prompt.
    """

    samples: int = 2
    block: int = 32
    power: float = 1.5
    mix: float = 0.5

    unit: ClassVar[Literal["token", "segment"]] = "segment"
    ratio: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.power < 1:
            raise ValueError(f"power is {self.power}; it must be at least 1, or it gives no upper bound")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix is {self.mix}; a weight is in [0, 1]")

    def views(self, ask: Ask) -> list[View]:
        """`samples` views."""
        views = []
        for k in range(self.samples):
            where = (k + ask.segment_uniform()) / self.samples
            chosen = (where * ask.length).long() // self.block
            inside = ask.among & (ask.rank // self.block == chosen)
            order = ask.place.order(ask.uniform(k), inside)
            size = ask.place.total(inside.long())
            count = (ask.segment_uniform(k) * size).long() + 1
            scored = inside & (order < count)
            views.append(View(scored | (ask.among & (ask.rank // self.block > chosen)), factor=scored))
        return views

    def combine(self, logp_KBL: Tensor, factor_KBL: Tensor, place: Place, advantage_BL: Tensor) -> Tensor:
        """See `Estimator.combine`."""
        lower, upper = bounds(logp_KBL, factor_KBL != 0, place, self.power)
        return torch.where(advantage_BL < 0, self.mix * upper + (1 - self.mix) * lower, lower)


def bounds(logp_KBL: Tensor, scored_KBL: Tensor, place: Place, power: float) -> tuple[Tensor, Tensor]:
    """A segment's ELBO and EUBO per token, both float32 [B, L], equal at all columns of a segment."""
    drawn_KBL = torch.stack([place.total(scored.float()) for scored in scored_KBL])  # |M_k|
    views_BL = (drawn_KBL > 0).sum(0).clamp(min=1)
    mean_KBL = torch.stack([mean_of_masked(scored, place) for scored in scored_KBL])
    lower = place.total((logp_KBL * mean_KBL).sum(0) / views_BL)

    # In log space: exp(ℓ)^b of an unlikely token is 0 in float32, and log 0 has no gradient.
    weight_KBL = (place.length / drawn_KBL.clamp(min=1) / views_BL).log()
    term_KBL = torch.where(scored_KBL, power * logp_KBL + weight_KBL, -torch.inf)
    covered_BL = scored_KBL.any(0)
    term_KBL = torch.where(covered_BL, term_KBL, 0.0)  # logsumexp of only -inf has a NaN gradient
    value_BL = torch.where(covered_BL, term_KBL.logsumexp(0) / power, 0.0)
    upper = place.total(value_BL) / place.total(covered_BL.float()).clamp(min=1)
    return lower, upper
