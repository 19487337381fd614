"""The values of all rewards on one batch of rollouts, with a reason for each value that is missing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unidiff.rewards.guard import Surroundings
from unidiff.rewards.names import as_rewards
from unidiff.rewards.reward import Cause, Missing, Reward, RewardError
from unidiff.rewards.routed import Routed
from unidiff.rewards.runner import Job
from unidiff.rewards.segment_view import SegmentView, own_rows
from unidiff.sequence import Modality

WHOLE = -1  # segment index of a sequence reward's value


@dataclass(eq=False)
class RewardTable:
    """Rewards of B rollouts with at most S sampled segments, from F reward functions.

    names, weights, on, credit: one entry per reward, as in `Reward`.
    values_BSF:  float32, values of rewards on text or image segments. NaN = missing: lost, not applicable, of another
                 modality, or no such segment. Sequence rewards are NaN here.
    sequence_BF: float32, the values of rewards with on="sequence". NaN = missing, or not a sequence reward.
    modality_BS: int64, the modality of each sampled segment; -1 = the row has no such segment.
    missing:     {(f, row, segment or WHOLE): Missing}, one entry for each requested value that is missing.
    scale:       one entry per reward, as in `Reward`; default None for all.
    logged:      numbers that rewards logged, by name (`log_metric`).
    extra:       {column: {(row, segment or WHOLE): value}}, columns that rewards logged (`log_extra`).
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    on: tuple[str, ...]
    credit: tuple[tuple[str, ...], ...]
    values_BSF: Tensor
    sequence_BF: Tensor
    modality_BS: Tensor
    missing: dict[tuple[int, int, int], Missing] = field(default_factory=dict)
    scale: tuple[str | None, ...] = ()
    logged: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, dict[tuple[int, int], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scale = self.scale or (None,) * len(self.names)
        rows, segments, count = self.values_BSF.shape
        if self.sequence_BF.shape != (rows, count) or self.modality_BS.shape != (rows, segments):
            raise ValueError(
                f"values_BSF {list(self.values_BSF.shape)}, sequence_BF {list(self.sequence_BF.shape)} and "
                f"modality_BS {list(self.modality_BS.shape)} disagree"
            )
        if {len(each) for each in (self.names, self.weights, self.on, self.credit, self.scale)} != {count}:
            raise ValueError(f"names, weights, on, credit and scale need {count} entries each, one a reward")

    @property
    def lost(self) -> dict[tuple[str, Cause], int]:
        """The number of missing values by reward and cause, including `Cause.NONE` (not applicable)."""
        return dict(Counter((self.names[f], lost.cause) for (f, _, _), lost in self.missing.items()))

    @property
    def messages(self) -> dict[tuple[str, Cause], str]:
        """The first message of each (reward, cause)."""
        first: dict[tuple[str, Cause], str] = {}
        for (f, _, _), lost in self.missing.items():
            first.setdefault((self.names[f], lost.cause), lost.message)
        return first

    @property
    def asked_F(self) -> Tensor:
        """int64 [F]: the number of values that were requested from each reward."""
        missing = Counter(f for f, _, _ in self.missing)
        return torch.tensor([missing[f] + len(self.present(f)) for f in range(len(self.names))])

    @property
    def row_means_BF(self) -> Tensor:
        """float64 [B, F]: each reward's mean over the row's segments that have a value; NaN if none has."""
        means_BF = self.values_BSF.double().nanmean(dim=1)
        return torch.where(self.sequence_BF.isnan(), means_BF, self.sequence_BF.double())

    def present(self, f: int) -> Tensor:
        """float32 [n]: all values of reward f."""
        values = torch.cat([self.values_BSF[..., f].flatten(), self.sequence_BF[:, f]])
        return values[~values.isnan()]

    @property
    def metrics(self) -> dict[str, float]:
        """Means of the logged numbers; a name without a finite number is absent."""
        finite = {name: [v for v in values if math.isfinite(v)] for name, values in self.logged.items()}
        return {name: sum(values) / len(values) for name, values in finite.items() if values}

    def explain(self, sample: int, segment: int, routed: Routed | None = None) -> str:
        """Explains one segment's rewards in words: each value, or why it is missing.

        segment: the ordinal among the row's sampled segments, as `SegmentView.index`. routed: a router's result for
        this table; then the text also explains the segment's advantage. Raises IndexError if the row has no such
        sampled segment.
        """
        kinds = self.modality_BS[sample, segment].item() if segment < self.modality_BS.shape[1] else WHOLE
        if kinds < 0:
            raise IndexError(f"sample {sample} has no sampled segment {segment}")
        target = Modality(int(kinds)).name.lower()
        lines = []
        for f, on in enumerate(self.on):
            if on == target:
                lines.append("  " + self._sentence(f, sample, segment, self.values_BSF[sample, segment, f].item()))
        for f, on in enumerate(self.on):
            if on == "sequence":
                said = self._sentence(f, sample, WHOLE, self.sequence_BF[sample, f].item())
                lines.append(f"  whole response: {said}; credited to {' and '.join(self.credit[f])}")
        lines = lines or [f"  no reward looks at {target} segments"]
        for column, values in self.extra.items():
            lines += [f"  {column}: {values[sample, at]}" for at in (segment, WHOLE) if (sample, at) in values]
        if routed is not None:
            lines += routed.explain(sample, segment, self.names, self.weights)
        return "\n".join([f"Sample {sample}, segment {segment} ({target}):", *lines])

    def _sentence(self, f: int, row: int, segment: int, value: float) -> str:
        if not math.isnan(value):
            weight = self.weights[f]
            return f"{self.names[f]} = {value:.4g}, times weight {weight:g} = {weight * value:.4g}"
        lost = self.missing.get((f, row, segment))
        why = f"{lost.cause}: {lost.message}" if lost else "it was not asked"
        return f"{self.names[f]} has no value ({why})"

    def __repr__(self) -> str:
        rows, segments, _ = self.values_BSF.shape
        return f"RewardTable({rows} rows, {segments} segments, rewards: {', '.join(self.names)})"

    def __str__(self) -> str:
        heads = ("reward", "on", "weight", "credit", "scored", "mean", "std", "missing")
        lines = [heads] + [self._line(f) for f in range(len(self.names))]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([repr(self), *rows])

    def _line(self, f: int) -> tuple[str, ...]:
        present = self.present(f)
        count = len(present)
        mean = f"{present.mean().item():.4f}" if count else "-"
        std = f"{present.std().item():.4f}" if count > 1 else "-"
        lost = ", ".join(f"{cause} {n}" for (name, cause), n in self.lost.items() if name == self.names[f])
        scored = f"{count}/{int(self.asked_F[f])}"
        credit = "+".join(self.credit[f])
        return self.names[f], self.on[f], f"{self.weights[f]:g}", credit, scored, mean, std, lost or "-"

    def rows(self, chosen: slice) -> RewardTable:
        """The table of some rows, in order."""
        first, last, _ = chosen.indices(len(self.modality_BS))
        inside = range(first, last)
        return replace(
            self,
            values_BSF=self.values_BSF[first:last],
            sequence_BF=self.sequence_BF[first:last],
            modality_BS=self.modality_BS[first:last],
            missing={(f, row - first, s): lost for (f, row, s), lost in self.missing.items() if row in inside},
            extra={
                column: {(row - first, s): value for (row, s), value in values.items() if row in inside}
                for column, values in self.extra.items()
            },
        )

    @staticmethod
    def concatenate(tables: Sequence[RewardTable]) -> RewardTable:
        """Joins tables of several processes or parts, rows in order. Raises ValueError if their rewards differ."""
        first = tables[0]
        kinds = {(t.names, t.weights, t.on, t.credit, t.scale) for t in tables}
        if len(kinds) != 1:
            raise ValueError(f"tables of different rewards cannot be joined: {[t.names for t in tables]}")
        longest = max(t.modality_BS.shape[1] for t in tables)
        missing: dict[tuple[int, int, int], Missing] = {}
        extra: dict[str, dict[tuple[int, int], Any]] = {}
        logged: dict[str, list[float]] = {}
        offset = 0
        for t in tables:
            missing |= {(f, row + offset, segment): lost for (f, row, segment), lost in t.missing.items()}
            for column, values in t.extra.items():
                extra.setdefault(column, {}).update({(row + offset, s): value for (row, s), value in values.items()})
            for name, numbers in t.logged.items():
                logged.setdefault(name, []).extend(numbers)
            offset += len(t.modality_BS)
        pad = torch.nn.functional.pad
        values = [pad(t.values_BSF, (0, 0, 0, longest - t.values_BSF.shape[1]), value=math.nan) for t in tables]
        modality = [pad(t.modality_BS, (0, longest - t.modality_BS.shape[1]), value=-1) for t in tables]
        joined = torch.cat(values), torch.cat([t.sequence_BF for t in tables]), torch.cat(modality)
        names = first.names, first.weights, first.on, first.credit
        return RewardTable(*names, *joined, missing, first.scale, logged, extra)

    # ---------------------------------------------------------------- files

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as JSON data, for a rollout file. Values of `extra` that JSON cannot store
        become text."""
        tensors = {name: getattr(self, name).contiguous() for name in ("values_BSF", "sequence_BF", "modality_BS")}
        header: dict[str, Any] = {name: getattr(self, name) for name in ("names", "weights", "on", "credit", "scale")}
        header["missing"] = [[*place, lost.cause, lost.message] for place, lost in self.missing.items()]
        header["extra"] = {
            column: [[*place, value if _is_plain(value) else str(value)] for place, value in values.items()]
            for column, values in self.extra.items()
        }
        header["logged"] = self.logged
        return tensors, json.loads(json.dumps(header))

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], header: dict[str, Any]) -> RewardTable:
        """The inverse of `to_tensors`; other tensors are ignored."""
        return RewardTable(
            names=tuple(header["names"]),
            weights=tuple(header["weights"]),
            on=tuple(header["on"]),
            credit=tuple(tuple(credit) for credit in header["credit"]),
            values_BSF=tensors["values_BSF"],
            sequence_BF=tensors["sequence_BF"],
            modality_BS=tensors["modality_BS"],
            missing={(f, row, s): Missing(Cause(cause), why) for f, row, s, cause, why in header["missing"]},
            scale=tuple(header["scale"]),
            logged=header["logged"],
            extra={column: {(row, s): value for row, s, value in values} for column, values in header["extra"].items()},
        )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


class Pending:
    """Rewards of a batch that are being computed; `table` waits for them."""

    def __init__(
        self, rewards: Iterable[Reward | str], rows: Sequence[tuple[SegmentView, ...]], trainer_state: Any = None
    ) -> None:
        self.rewards, self.rows = as_rewards(rewards), rows
        self._places = [_places(reward, rows) for reward in self.rewards]
        self._surroundings = Surroundings()
        self._jobs = []
        for reward, where in zip(self.rewards, self._places):
            own = own_rows(rows)  # copies, so that a reward cannot change another's views
            views = [own[row].whole() if segment == WHOLE else own[row][segment] for row, segment in where]
            self._jobs.append(Job(reward, views, trainer_state).start())

    def table(self) -> RewardTable:
        """Waits for all values. It does not check required rewards; see `check_required`."""
        table = _empty_table(self.rewards, self.rows)
        results = []
        for job in self._jobs:
            results.append(job.finish())
            self._surroundings.restore(job.reward.name)
        for f, (reward, where, values) in enumerate(zip(self.rewards, self._places, results)):
            for (row, segment), result in zip(where, values):
                if isinstance(result, Missing):
                    table.missing[f, row, segment] = result
            at = [(place, v) for place, v in zip(where, values) if not isinstance(v, Missing)]
            if at:
                rows, segments = torch.tensor([place for place, _ in at]).unbind(1)
                given = torch.tensor([v for _, v in at], dtype=torch.float32)
                if reward.on == "sequence":
                    table.sequence_BF[rows, f] = given
                else:
                    table.values_BSF[rows, segments, f] = given
        for where, job in zip(self._places, self._jobs):
            for name, numbers in job.log.metrics.items():
                table.logged.setdefault(name, []).extend(numbers)
            for column, values in job.log.columns.items():
                table.extra.setdefault(column, {}).update(zip(where, values))
        return table


def reward_table(
    rewards: Iterable[Reward | str], rows: Sequence[tuple[SegmentView, ...]], trainer_state: Any = None
) -> RewardTable:
    """Runs all rewards on a batch of rollouts.

    rewards: what `as_rewards` takes. rows: each rollout's sampled segments in order (from `link_row`); a row without
    segments gets no scores. Each reward is called once with all of its segments of the batch, or with `batched=False`
    once per segment. trainer_state: passed to functions that ask for it.
    Raises RewardError if a reward with required=True lost a value, ValueError if two rewards share a name.
    """
    pending = Pending(rewards, rows, trainer_state)
    table = pending.table()
    check_required(pending.rewards, table)
    return table


def check_required(rewards: Sequence[Reward], table: RewardTable) -> None:
    """Raises RewardError if a reward with required=True lost a value. rewards: those of the table, in its order."""
    for (f, row, segment), lost in table.missing.items():
        if rewards[f].required:
            place = f"sample {row}" if segment == WHOLE else f"sample {row}, segment {segment}"
            raise RewardError(
                f"reward {rewards[f].name!r} is required and has no value for {place}: {lost.cause}: {lost.message}"
            )


def _places(reward: Reward, rows: Sequence[tuple[SegmentView, ...]]) -> list[tuple[int, int]]:
    """(row, segment) of everything that a reward scores."""
    mine = [
        (row, views) for row, views in enumerate(rows) if views and reward.looks_at(getattr(views[0].task, "kind", ""))
    ]
    if reward.on == "sequence":
        return [(row, WHOLE) for row, _ in mine]
    target = Modality[reward.on.upper()]
    return [(b, s) for b, views in mine for s, view in enumerate(views) if view.modality == target]


def _empty_table(rewards: Sequence[Reward], rows: Sequence[tuple[SegmentView, ...]]) -> RewardTable:
    batch, segments, count = len(rows), max(map(len, rows), default=0), len(rewards)
    padded = [[int(view.modality) for view in views] + [-1] * (segments - len(views)) for views in rows]
    return RewardTable(
        names=tuple(r.name for r in rewards),
        weights=tuple(r.weight for r in rewards),
        on=tuple(r.on for r in rewards),
        credit=tuple(r.credit for r in rewards),
        scale=tuple(r.scale for r in rewards),
        values_BSF=torch.full((batch, segments, count), math.nan, dtype=torch.float32),
        sequence_BF=torch.full((batch, count), math.nan, dtype=torch.float32),
        modality_BS=torch.tensor(padded, dtype=torch.int64).reshape(batch, segments),
    )
