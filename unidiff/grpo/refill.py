"""Replaces prompts whose rollouts all earned the same reward: their advantages are 0, so they give no gradient.

Source: dynamic sampling of DAPO (arXiv 2503.14476), here with a bound. Mask-GRPO (arXiv 2510.13418) filters likewise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unidiff.rewards.reward import Cause
from unidiff.rewards.router import RewardRouter
from unidiff.rewards.table import RewardTable
from unidiff.sampling.rollout import Rollout

_ROUNDING = 1e-6  # advantages below this count as 0


@dataclass(frozen=True)
class Judged:
    """Rollouts in groups of one size, with the views that rewards see, their examples, and the reward table."""

    rollouts: list[Rollout]
    rows: list[Any]
    examples: list[Any]
    table: RewardTable


def without_spread(router: RewardRouter, table: RewardTable, size: int) -> list[int]:
    """Indices of the groups (of `size` rows each) in which every advantage is 0, up to rounding. A group that lost a
    value to a fault is not among them, so that the fault stays visible."""
    routed = router.route(table, torch.arange(len(table.values_BSF)) // size)
    some_B = (routed.advantage_BS.abs() > _ROUNDING).any(1)
    lost = {row // size for (_, row, _), missing in table.missing.items() if missing.cause is not Cause.NONE}
    flat = (~some_B.unflatten(0, (-1, size)).any(1)).nonzero()[:, 0].tolist()
    return [group for group in flat if group not in lost]


def replaced(old: Judged, groups: Sequence[int], new: Judged, size: int) -> Judged:
    """`old`, with the k-th of `groups` replaced by the k-th group of `new`."""
    at = {group: k for k, group in enumerate(groups)}
    rollouts, rows, examples, tables = [], [], [], []
    for group in range(len(old.rollouts) // size):
        source, k = (new, at[group]) if group in at else (old, group)
        part = slice(k * size, (k + 1) * size)
        rollouts += source.rollouts[part]
        rows += source.rows[part]
        examples += source.examples[part]
        tables.append(dataclasses.replace(source.table.rows(part), logged={}))
    logged = {name: list(values) for name, values in old.table.logged.items()}
    for name, values in new.table.logged.items():
        logged.setdefault(name, []).extend(values)
    return Judged(rollouts, rows, examples, dataclasses.replace(RewardTable.concatenate(tables), logged=logged))
