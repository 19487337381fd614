"""Normalisation of rewards inside groups: pure functions over tensors in which NaN means "missing".

Missing values are left out of every mean and standard deviation, and get advantage 0. All statistics are computed in
float64, so that a group of equal rewards has std 0 and not 1e-9. One pass of index_add serves any number of groups.

Sources: GRPO arXiv 2402.03300 (group mean and std), Dr. GRPO 2503.20783 (scale "none"), leave-one-out RLOO
2402.14740, normalize_then_sum GDPO 2601.05242, ranks Pref-GRPO 2508.20751.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
SCALES = ("group", "batch", "none")

EPSILON = 1e-4  # added to a standard deviation before dividing by it
ROUNDING = 1e-9  # a std below this share of the values' norm is rounding noise, so the group is constant


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """Statistics of values_N in groups: count_G of present values, mean_G (NaN if there is none), unbiased std_G (NaN
    below two values, exactly 0 for a constant group), and group_N, each value's index into them."""

    count_G: Tensor
    mean_G: Tensor
    std_G: Tensor
    group_N: Tensor
    present_N: Tensor

    @cached_property
    def comparable_N(self) -> Tensor:
        """bool [N]: the value is present, and so is another value of its group."""
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


@dataclass(frozen=True, eq=False)
class Comparison:
    """Values compared with others of their group, all [N], float64 except comparable_N.

    advantage_N: 0 where there is nothing to compare. comparable_N: as in `GroupStatistics`. mean_N, std_N, count_N: of
    the value's group. divisor_N: the divisor of its difference from the mean.
    """

    advantage_N: Tensor
    comparable_N: Tensor
    mean_N: Tensor
    std_N: Tensor
    count_N: Tensor
    divisor_N: Tensor


def compare_groups(
    values_N: Tensor,
    groups_N: Tensor,
    *,
    scale: Scale = "group",
    leave_one_out: bool = False,
    pools_N: Tensor | None = None,
) -> Comparison:
    """Advantages (r − mean of the group) / (std + 1e-4), with the statistics they are computed from.

    scale: "group": std of the group; "batch": std of the value's pool; "none": no division.
    leave_one_out: the baseline is the mean of the other members, which equals a factor n/(n − 1).
    pools_N: int64, the pool of each value for "batch"; None = one pool of all values.
    Missing values, constant groups and groups with a single value get advantage 0.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}; choose one of {', '.join(SCALES)}")
    group = group_statistics(values_N, groups_N)
    mean_N, std_N, count_N = (part[group.group_N] for part in (group.mean_G, group.std_G, group.count_G))
    centred_N = values_N.double() - mean_N
    if leave_one_out:
        centred_N = centred_N * count_N / (count_N - 1).clamp(min=1)
    useful_N = group.comparable_N & (std_N > 0)
    divisor_N = std_N + EPSILON
    if scale == "batch":
        pool = group_statistics(values_N, torch.zeros_like(groups_N) if pools_N is None else pools_N)
        divisor_N = pool.std_G[pool.group_N] + EPSILON
    elif scale == "none":
        divisor_N = torch.ones_like(std_N)
    advantage_N = torch.where(useful_N, centred_N / divisor_N, 0.0)
    return Comparison(advantage_N, group.comparable_N, mean_N, std_N, count_N, divisor_N)


def normalize_groups(values_N: Tensor, groups_N: Tensor, **options: Any) -> Tensor:
    """Only the advantages of `compare_groups`, float64 [N]."""
    return compare_groups(values_N, groups_N, **options).advantage_N


def weighted_sum(values_BF: Tensor, weights_F: Tensor) -> Tensor:
    """Σ_f w_f r_f over the values that are present, float64 [B]; NaN for a row with none."""
    present_BF = ~values_BF.isnan()
    total_B = (values_BF.double().nan_to_num(nan=0.0) * weights_F.double()).sum(-1)
    return total_B.masked_fill(~present_BF.any(-1), math.nan)


def rank_groups(values_N: Tensor, groups_N: Tensor) -> Tensor:
    """The share of its group's other values that a value beats, minus the share that beat it: float64 [N] in [-1, 1],
    mean 0 in each group. A single value gets 0; NaN stays NaN.

    This is 2 · (win rate) − 1 of Pref-GRPO, where ties count half, with a scalar reward instead of a preference model.
    """
    _, group_N = torch.unique(groups_N, return_inverse=True)
    values_N = values_N.double()
    present_N = ~values_N.isnan()
    group_N, size = torch.where(present_N, group_N, -1), len(values_N)
    rank_N = torch.full_like(values_N, math.nan)
    order_N = torch.arange(size, device=values_N.device)
    for group in group_N[present_N].unique():  # groups are small: G² comparisons each
        at = order_N[group_N == group]
        own = values_N[at]
        better = (own[:, None] > own).double() - (own[:, None] < own).double()
        rank_N[at] = better.sum(1) / max(len(at) - 1, 1)
    return rank_N


def rescale(values_N: Tensor, groups_N: Tensor, scale: str | None, pools_N: Tensor | None = None) -> Tensor:
    """One reward's values on its own scale, float64 [N]; NaN stays NaN.

    scale: None: as they are. "group", "batch", "none": as in `compare_groups`. "rank": as `rank_groups`.
    """
    if scale is None:
        return values_N.double()
    if scale == "rank":
        return rank_groups(values_N, groups_N)
    return normalize_groups(values_N, groups_N, scale=scale, pools_N=pools_N).masked_fill(values_N.isnan(), math.nan)


def correlation(first_N: Tensor, second_N: Tensor) -> float | None:
    """Pearson correlation of two float [N]; None for fewer than two values, or if one is constant."""
    if len(first_N) < 2:
        return None
    first_N, second_N = (
        first_N.double() - first_N.double().mean(),
        second_N.double() - second_N.double().mean(),
    )
    size = (first_N.norm() * second_N.norm()).item()
    return (first_N @ second_N).item() / size if size > 1e-12 else None
