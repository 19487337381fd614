"""Token by token from left to right: exact, and the most expensive."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unidiff.estimators import Estimator, Place, View, register
from unidiff.sequence import Canvas, Modality


@register("left_to_right")
@dataclass(frozen=True)
class LeftToRight(Estimator):
    """ℓ_j = log p(o_j | o_0 … o_{j−1} visible, all others masked), so Σ_j ℓ_j is the exact log-probability of a segment
    that is written token by token in this order (`text_block=1`); the yardstick of all other methods.

    As many views as the longest segment has sampled tokens; images in raster order. Source: JustGRPO
    (arXiv 2601.15165).
    """

    def views(
        self,
        canvas: Canvas,
        place: Place,
        modality: Modality,
        iteration: int,
        iterations: int,
        keys_B: Tensor,
    ) -> list[View]:
        """One for each token, in order."""
        among = canvas.sampled & (canvas.modality == modality)
        count = int((place.length * among).max().clamp(min=1))
        return [View(among & (place.rank >= k), factor=among & (place.rank == k)) for k in range(count)]
