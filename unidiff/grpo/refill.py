"""Prompts whose rollouts all earned the same are replaced by further ones: their advantages are 0 and teach nothing.

Source: dynamic sampling of DAPO (arXiv 2503.14476), here bounded. Mask-GRPO (arXiv 2510.13418) filters groups alike.
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

_ROUNDING = 1e-6  # of advantages that are 0


@dataclass(frozen=True)
class Judged:
    """Rollouts in groups of one size, what rewards see of them, their examples, and what they earned."""

    rollouts: list[Rollout]
    rows: list[Any]
    examples: list[Any]
    table: RewardTable


def without_spread(router: RewardRouter, table: RewardTable, size: int) -> list[int]:
    """The groups, of `size` rows each, in which every advantage is 0, up to rounding. A group that has lost a value to
    a fault is not one of them: what was lost has to be seen."""
    routed = router.route(table, torch.arange(len(table.values_BSF)) // size)
    some_B = (routed.advantage_BS.abs() > _ROUNDING).any(1)
    lost = {row // size for (_, row, _), missing in table.missing.items() if missing.cause is not Cause.NONE}
    flat = (~some_B.unflatten(0, (-1, size)).any(1)).nonzero()[:, 0].tolist()
    return [group for group in flat if group not in lost]


def replaced(old: Judged, groups: Sequence[int], new: Judged, size: int) -> Judged:
    """The groups of `new` in the place of these of `old`, in order."""
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
