"""RL-D²'s estimator: weighted likelihood of whole segments, without a ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unidiff.estimators.elbo import Elbo
from unidiff.estimators.registry import register
from unidiff.estimators.wd1 import softmax_by_group, top_by_group


@register("weighted_elbo")
@dataclass(frozen=True)
class WeightedElbo(Elbo):
    """Loss of a group: −Σ_i softmax_i(A / λ) ELBO_i, of the current policy only. It fits the policy, by forward KL, to
    a target proportional to old policy · exp(A / λ). Nothing is clipped. Bad rollouts are not pushed down; they only
    have small weights.

    The loss averages over a rollout's tokens, so ELBO_i is per token; with `loss_type` dr_grpo it is the sum, up to a
    constant. i runs over the k-th segments of a modality in the rollouts of one prompt.

    samples, antithetic: see `elbo`. temperature: λ. Source: RL-D² (arXiv 2509.22963).
    """

    temperature: float = 1.0

    ratio: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")

    def credit(self, advantage_N: Tensor, group_N: Tensor) -> Tensor:
        """softmax_i(A / λ) · n in a group of n, as the loss averages over rollouts; 0 if all of the group have the same
        advantage, because it then prefers none."""
        weight_N, count_N = softmax_by_group(advantage_N / self.temperature, group_N)
        best_N, worst_N = (top_by_group(sign * advantage_N, group_N) * sign for sign in (1, -1))
        return weight_N * count_N * (best_N > worst_N)
