"""The values of all rewards on one batch of rollouts, with a reason for each value that is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.rewards.reward import Cause, Loss, Reward, RewardError, as_rewards
from unidiff.rewards.runner import run_rewards
from unidiff.rewards.segment_view import SegmentView, SequenceView
from unidiff.sequence import Modality

WHOLE = -1  # the place of a sequence reward's value on the segment axis


@dataclass(eq=False)
class RewardTable:
    """Rewards of B rollouts, S sampled segments at most, F reward functions.

    names, weights, on, credit: one entry a reward, as in `Reward`.
    values_BSF:  float32, rewards on text or image segments at the segment that they score. NaN = missing:
                 lost, not applicable, of another modality, or no such segment. Sequence rewards are NaN here.
    sequence_BF: float32, the values of rewards with on="sequence". NaN = missing, or not a sequence reward.
    modality_BS: int64, the modality of each sampled segment; -1 = the row has no such segment.
    losses:      {(f, row, segment or WHOLE): Loss}, one entry for each value that was asked for and is
                 missing.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    on: tuple[str, ...]
    credit: tuple[tuple[str, ...], ...]
    values_BSF: Tensor
    sequence_BF: Tensor
    modality_BS: Tensor
    losses: dict[tuple[int, int, int], Loss] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, segments, count = self.values_BSF.shape
        if self.sequence_BF.shape != (rows, count) or self.modality_BS.shape != (rows, segments):
            raise ValueError(
                f"values_BSF {list(self.values_BSF.shape)}, sequence_BF {list(self.sequence_BF.shape)} and "
                f"modality_BS {list(self.modality_BS.shape)} disagree"
            )
        if not len(self.names) == len(self.weights) == len(self.on) == len(self.credit) == count:
            raise ValueError(f"names, weights, on and credit need {count} entries each, one a reward")

    @property
    def lost(self) -> dict[tuple[str, Cause], int]:
        """How many values each reward lost, by cause. `Cause.NONE` (not applicable) is counted too."""
        return dict(Counter((self.names[f], loss.cause) for (f, _, _), loss in self.losses.items()))

    @property
    def messages(self) -> dict[tuple[str, Cause], str]:
        """The first message of each (reward, cause)."""
        first: dict[tuple[str, Cause], str] = {}
        for (f, _, _), loss in self.losses.items():
            first.setdefault((self.names[f], loss.cause), loss.message)
        return first

    @property
    def asked_F(self) -> Tensor:
        """int64 [F]: how many values each reward was asked for."""
        missing = Counter(f for f, _, _ in self.losses)
        return torch.tensor([missing[f] + len(self.present(f)) for f in range(len(self.names))])

    @property
    def row_means_BF(self) -> Tensor:
        """float64 [B, F]: each reward's mean over the row's segments that have a value; NaN without one."""
        means_BF = self.values_BSF.double().nanmean(dim=1)
        return torch.where(self.sequence_BF.isnan(), means_BF, self.sequence_BF.double())

    def present(self, f: int) -> Tensor:
        """float32 [n]: all values that reward f gave."""
        values = torch.cat([self.values_BSF[..., f].flatten(), self.sequence_BF[:, f]])
        return values[~values.isnan()]

    def explain(self, sample: int, segment: int) -> str:
        """In words, what each reward said of one segment of one row, and why a value is missing.

        Errors: IndexError if the row has no such sampled segment.
        """
        kinds = self.modality_BS[sample, segment].item() if segment < self.modality_BS.shape[1] else WHOLE
        if kinds < 0:
            raise IndexError(f"sample {sample} has no sampled segment {segment}")
        target = Modality(int(kinds)).name.lower()
        lines = [f"Sample {sample}, segment {segment} ({target}):"]
        for f, on in enumerate(self.on):
            if on == target:
                lines.append("  " + self._sentence(f, sample, segment, self.values_BSF[sample, segment, f].item()))
        for f, on in enumerate(self.on):
            if on == "sequence":
                said = self._sentence(f, sample, WHOLE, self.sequence_BF[sample, f].item())
                lines.append(f"  whole response: {said}; credited to {' and '.join(self.credit[f])}")
        return "\n".join(lines if len(lines) > 1 else [*lines, f"  no reward looks at {target} segments"])

    def _sentence(self, f: int, row: int, segment: int, value: float) -> str:
        if not math.isnan(value):
            weight = self.weights[f]
            return f"{self.names[f]} = {value:.4g}, times weight {weight:g} = {weight * value:.4g}"
        loss = self.losses.get((f, row, segment))
        why = f"{loss.cause}: {loss.message}" if loss else "it was not asked"
        return f"{self.names[f]} has no value ({why})"

    def __repr__(self) -> str:
        rows, segments, _ = self.values_BSF.shape
        return f"RewardTable({rows} rows, {segments} segments, rewards: {', '.join(self.names)})"

    def __str__(self) -> str:
        heads = ("reward", "on", "weight", "credit", "scored", "mean", "std", "lost")
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

    @staticmethod
    def concatenate(tables: Sequence[RewardTable]) -> RewardTable:
        """One table of all rows in order, for processes that gather theirs. ValueError if rewards differ."""
        first = tables[0]
        kinds = {(t.names, t.weights, t.on, t.credit) for t in tables}
        if len(kinds) != 1:
            raise ValueError(f"tables of different rewards cannot be joined: {[t.names for t in tables]}")
        longest = max(t.modality_BS.shape[1] for t in tables)
        losses: dict[tuple[int, int, int], Loss] = {}
        offset = 0
        for t in tables:
            losses |= {(f, row + offset, segment): loss for (f, row, segment), loss in t.losses.items()}
            offset += len(t.modality_BS)
        pad = torch.nn.functional.pad
        values = [pad(t.values_BSF, (0, 0, 0, longest - t.values_BSF.shape[1]), value=math.nan) for t in tables]
        modality = [pad(t.modality_BS, (0, longest - t.modality_BS.shape[1]), value=-1) for t in tables]
        sequence = [t.sequence_BF for t in tables]
        joined = torch.cat(values), torch.cat(sequence), torch.cat(modality)
        return RewardTable(first.names, first.weights, first.on, first.credit, *joined, losses)


def evaluate(rewards: Iterable[Reward | str], rows: Sequence[tuple[SegmentView, ...]]) -> RewardTable:
    """Runs all rewards on a batch of rollouts.

    rewards: what `as_rewards` takes. rows: each rollout's sampled segments in order (`link_row` makes them);
    a row without segments is scored by nothing. Each reward is called once, with all of its segments of the
    batch.
    Errors: RewardError if a reward with required=True lost a value; ValueError if two rewards share a name.
    """
    rewards = as_rewards(rewards)
    places = [_places(reward, rows) for reward in rewards]
    batches = [[_view(rows, row, segment) for row, segment in where] for where in places]
    table = _empty_table(rewards, rows)
    for f, (reward, where, results) in enumerate(zip(rewards, places, run_rewards(rewards, batches))):
        for (row, segment), result in zip(where, results):
            if isinstance(result, Loss):
                if reward.required:
                    raise RewardError(_fatal(reward, row, segment, result))
                table.losses[f, row, segment] = result
            elif segment == WHOLE:
                table.sequence_BF[row, f] = result
            else:
                table.values_BSF[row, segment, f] = result
    return table


def _places(reward: Reward, rows: Sequence[tuple[SegmentView, ...]]) -> list[tuple[int, int]]:
    """(row, segment) of everything that a reward looks at."""
    if reward.on == "sequence":
        return [(row, WHOLE) for row, views in enumerate(rows) if views]
    target = Modality[reward.on.upper()]
    return [(b, s) for b, views in enumerate(rows) for s, view in enumerate(views) if view.modality == target]


def _view(rows: Sequence[tuple[SegmentView, ...]], row: int, segment: int) -> SegmentView | SequenceView:
    return SequenceView(rows[row]) if segment == WHOLE else rows[row][segment]


def _fatal(reward: Reward, row: int, segment: int, loss: Loss) -> str:
    place = f"sample {row}" if segment == WHOLE else f"sample {row}, segment {segment}"
    return f"reward {reward.name!r} is required and has no value for {place}: {loss.cause}: it {loss.message}"


def _empty_table(rewards: Sequence[Reward], rows: Sequence[tuple[SegmentView, ...]]) -> RewardTable:
    batch, segments, count = len(rows), max(map(len, rows), default=0), len(rewards)
    padded = [[int(view.modality) for view in views] + [-1] * (segments - len(views)) for views in rows]
    return RewardTable(
        names=tuple(r.name for r in rewards),
        weights=tuple(r.weight for r in rewards),
        on=tuple(r.on for r in rewards),
        credit=tuple(r.credit for r in rewards),
        values_BSF=torch.full((batch, segments, count), math.nan),
        sequence_BF=torch.full((batch, count), math.nan),
        modality_BS=torch.tensor(padded, dtype=torch.int64).reshape(batch, segments),
    )
