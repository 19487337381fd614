"""Converts rollouts and their rewards to records, for the galleries of reports and tools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from unidiff.grpo.experience import segment_views
from unidiff.grpo.rollout_file import RolloutBatch
from unidiff.model import UnifiedModel
from unidiff.report.record import RolloutRecord, record
from unidiff.report.regeneration import full_regeneration
from unidiff.rewards.routed import Routed
from unidiff.rewards.router import ASSIGNMENTS, RewardRouter
from unidiff.rewards.segment_view import SegmentView
from unidiff.tasks.task import Example


def records(
    model: UnifiedModel,
    batch: RolloutBatch,
    rows: Sequence[int] | None = None,
    *,
    views: Sequence[tuple[SegmentView, ...]] | None = None,
    titles: dict[int, str] | None = None,
) -> list[RolloutRecord]:
    """A record of each of the batch's rollouts, or of some rows.

    views: all rollouts, decoded; None = decode them here, including the prompts' tokens. titles: by row, instead of the
    batch's. Raises ValueError if the model cannot decode the rollouts, or a row does not exist.
    """
    batch.check(model)
    rows = range(len(batch)) if rows is None else rows
    if wrong := [i for i in rows if not 0 <= i < len(batch)]:
        raise ValueError(f"sample {wrong[0]} does not exist: there are {len(batch)} rollouts, counted from 0")
    if views is None:
        chosen = [batch.rollouts[i] for i in rows]
        given = [Example(model.decode(r.sequence.prompt)) for r in chosen]
        decoded = dict(zip(rows, segment_views(model, chosen, given)))
    else:
        decoded = {i: views[i] for i in rows}
    compared = side_by_side(batch)
    made = []
    for i in rows:
        rollout = batch.rollouts[i]
        made.append(
            record(
                rollout,
                decoded[i],
                table=batch.table,
                routed=batch.routed,
                compared=compared,
                full=full_regeneration(model, rollout),
                row=i,
                title=(titles or {}).get(i, batch.titles[i]),
                decode_token=lambda token: str(model.tokenizer.decode(token)),
                read=model.decode(rollout.sequence.prompt),
                figures={name: values[i] for name, values in batch.figures.items()},
                assignment=str(batch.router.get("assignment", "")),
            )
        )
    return made


def side_by_side(batch: RolloutBatch) -> dict[str, Routed]:
    """The batch's advantages under every assignment; empty without rewards, or if a group has a single rollout.

    All use the batch's router settings; `scale="batch"` covers only this batch's rollouts.
    """
    counts = batch.groups_B.unique(return_counts=True)[1]
    if batch.table is None or not batch.table.names or bool((counts < 2).any()):
        return {}
    options = {k: v for k, v in batch.router.items() if k != "assignment"}
    router = RewardRouter(**options)
    return {name: replace(router, assignment=name).route(batch.table, batch.groups_B) for name in ASSIGNMENTS}


def successes(batch: RolloutBatch) -> list[bool | None]:
    """Whether each rollout succeeded, as in its record; None = unknown."""
    figures = batch.figures.get("success", [math.nan] * len(batch))
    table = batch.table
    at = table.names.index("success") if table is not None and "success" in table.names else None

    def outcome(row: int) -> bool | None:
        said = [figures[row]] if math.isfinite(figures[row]) else []
        if not said and table is not None and at is not None:
            values = [*table.values_BSF[row, :, at].tolist(), float(table.sequence_BF[row, at])]
            said = [value for value in values if math.isfinite(value)]
        return said[-1] >= 1 if said else None

    return [outcome(row) for row in range(len(batch))]


def mixed_groups(batch: RolloutBatch) -> list[int]:
    """Groups with both successes and failures, in order. A run learns from these."""
    outcomes: dict[int, set[bool | None]] = {}
    for group, outcome in zip(batch.groups_B.tolist(), successes(batch)):
        outcomes.setdefault(group, set()).add(outcome)
    return [group for group, seen in outcomes.items() if {True, False} <= seen]


def mixed_first(batch: RolloutBatch) -> list[int]:
    """All rows, those of mixed groups first."""
    groups, mixed = batch.groups_B.tolist(), set(mixed_groups(batch))
    return sorted(range(len(batch)), key=lambda row: groups[row] not in mixed)


def best_and_worst(batch: RolloutBatch, groups: int) -> dict[int, str]:
    """{row: title} of the rollouts with the highest and the lowest advantage in each of the first groups."""
    if batch.routed is None:
        return {}
    total = batch.routed.advantage_BS.sum(1)
    chosen: dict[int, str] = {}
    for group in batch.groups_B.unique()[:groups]:
        inside = (batch.groups_B == group).nonzero()[:, 0]
        best, worst = int(inside[total[inside].argmax()]), int(inside[total[inside].argmin()])
        for row, rank in {best: "best", worst: "worst"}.items() if best != worst else ():
            chosen[row] = f"{rank} of the group of {batch.titles[row]}"
        if best == worst:
            chosen[best] = f"all alike: group of {batch.titles[best]}"
    return chosen
