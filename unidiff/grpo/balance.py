"""Relative trajectory balance: a loss without importance ratios, whose optimum is known.

    L = mean_i (log Z + Δ_i − r_i / β)²,   Δ_i = log p_new(o_i) − log p_ref(o_i),   log Z = mean_i (r_i / β − Δ_i)

over the rollouts i of one prompt. It is 0 where p_new ∝ p_ref · exp(r / β), whichever policy made the rollouts. As
log Z is a group's mean (VarGrad), the gradient equals that of −Σ_i a_i log p_new(o_i), up to the factor 2 / β, where
a_i = A_i − β (Δ_i − mean Δ) and A_i is the centred reward. So it is a policy gradient with the advantage a_i.

A rollout's log-probability is the sum of its tokens' values: exact with the estimator `trace`, a bound with `elbo`.

Source: Relative trajectory balance (arXiv 2405.20971), with the group's mean for log Z.
"""

from __future__ import annotations

import torch
from torch import Tensor


def residuals(advantage_B: Tensor, change_B: Tensor, group_B: Tensor, beta: float) -> Tensor:
    """a_i, float [B]. advantage_B: float, centred in each group, not scaled. change_B: float, Δ. group_B: int64."""
    group_B = group_B.unique(return_inverse=True)[1]
    count = torch.bincount(group_B).clamp(min=1)
    mean = change_B.new_zeros(len(count)).index_add(0, group_B, change_B) / count
    return advantage_B - beta * (change_B - mean[group_B])
