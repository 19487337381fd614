"""Rewards that ask for few denoising steps, as a factor of what a rollout earns.

The factor is 1 − strength · u, with u = 0 where each segment took one step and 1 where each of its tokens took one. It
multiplies rewards above 0, so that what earns nothing earns nothing by being fast. Subtracting strength · u instead is
the form that is hacked (arXiv 2512.09106): rollouts of a prompt that are all wrong then differ in their speed alone,
and what is learnt from them is to be fast. A reward that nearly every rollout earns does the same with the factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.rewards.table import RewardTable
from unidiff.sampling.rollout import Rollout


def slowness(rollouts: Sequence[Rollout]) -> Tensor:
    """float32 [B]: u, from 0 to 1."""
    found = []
    for rollout in rollouts:
        own = [s.step[s.step >= 0] for s in rollout.segments if s.step is not None and bool((s.step >= 0).any())]
        steps, tokens = sum(len(step.unique()) for step in own), sum(map(len, own))
        found.append((steps - len(own)) / max(tokens - len(own), 1))
    return torch.tensor(found)


def with_speed(table: RewardTable, rollouts: Sequence[Rollout], strength: float, adds: bool = False) -> RewardTable:
    """The rewards of B rollouts with their speed in them. adds: the form that is hacked, to compare. Missing values
    stay missing."""
    slow_B = strength * slowness(rollouts).to(table.values_BSF.device)

    def changed(values: Tensor, slow: Tensor) -> Tensor:
        return values - slow if adds else torch.where(values > 0, values * (1 - slow), values)

    values_BSF = changed(table.values_BSF, slow_B[:, None, None])
    return dataclasses.replace(table, values_BSF=values_BSF, sequence_BF=changed(table.sequence_BF, slow_B[:, None]))
