"""Normalisation of rewards inside groups: pure functions over tensors in which NaN means "missing".

Missing values are left out of every mean and standard deviation, and get advantage 0. All statistics are
computed in float64 (a group of equal rewards then has std 0, not 1e-9) with one pass of index_add, whatever
the number of groups.

Sources: GRPO arXiv 2402.03300 (group mean and std), Dr. GRPO 2503.20783 (scale "none"), leave-one-out RLOO
2402.14740, normalize_then_sum GDPO 2601.05242.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
SCALES = ("group", "batch", "none")

EPSILON = 1e-4  # added to a standard deviation before dividing by it
ROUNDING = 1e-9  # a std below this share of the values' size is rounding noise: the group is constant


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """Of values_N cut into groups: count_G of present values, mean_G (NaN without one), unbiased std_G (NaN
    with fewer than two, exactly 0 for a constant group), and group_N, the row of each value in them."""

    count_G: Tensor
    mean_G: Tensor
    std_G: Tensor
    group_N: Tensor
    present_N: Tensor

    @cached_property
    def comparable_N(self) -> Tensor:
        """bool [N]: the value is there, and so is another one of its group."""
        return self.present_N & (self.count_G[self.group_N] > 1)


def group_statistics(values_N: Tensor, groups_N: Tensor) -> GroupStatistics:
    """Mean and unbiased std of each group. values_N: float, NaN = missing. groups_N: int64, any ids."""
    ids_G, group_N = torch.unique(groups_N, return_inverse=True)
    present_N = ~values_N.isnan()
    filled_N = values_N.double().nan_to_num(nan=0.0)
    zeros_G = torch.zeros(len(ids_G), dtype=torch.float64, device=values_N.device)
    count_G = zeros_G.index_add(0, group_N, present_N.double())
    mean_G = zeros_G.index_add(0, group_N, filled_N) / count_G  # 0/0: NaN
    squares_N = torch.where(present_N, (filled_N - mean_G[group_N]) ** 2, 0.0)
    size_G = zeros_G.index_add(0, group_N, filled_N**2)
    spread_G = zeros_G.index_add(0, group_N, squares_N)
    spread_G = torch.where(spread_G <= size_G * ROUNDING**2, 0.0, spread_G)
    std_G = (spread_G / (count_G - 1)).sqrt().masked_fill(count_G < 2, math.nan)
    return GroupStatistics(count_G, mean_G, std_G, group_N, present_N)


def normalize_groups(
    values_N: Tensor,
    groups_N: Tensor,
    *,
    scale: Scale = "group",
    leave_one_out: bool = False,
    pools_N: Tensor | None = None,
) -> Tensor:
    """Advantages float64 [N]: (r − mean of the group) / (std + 1e-4).

    scale: "group": std of the group; "batch": std of the value's pool; "none": no division.
    leave_one_out: the mean is that of the other members, which is the same as a factor n/(n − 1).
    pools_N: int64, what "batch" means for each value; one pool of all values unless given.
    Missing values, constant groups and groups with a single value get 0.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}; choose one of {', '.join(SCALES)}")
    group = group_statistics(values_N, groups_N)
    centred_N = values_N.double() - group.mean_G[group.group_N]
    if leave_one_out:
        count_N = group.count_G[group.group_N]
        centred_N = centred_N * count_N / (count_N - 1).clamp(min=1)
    std_N = group.std_G[group.group_N]
    useful_N = group.comparable_N & (std_N > 0)
    if scale == "batch":
        pool = group_statistics(values_N, torch.zeros_like(groups_N) if pools_N is None else pools_N)
        std_N = pool.std_G[pool.group_N]
    divisor_N = torch.ones_like(std_N) if scale == "none" else std_N + EPSILON
    return torch.where(useful_N, centred_N / divisor_N, 0.0)


def weighted_sum(values_BF: Tensor, weights_F: Tensor) -> Tensor:
    """Σ_f w_f r_f over the values that are present, float64 [B]; NaN for a row with none."""
    present_BF = ~values_BF.isnan()
    total_B = (values_BF.double().nan_to_num(nan=0.0) * weights_F.double()).sum(-1)
    return total_B.masked_fill(~present_BF.any(-1), math.nan)


def normalize_then_sum(values_BF: Tensor, weights_F: Tensor, groups_B: Tensor) -> Tensor:
    """GDPO: every reward normalised in its group, their weighted sum whitened over the batch. float64 [B].

    A lone value of its group counts as 0 in the sum. The division is always by the batch's std: `scale` has
    no say.
    """
    count = values_BF.shape[1]
    groups_BF = groups_B[:, None] * count + torch.arange(count, device=groups_B.device)
    normal_BF = normalize_groups(values_BF.flatten(), groups_BF.flatten()).reshape(values_BF.shape)
    total_B = weighted_sum(normal_BF.masked_fill(values_BF.isnan(), math.nan), weights_F)
    return normalize_groups(total_B, torch.zeros_like(groups_B))


def correlation(first_N: Tensor, second_N: Tensor) -> float | None:
    """Pearson correlation of two float [N]; None for fewer than two values or a constant."""
    if len(first_N) < 2:
        return None
    first_N, second_N = (
        first_N.double() - first_N.double().mean(),
        second_N.double() - second_N.double().mean(),
    )
    size = (first_N.norm() * second_N.norm()).item()
    return (first_N @ second_N).item() / size if size > 1e-12 else None
