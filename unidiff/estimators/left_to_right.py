"""Token by token from left to right: exact, and the most expensive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.registry import register
from unidiff.estimators.view import View


@register("left_to_right")
@dataclass(frozen=True)
class LeftToRight(Estimator):
    """ℓ_j = log p(o_j | o_0 … o_{j−1} visible, all others masked), so Σ_j ℓ_j is the exact log-probability of a segment
    that is written token by token in this order (`text_block=1`); the yardstick of all other methods.

    As many views as the longest segment has sampled tokens; images in raster order. Source: JustGRPO
    (arXiv 2601.15165).
    """

    joint: ClassVar[bool] = True

    def views(self, ask: Ask) -> list[View]:
        """One for each token, in order."""
        count = int((ask.length * ask.among).max().clamp(min=1))
        return [View(ask.among & (ask.rank >= k), factor=ask.among & (ask.rank == k)) for k in range(count)]
