"""Coupled-GRPO's estimator: a mask and its complement, so that every token is scored twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.estimators import Estimator, Place, View, register, segment_uniform, token_uniform
from unidiff.sequence import Canvas, Modality

_LOW, _HIGH = 0.2, 0.8  # range of t, as published


@register("coupled")
@dataclass(frozen=True)
class Coupled(Estimator):
    """ℓ_j = ½ [log p(o_j | all masked) + w_j · log p(o_j | M masked, or its complement: that of the two which holds j)]

    with w_j = 1/t in M and 1/(1−t) outside; t ~ U(0.2, 0.8), one a segment and inner iteration; M: each token with
    probability t. For a given t the mean of the second term is the sum of two log-probabilities, of a token in M and
    of one outside. So ℓ_j is about 1.5 times a log-probability, its ratio is none of probabilities, and clip range
    and KL act on it as they are.

    Source: DiffuCoder (arXiv 2506.20639), by its code.
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
        """Three: all masked, M masked, M̄ masked."""
        among = canvas.sampled & (canvas.modality == modality)
        t = _LOW + (_HIGH - _LOW) * segment_uniform(canvas, keys_B, iteration, modality)
        chosen = among & (token_uniform(canvas, keys_B, iteration, modality) < t)
        rest = among & ~chosen
        return [
            View(among, factor=among * 0.5),
            View(chosen, factor=torch.where(chosen, 0.5 / t, 0.0).float()),
            View(rest, factor=torch.where(rest, 0.5 / (1 - t), 0.0).float()),
        ]
