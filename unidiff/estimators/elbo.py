"""ESPO's estimator: the evidence lower bound of a whole segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.registry import register
from unidiff.estimators.view import Place, View


@register("elbo")
@dataclass(frozen=True)
class Elbo(Estimator):
    """A segment's value is ELBO / L, with ELBO = 1/K Σ_k 1/t_k Σ_{j ∈ M_k} log p(o_j | M_k masked). So all of its
    tokens share the ratio exp((ELBO_new − ELBO_old) / L).

    M_k is a random set of t_k·L tokens, t_k uniform on 1/L, 2/L, … 1. Its expectation is the same bound as with
    t ~ U(0, 1) and independent masking, but the variance is lower, and no set is empty.

    samples: K views. antithetic: views come in pairs that mask the first c and the last L+1−c tokens of one random
    order, so a pair scores every token, and high and low mask ratios balance. False: independent sets. The mask ratios
    are stratified: (0, 1] is cut into one equal part per set (or pair), and each part gets one ratio.

    quadrature: the mask ratios are the K nodes of Gauss and Legendre on (0, 1), rounded to whole tokens, and the views
    have their weights instead of 1/K: only the sets are random (GDPO's semi-deterministic Monte Carlo, arXiv
    2510.08554, which uses 3 nodes). This is not unbiased: it is exact where the value of a mask ratio is a polynomial
    of degree below 2K.

    Sources: ESPO (arXiv 2512.03759), whose KL is k2 on the bounds where ours is k3 on the values; LLaDA
    (arXiv 2502.09992), equation 14, for sets of a fixed size.
    """

    samples: int = 2
    antithetic: bool = True
    quadrature: bool = False

    unit: ClassVar[Literal["token", "segment"]] = "segment"
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; at least 1 view is needed")
        if self.quadrature and self.antithetic:
            raise ValueError("quadrature gives each view a mask ratio of its own: set antithetic=no")
        if self.antithetic and self.samples % 2:
            raise ValueError(f"samples is {self.samples}; antithetic views come in pairs, so it must be even")

    def views(self, ask: Ask) -> list[View]:
        """`samples` views."""
        if self.quadrature:
            return self._at_nodes(ask)
        level = ask.segment_uniform()
        draws = self.samples // 2 if self.antithetic else self.samples
        masks = []
        for k in range(draws):
            order = ask.place.order(ask.uniform(k), ask.among)
            count = ((k + level) / draws * ask.length).long() + 1
            masks.append(ask.among & (order < count))
            if self.antithetic:
                masks.append(ask.among & (order >= count - 1))
        return [View(mask, factor=mean_of_masked(mask, ask.place) / self.samples) for mask in masks]

    def _at_nodes(self, ask: Ask) -> list[View]:
        nodes, weights = np.polynomial.legendre.leggauss(self.samples)
        views = []
        for k, (node, weight) in enumerate(zip(nodes.tolist(), weights.tolist())):
            count = ((node + 1) / 2 * ask.length).round().long().clamp(min=1)
            mask = ask.among & (ask.place.order(ask.uniform(k), ask.among) < count)
            views.append(View(mask, factor=mean_of_masked(mask, ask.place) * weight / 2))
        return views


def mean_of_masked(mask: Tensor, place: Place) -> Tensor:
    """float32 [B, L]: 1/n at masked tokens, where the segment has n. A mask of t·L tokens gives 1/(t·L)."""
    masked = mask.float()
    return masked / place.total(masked).clamp(min=1)
