"""Computes an advantage for every sampled segment from a table of rewards.

Definitions. r_{i,s,f}: value of reward f at segment s of rollout i. w_f: its weight. norm_g: see `compare_groups`.
scale_f: the reward's own scale, see `rescale`; by default values are unchanged.

    joint               R_i = Σ_f w_f scale_f(mean_s r_{i,s,f});  A_i = norm_g(R_i) for every segment
    normalize_then_sum  A_i = norm_batch(Σ_f w_f norm_g(mean_s r_{i,s,f})) for every segment; a reward's own scale
                        replaces its norm_g
    factorized          R_i^m as in joint, over the rewards of modality m only; A_i^m = norm_g(R_i^m) for its
                        segments
    segment             as factorized, but a row's k-th segment of a modality is compared only with the k-th ones of its
                        group; the same holds for the rewards' own scales

`normalize_then_sum` is GDPO's (arXiv 2601.05242). `factorized` is our reconstruction from the abstract of
arXiv 2606.14792. A sequence reward goes to the modalities in its `credit`; "last" means text, and under `segment` only
the row's last text segment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from unidiff.config import check_fields
from unidiff.rewards.normalize import (
    Comparison,
    Scale,
    compare_groups,
    correlation,
    group_statistics,
    rescale,
    weighted_sum,
)
from unidiff.rewards.reward import Cause
from unidiff.rewards.routed import Account, Routed
from unidiff.rewards.table import RewardTable
from unidiff.sequence import Modality


@dataclass(frozen=True, eq=False)
class Segments:
    """Data for a custom assignment about the S sampled segments of B rollouts, besides their values.

    modality_BS: int64, a `Modality`; -1 = the row has no such segment. round_BS: int64, ordinal among the row's
    segments of this modality, from 0. group_B: int64, the group (prompt) of each row, numbered from 0. names, weights:
    of the F rewards. table: the whole reward table.
    """

    modality_BS: Tensor
    round_BS: Tensor
    group_B: Tensor
    names: tuple[str, ...]
    weights: tuple[float, ...]
    table: RewardTable


Assignment = Callable[[Tensor, Segments], Tensor]


@dataclass(frozen=True, eq=False)
class _Sums:
    """terms_BSF and total_BS as in `Account`, and the comparison of each segment's total, [B, S]."""

    terms_BSF: Tensor
    total_BS: Tensor
    found: Comparison


Compare = Callable[..., Comparison]  # (values_N, groups_N, pools_N=None), with the router's settings


def joint(table: RewardTable, group_B: Tensor, compare: Compare) -> _Sums:
    terms_BF = _scaled_means(table, group_B)
    total_B = weighted_sum(terms_BF, torch.tensor(table.weights))
    return _to_segments(table, terms_BF, total_B, compare(total_B, group_B))


def normalize_then_sum(table: RewardTable, group_B: Tensor, compare: Compare) -> _Sums:
    terms_BF = _scaled_means(table, group_B, default="group")
    total_B = weighted_sum(terms_BF, torch.tensor(table.weights))
    found = compare_groups(total_B, torch.zeros_like(group_B))
    comparable = [group_statistics(column_B, group_B).comparable_N for column_B in table.row_means_BF.unbind(1)]
    valid_B = torch.stack(comparable).any(0) if comparable else torch.zeros_like(found.comparable_N)
    return _to_segments(table, terms_BF, total_B, replace(found, comparable_N=valid_B))


def factorized(table: RewardTable, group_B: Tensor, compare: Compare) -> _Sums:
    parts = [
        _to_segments(table, own_BF, total_B, compare(total_B, group_B))
        for _, own_BF, total_B in _totals_by_modality(table, group_B)
    ]
    return _by_modality(table, parts)


def segment(table: RewardTable, group_B: Tensor, compare: Compare) -> _Sums:
    values_BSF, parts = credited_values(table).double(), []
    segments = table.modality_BS.shape[1]
    for modality in Modality:
        own_BS = table.modality_BS == modality
        # Segments of the other modality get an extra round number, so that they share no pool with these.
        round_BS = torch.where(own_BS, own_BS.long().cumsum(1) - 1, segments)
        key_N = (group_B[:, None] * (segments + 1) + round_BS).flatten()
        own_BSF = values_BSF.masked_fill(~own_BS[..., None], math.nan)
        columns = [
            rescale(values_BS.flatten(), key_N, scale, round_BS.flatten()).reshape(own_BS.shape)
            for values_BS, scale in zip(own_BSF.unbind(2), table.scale)
        ]
        terms_BSF = torch.stack(columns, 2) if columns else own_BSF
        total_BS = weighted_sum(terms_BSF, torch.tensor(table.weights))
        found = compare(total_BS.flatten(), key_N, pools_N=round_BS.flatten())
        shaped = {f.name: getattr(found, f.name).reshape(own_BS.shape) for f in fields(Comparison)}
        parts.append(_Sums(terms_BSF, total_BS, Comparison(**shaped)))
    return _by_modality(table, parts)


ASSIGNMENTS: dict[str, Callable[[RewardTable, Tensor, Compare], _Sums]] = {
    "joint": joint,
    "normalize_then_sum": normalize_then_sum,
    "factorized": factorized,
    "segment": segment,
}


@dataclass(frozen=True)
class RewardRouter:
    """Routes rewards to segments.

    assignment: one of `ASSIGNMENTS`, or a function `(values_BSF, segments) -> advantage_BS` (NaN = not trained).
        values_BSF, float32: see `credited_values`; NaN = missing. segments: `Segments`.
    scale: the divisor of a group's centred rewards: "group" or "batch" std, or "none".
    leave_one_out: the baseline of a rollout is the mean of the other members of its group.
    """

    assignment: str | Assignment = "factorized"
    scale: Scale = "group"
    leave_one_out: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.assignment, str) and self.assignment not in ASSIGNMENTS:
            raise ValueError(
                f"assignment={self.assignment!r}; choose one of {', '.join(ASSIGNMENTS)}, "
                "or give a function (values, segments) -> [B, S]"
            )

    def route(self, table: RewardTable, groups_B: Tensor) -> Routed:
        """Advantages of every sampled segment. The table is not changed.

        groups_B: int64, the group (prompt) of each row. Raises ValueError for a group of one row, for groups_B of
        another length, or for an invalid result of a custom assignment.
        """
        group_B = _checked_groups(table, groups_B)
        compare = partial(compare_groups, scale=self.scale, leave_one_out=self.leave_one_out)
        account = None
        if callable(self.assignment):
            advantage_BS, valid_BS = self._custom(table, group_B)
        else:
            sums = ASSIGNMENTS[self.assignment](table, group_B, compare)
            advantage_BS, valid_BS = sums.found.advantage_N, sums.found.comparable_N
            account = self._account(sums)
        valid_BS = valid_BS & (table.modality_BS >= 0)
        advantage_BS = torch.where(valid_BS, advantage_BS, 0.0).float()
        metrics = _reward_metrics(table) | _group_metrics(table, group_B, compare)
        return Routed(group_B, advantage_BS, valid_BS, metrics, account)

    def _custom(self, table: RewardTable, group_B: Tensor) -> tuple[Tensor, Tensor]:
        assert callable(self.assignment)
        name = getattr(self.assignment, "__name__", "assignment")
        segments = Segments(
            table.modality_BS.clone(), _rounds(table), group_B.clone(), table.names, table.weights, table
        )
        given = torch.as_tensor(self.assignment(credited_values(table), segments))
        if given.shape != table.modality_BS.shape or given.is_complex():
            raise ValueError(
                f"assignment {name!r} returned {given.dtype} {list(given.shape)}; expected a float for "
                f"every row and sampled segment: {list(table.modality_BS.shape)}"
            )
        if given.isinf().any():
            raise ValueError(f"assignment {name!r} returned an infinite advantage; use NaN for 'left out'")
        return given.double().nan_to_num(nan=0.0), ~given.isnan()

    def _account(self, sums: _Sums) -> Account:
        found = sums.found
        return Account(
            assignment=str(self.assignment),
            scale=self.scale,
            leave_one_out=self.leave_one_out,
            terms_BSF=sums.terms_BSF,
            total_BS=sums.total_BS,
            mean_BS=found.mean_N,
            std_BS=found.std_N,
            count_BS=found.count_N,
            divisor_BS=found.divisor_N,
        )


def credited_values(table: RewardTable) -> Tensor:
    """float32 [B, S, F]: each reward's values at the segments that it credits; NaN elsewhere and where missing. A
    sequence reward's value is repeated at every credited segment."""
    values_BSF = table.values_BSF.clone()
    text_BS = table.modality_BS == Modality.TEXT
    last_BS = text_BS & (text_BS.long().flip(1).cumsum(1).flip(1) == 1)
    places = {"text": text_BS, "image": table.modality_BS == Modality.IMAGE, "last": last_BS}
    for f, (on, credit) in enumerate(zip(table.on, table.credit)):
        if on == "sequence":
            place_BS = torch.stack([places[part] for part in credit]).any(0)
            values_BSF[..., f] = torch.where(place_BS, table.sequence_BF[:, f, None], math.nan)
    return values_BSF


def _rounds(table: RewardTable) -> Tensor:
    """int64 [B, S]: ordinal of each segment among the row's segments of its modality."""
    counts = torch.stack([(table.modality_BS == m).long().cumsum(1) - 1 for m in Modality])
    return counts.gather(0, table.modality_BS.clamp(min=0)[None])[0]


def _credits(table: RewardTable, modality: Modality) -> Tensor:
    """bool [F]: the rewards that credit a modality."""
    names = {modality.name.lower()} | ({"last"} if modality is Modality.TEXT else set())
    return torch.tensor([bool(names & set(credit)) for credit in table.credit], dtype=torch.bool)


def _scaled_means(table: RewardTable, group_B: Tensor, default: str | None = None) -> Tensor:
    """float64 [B, F]: each reward's mean over the row, on the reward's own scale."""
    means_BF = table.row_means_BF
    columns = [rescale(m_B, group_B, scale or default) for m_B, scale in zip(means_BF.unbind(1), table.scale)]
    return torch.stack(columns, 1) if columns else means_BF


def _totals_by_modality(table: RewardTable, group_B: Tensor) -> Iterator[tuple[Modality, Tensor, Tensor]]:
    """For each modality: the terms [B, F] of the rewards that credit it, and their weighted sum [B]."""
    terms_BF = _scaled_means(table, group_B)
    for modality in Modality:
        own_BF = terms_BF.masked_fill(~_credits(table, modality), math.nan)
        yield modality, own_BF, weighted_sum(own_BF, torch.tensor(table.weights))


def _to_segments(table: RewardTable, terms_BF: Tensor, total_B: Tensor, found: Comparison) -> _Sums:
    """Repeats a row's values for each of its segments."""
    shape = table.modality_BS.shape
    spread = {f.name: getattr(found, f.name)[:, None].expand(shape) for f in fields(Comparison)}
    terms_BSF = terms_BF[:, None].expand(*shape, terms_BF.shape[1])
    return _Sums(terms_BSF, total_B[:, None].expand(shape), Comparison(**spread))


def _by_modality(table: RewardTable, parts: Sequence[_Sums]) -> _Sums:
    """Picks each segment's sums by its own modality. parts: of text, of images."""
    is_image_BS = table.modality_BS == Modality.IMAGE

    def pick(text: Tensor, image: Tensor) -> Tensor:
        return torch.where(is_image_BS if text.ndim == 2 else is_image_BS[..., None], image, text)

    text, image = parts
    found = {f.name: pick(getattr(text.found, f.name), getattr(image.found, f.name)) for f in fields(Comparison)}
    terms, total = pick(text.terms_BSF, image.terms_BSF), pick(text.total_BS, image.total_BS)
    return _Sums(terms, total, Comparison(**found))


def _checked_groups(table: RewardTable, groups_B: Tensor) -> Tensor:
    """Renumbers groups from 0, so that any int64 (a hash, a data set's index) may identify a group."""
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
    lost: dict[str, Counter[Cause]] = {name: Counter() for name in table.names}
    for (name, cause), count in table.lost.items():
        lost[name][cause] += count
    for f, (name, asked) in enumerate(zip(table.names, table.asked_F.tolist())):
        if not asked:  # no segment to score
            metrics[f"not_applicable/{name}"] = 1.0
            continue
        present = table.present(f)
        if len(present):
            metrics[f"reward/{name}"] = present.double().mean().item()
        none = lost[name].pop(Cause.NONE, 0)
        metrics[f"lost/{name}"] = lost[name].total() / asked
        metrics |= {f"lost/{name}/{cause}": count / asked for cause, count in sorted(lost[name].items())}
        metrics[f"not_applicable/{name}"] = none / asked
    return metrics


def _group_metrics(table: RewardTable, group_B: Tensor, compare: Compare) -> dict[str, float]:
    """Statistics of the factorized totals: std within groups, and correlation of the modalities' advantages."""
    metrics: dict[str, float] = {}
    compared = []
    for modality, _, total_B in _totals_by_modality(table, group_B):
        std_G = group_statistics(total_B, group_B).std_G
        std_G = std_G[~std_G.isnan()]
        if len(std_G):
            metrics[f"group_std/{modality.name.lower()}"] = std_G.mean().item()
            metrics[f"zero_std/{modality.name.lower()}"] = (std_G == 0).double().mean().item()
        compared.append(compare(total_B, group_B))
    both_B = compared[0].comparable_N & compared[1].comparable_N
    found = correlation(compared[0].advantage_N[both_B], compared[1].advantage_N[both_B])
    return metrics if found is None else metrics | {"advantage_correlation": found}
