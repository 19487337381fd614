"""Coupled-GRPO's estimator: a mask and its complement, so that every token is scored twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.registry import register
from unidiff.estimators.view import View

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

    @property
    def by_token(self) -> bool:
        """No: a value is about 1.5 times a log-probability."""
        return False

    def views(self, ask: Ask) -> list[View]:
        """Three: all masked, M masked, M̄ masked."""
        t = _LOW + (_HIGH - _LOW) * ask.segment_uniform()
        chosen = ask.among & (ask.uniform() < t)
        rest = ask.among & ~chosen
        return [
            View(ask.among, factor=ask.among * 0.5),
            View(chosen, factor=torch.where(chosen, 0.5 / t, 0.0).float()),
            View(rest, factor=torch.where(rest, 0.5 / (1 - t), 0.0).float()),
        ]
