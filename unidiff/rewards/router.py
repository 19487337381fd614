"""From a table of rewards to an advantage for every sampled segment.

Definitions (r_{i,s,f}: value of reward f at segment s of rollout i, w_f its weight, norm_g: see
`normalize_groups`):

    joint               R_i = Σ_f w_f mean_s r_{i,s,f};  A_i = norm_g(R_i) for every segment
    normalize_then_sum  A_i = norm_batch(Σ_f w_f norm_g(mean_s r_{i,s,f})) for every segment
    factorized          R_i^m as in joint, over the rewards of modality m only; A_i^m = norm_g(R_i^m) for its
                        segments
    segment             as factorized, but every segment against the group's k-th segments of its modality

`normalize_then_sum` is GDPO's (arXiv 2601.05242). `factorized` is our reconstruction from the abstract of
arXiv 2606.14792. Sequence rewards go to the modalities that their `credit` names; "last" is text, and under
`segment` only the row's last text segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.rewards.normalize import (
    SCALES,
    Scale,
    correlation,
    group_statistics,
    normalize_groups,
    normalize_then_sum,
    weighted_sum,
)
from unidiff.rewards.reward import Cause
from unidiff.rewards.table import RewardTable
from unidiff.sequence import Modality

ASSIGNMENTS = ("joint", "normalize_then_sum", "factorized", "segment")
Assignment = Callable[[RewardTable, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Routed:
    """Advantages of B rollouts with S sampled segments at most.

    advantage_BS: float32, 0 wherever `valid_BS` is False.
    valid_BS:     bool: the segment exists, was scored, and has a scored sibling in its group to be compared
                  with. A constant group is valid with advantage 0; a group that lost its values is not.
    metrics:      `reward/<name>` (mean, unweighted), `lost/<name>` (share lost to faults),
                  `not_applicable/<name>` (share of None), and of the factorized totals, whatever the
                  assignment: `group_std/<modality>`, `zero_std/<modality>` (share of the scored groups),
                  `advantage_correlation` between the modalities. A number that does not exist in this batch
                  is absent.
    """

    advantage_BS: Tensor
    valid_BS: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class RewardRouter:
    """Routes rewards to segments.

    assignment: one of `ASSIGNMENTS`, or a function `(table, groups_B) -> advantage_BS` (NaN = left out); it
        gets the groups numbered from 0.
    scale: what a group's centred rewards are divided by: "group" or "batch" std, or "none".
    leave_one_out: the baseline of a rollout is the mean of the other members of its group.
    """

    assignment: str | Assignment = "factorized"
    scale: Scale = "group"
    leave_one_out: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.assignment, str) and self.assignment not in ASSIGNMENTS:
            raise ValueError(
                f"assignment={self.assignment!r}; choose one of {', '.join(ASSIGNMENTS)}, "
                "or give a function (table, groups_B) -> [B, S]"
            )
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale!r}; choose one of {', '.join(SCALES)}")

    def route(self, table: RewardTable, groups_B: Tensor) -> Routed:
        """Advantages of every sampled segment. groups_B: int64, which group (prompt) each row belongs to.

        Errors: ValueError for a group of one row, for groups_B of another length, or a custom assignment's
        bad result.
        """
        groups_B = _checked_groups(table, groups_B)
        if callable(self.assignment):
            advantage_BS, valid_BS = self._custom(table, groups_B)
        else:
            advantage_BS, valid_BS = getattr(self, f"_{self.assignment}")(table, groups_B)
        valid_BS = valid_BS & (table.modality_BS >= 0)
        advantage_BS = torch.where(valid_BS, advantage_BS, 0.0).float()
        return Routed(advantage_BS, valid_BS, _reward_metrics(table) | self._group_metrics(table, groups_B))

    def _normalize(self, values_N: Tensor, groups_N: Tensor, pools_N: Tensor | None = None):
        """Advantages and which of them mean something, both [N]."""
        advantage_N = normalize_groups(
            values_N, groups_N, scale=self.scale, leave_one_out=self.leave_one_out, pools_N=pools_N
        )
        return advantage_N, group_statistics(values_N, groups_N).comparable_N

    def _joint(self, table: RewardTable, groups_B: Tensor) -> tuple[Tensor, Tensor]:
        total_B = weighted_sum(table.row_means_BF, torch.tensor(table.weights))
        return _to_segments(table, *self._normalize(total_B, groups_B))

    def _normalize_then_sum(self, table: RewardTable, groups_B: Tensor) -> tuple[Tensor, Tensor]:
        means_BF = table.row_means_BF
        comparable = [group_statistics(column_B, groups_B).comparable_N for column_B in means_BF.unbind(1)]
        valid_B = torch.stack(comparable).any(0) if comparable else torch.zeros(len(groups_B), dtype=torch.bool)
        return _to_segments(table, normalize_then_sum(means_BF, torch.tensor(table.weights), groups_B), valid_B)

    def _factorized(self, table: RewardTable, groups_B: Tensor) -> tuple[Tensor, Tensor]:
        advantage_BS = torch.zeros(table.modality_BS.shape, dtype=torch.float64)
        valid_BS = torch.zeros_like(table.modality_BS, dtype=torch.bool)
        for modality in Modality:
            total_B = modality_totals(table, modality)
            own_BS = table.modality_BS == modality
            normal_BS, scored_BS = _to_segments(table, *self._normalize(total_B, groups_B))
            advantage_BS = torch.where(own_BS, normal_BS, advantage_BS)
            valid_BS = valid_BS | (own_BS & scored_BS)
        return advantage_BS, valid_BS

    def _segment(self, table: RewardTable, groups_B: Tensor) -> tuple[Tensor, Tensor]:
        advantage_BS = torch.zeros(table.modality_BS.shape, dtype=torch.float64)
        valid_BS = torch.zeros_like(table.modality_BS, dtype=torch.bool)
        segments = table.modality_BS.shape[1]
        for modality in Modality:
            own_BS = table.modality_BS == modality
            round_BS = own_BS.long().cumsum(1) - 1
            # Segments of the other modality get a round of their own, so that they share no pool with these.
            round_BS = torch.where(own_BS, round_BS, segments)
            key_BS = groups_B[:, None] * (segments + 1) + round_BS
            normal, scored = self._normalize(
                segment_totals(table, modality).flatten(), key_BS.flatten(), round_BS.flatten()
            )
            advantage_BS = torch.where(own_BS, normal.reshape(own_BS.shape), advantage_BS)
            valid_BS = valid_BS | (own_BS & scored.reshape(own_BS.shape))
        return advantage_BS, valid_BS

    def _custom(self, table: RewardTable, groups_B: Tensor) -> tuple[Tensor, Tensor]:
        assert callable(self.assignment)
        name = getattr(self.assignment, "__name__", "assignment")
        given = torch.as_tensor(self.assignment(table, groups_B))
        if given.shape != table.modality_BS.shape or given.is_complex():
            raise ValueError(
                f"assignment {name!r} returned {given.dtype} {list(given.shape)}; expected a float for "
                f"every row and sampled segment: {list(table.modality_BS.shape)}"
            )
        if given.isinf().any():
            raise ValueError(f"assignment {name!r} returned an infinite advantage; use NaN for 'left out'")
        return given.double().nan_to_num(nan=0.0), ~given.isnan()

    def _group_metrics(self, table: RewardTable, groups_B: Tensor) -> dict[str, float]:
        metrics: dict[str, float] = {}
        advantages, comparables = [], []
        for modality in Modality:
            total_B = modality_totals(table, modality)
            std_G = group_statistics(total_B, groups_B).std_G
            std_G = std_G[~std_G.isnan()]
            if len(std_G):
                metrics[f"group_std/{modality.name.lower()}"] = std_G.mean().item()
                metrics[f"zero_std/{modality.name.lower()}"] = (std_G == 0).double().mean().item()
            advantage_B, comparable_B = self._normalize(total_B, groups_B)
            advantages.append(advantage_B)
            comparables.append(comparable_B)
        both_B = comparables[0] & comparables[1]
        found = correlation(advantages[0][both_B], advantages[1][both_B])
        return metrics if found is None else metrics | {"advantage_correlation": found}


def modality_totals(table: RewardTable, modality: Modality) -> Tensor:
    """R_i^m, float64 [B]: the weighted sum of the row's rewards that are credited to a modality; NaN without
    one."""
    chosen = [f for f, credit in enumerate(table.credit) if _credits(credit, modality)]
    return weighted_sum(table.row_means_BF[:, chosen], torch.tensor([table.weights[f] for f in chosen]))


def segment_totals(table: RewardTable, modality: Modality) -> Tensor:
    """float64 [B, S]: each segment's own weighted rewards plus the sequence rewards credited to it; NaN
    without one."""
    own_BS = table.modality_BS == modality
    last_BS = own_BS & (own_BS.long().flip(1).cumsum(1).flip(1) == 1)
    values_BSF = table.values_BSF.double().masked_fill(~own_BS[..., None], math.nan)
    for f, credit in enumerate(table.credit):
        if table.on[f] == "sequence" and _credits(credit, modality):
            place_BS = last_BS if modality == Modality.TEXT and "last" in credit else own_BS
            values_BSF[..., f] = torch.where(place_BS, table.sequence_BF[:, f, None].double(), math.nan)
    return weighted_sum(values_BSF, torch.tensor(table.weights))


def _credits(credit: tuple[str, ...], modality: Modality) -> bool:
    """Whether a reward with this credit goes to a modality."""
    return modality.name.lower() in credit or (modality == Modality.TEXT and "last" in credit)


def _to_segments(table: RewardTable, values_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """One value a row, repeated for its segments."""
    shape = table.modality_BS.shape
    return values_B[:, None].expand(shape), valid_B[:, None].expand(shape)


def _checked_groups(table: RewardTable, groups_B: Tensor) -> Tensor:
    """The groups numbered from 0, so that any int64 (a hash, a data set's index) may name a group."""
    groups_B = torch.as_tensor(groups_B, dtype=torch.int64)
    rows = len(table.modality_BS)
    if groups_B.shape != (rows,):
        raise ValueError(f"groups_B has shape {list(groups_B.shape)}; the table has {rows} rows")
    ids, numbered_B, counts = groups_B.unique(return_inverse=True, return_counts=True)
    if (counts == 1).any():
        alone = ids[counts == 1][0].item()
        raise ValueError(
            f"group {alone} has a single rollout: a group needs two or more to be compared (num_generations)"
        )
    return numbered_B


def _reward_metrics(table: RewardTable) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for f, (name, asked) in enumerate(zip(table.names, table.asked_F.tolist())):
        if not asked:
            continue
        present = table.present(f)
        if len(present):
            metrics[f"reward/{name}"] = present.double().mean().item()
        none = table.lost.get((name, Cause.NONE), 0)
        metrics[f"lost/{name}"] = (asked - len(present) - none) / asked
        metrics[f"not_applicable/{name}"] = none / asked
    return metrics
