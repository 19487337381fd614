"""Rewards fewer denoising steps, by a factor on a rollout's rewards.

The factor is 1 − strength · u, with u = 0 if each segment took one step, and 1 if each token took its own step. It
multiplies only rewards above 0, so a wrong rollout earns nothing for speed. Subtracting strength · u instead is hacked
(arXiv 2512.09106): if all rollouts of a prompt are wrong, they differ only in speed, and the policy learns only to be
fast. The factor has the same problem with a reward that nearly every rollout earns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.rewards.table import RewardTable
from unidiff.sampling.rollout import Rollout


def slowness(rollouts: Sequence[Rollout]) -> Tensor:
    """float32 [B]: u of each rollout, from 0 to 1."""
    found = []
    for rollout in rollouts:
        own = [s.step[s.step >= 0] for s in rollout.segments if s.step is not None and bool((s.step >= 0).any())]
        steps, tokens = sum(len(step.unique()) for step in own), sum(map(len, own))
        found.append((steps - len(own)) / max(tokens - len(own), 1))
    return torch.tensor(found)


def with_speed(table: RewardTable, rollouts: Sequence[Rollout], strength: float, adds: bool = False) -> RewardTable:
    """The rewards of B rollouts, adjusted by speed. adds: subtract instead, the form that is hacked, for comparison.
    Missing values stay missing."""
    slow_B = strength * slowness(rollouts).to(table.values_BSF.device)

    def changed(values: Tensor, slow: Tensor) -> Tensor:
        return values - slow if adds else torch.where(values > 0, values * (1 - slow), values)

    values_BSF = changed(table.values_BSF, slow_B[:, None, None])
    return dataclasses.replace(table, values_BSF=values_BSF, sequence_BF=changed(table.sequence_BF, slow_B[:, None]))
