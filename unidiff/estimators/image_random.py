"""MaskGRPO's estimator for images."""

from __future__ import annotations

from dataclasses import dataclass

from unidiff.estimators.random_mask import RandomMask
from unidiff.estimators.registry import register


@register("image_random")
@dataclass(frozen=True)
class ImageRandom(RandomMask):
    """ℓ_j = log p(o_j | M masked, the rest of o visible) at j ∈ M, over the codebook; each token is in M with
    probability r_i, as in `random`. r_i is high, because an image token is easy to predict from visible neighbours.

    Source: MaskGRPO (arXiv 2510.02880), Algorithm 2; γ = 0.8.
    """

    min_ratio: float = 0.8
