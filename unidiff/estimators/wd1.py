"""wd1: weighted likelihood without a ratio."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unidiff.estimators.elbo import mean_of_masked
from unidiff.estimators.estimator import Ask
from unidiff.estimators.one_step import OneStep
from unidiff.estimators.registry import register
from unidiff.estimators.view import View


@register("wd1")
@dataclass(frozen=True)
class Wd1(OneStep):
    """Loss of a group: −Σ_i softmax_i(A) ℓ̄_i + Σ_i softmax_i(−A) ℓ̄_i. ℓ̄_i is a segment's mean log-probability under
    `one_step`'s view, of the current policy only. There is no old policy and no clipping.

    i runs over the k-th segments of a modality in the rollouts of one prompt. With one segment per rollout this is the
    paper's group.

    hide_prompt: see `one_step`. Source: wd1 (arXiv 2507.08838).
    """

    unit: ClassVar[Literal["token", "segment"]] = "segment"
    ratio: ClassVar[bool] = False

    def views(self, ask: Ask) -> list[View]:
        """One view, that of `one_step`."""
        return [replace(view, factor=mean_of_masked(view.mask, ask.place)) for view in super().views(ask)]

    def credit(self, advantage_N: Tensor, group_N: Tensor) -> Tensor:
        """(softmax_i(A) − softmax_i(−A)) · n in a group of n, as the loss averages over rollouts."""
        good_N, count_N = softmax_by_group(advantage_N, group_N)
        bad_N, _ = softmax_by_group(-advantage_N, group_N)
        return (good_N - bad_N) * count_N


def softmax_by_group(value_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of values within their groups, float [N], and the size of each value's group, int64 [N]."""
    power_N = (value_N - top_by_group(value_N, group_N)).exp()
    group_N = group_N.unique(return_inverse=True)[1]
    count = torch.bincount(group_N)
    return power_N / power_N.new_zeros(len(count)).index_add(0, group_N, power_N)[group_N], count[group_N]


def top_by_group(value_N: Tensor, group_N: Tensor) -> Tensor:
    """float [N]: the largest value of each value's group."""
    group_N = group_N.unique(return_inverse=True)[1]
    zeros = value_N.new_zeros(int(group_N.max()) + 1 if len(group_N) else 0)
    return zeros.scatter_reduce(0, group_N, value_N, "amax", include_self=False)[group_N]
