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
    """ℓ_j = ½ [log p(o_j | all masked) + w_j · log p(o_j | M masked if j ∈ M, else its complement masked)]

    with w_j = 1/t in M and 1/(1−t) outside. t ~ U(0.2, 0.8), one per segment and inner iteration. M contains each token
    with probability t. For a given t the expectation of the second term is the sum of two log-probabilities, one with
    M masked and one with its complement masked. So ℓ_j is about 1.5 times a log-probability, and exp of a difference is
    not a ratio of probabilities. Clip range and KL are applied to it unchanged.

    Source: DiffuCoder (arXiv 2506.20639), by its code.
    """

    @property
    def by_token(self) -> bool:
        """False: a value is about 1.5 times a log-probability."""
        return False

    def views(self, ask: Ask) -> list[View]:
        """Three views: all masked, M masked, M̄ masked."""
        t = _LOW + (_HIGH - _LOW) * ask.segment_uniform()
        chosen = ask.among & (ask.uniform() < t)
        rest = ask.among & ~chosen
        return [
            View(ask.among, factor=ask.among * 0.5),
            View(chosen, factor=torch.where(chosen, 0.5 / t, 0.0).float()),
            View(rest, factor=torch.where(rest, 0.5 / (1 - t), 0.0).float()),
        ]
