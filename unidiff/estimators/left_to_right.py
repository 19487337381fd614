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
    """ℓ_j = log p(o_j | o_0 … o_{j−1} visible, all others masked). So Σ_j ℓ_j is the exact log-probability of a segment
    that is sampled token by token in this order (`text_block=1`). Other methods are measured against it.

    The number of views is the number of sampled tokens of the longest segment; images go in raster order. Source:
    JustGRPO (arXiv 2601.15165).
    """

    joint: ClassVar[bool] = True

    def views(self, ask: Ask) -> list[View]:
        """One view per token, in order."""
        count = int((ask.length * ask.among).max().clamp(min=1))
        return [View(ask.among & (ask.rank >= k), factor=ask.among & (ask.rank == k)) for k in range(count)]
