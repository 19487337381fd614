"""Applies a schedule to one segment of some rows: asks it in each step, and records its choices.

Dimensions: B rows of the segment, b of them active in a step, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from unidiff import noise
from unidiff.sampling import text as rules
from unidiff.schedules.schedule import Choice, Choices, Look, Schedule
from unidiff.sequence import Modality

STREAM = 5  # last number of the noise streams here; those of the samplers are smaller


@dataclass
class _Step:
    """The record of a step. fresh: bool [b], rows whose action was drawn in this step."""

    rows: Tensor
    features: Tensor
    action: Tensor
    fresh: Tensor
    temperature: Tensor
    committed: Tensor | None = None


class Steering:
    """keys_B: int64 [B], the rows' noise keys. turn: part of the noise streams. greedy: take the likeliest actions."""

    def __init__(self, schedule: Schedule, keys_B: Tensor, turn: tuple[int, ...], greedy: bool) -> None:
        self.schedule, self.keys, self.turn, self.greedy = schedule, keys_B, turn, greedy
        self.steps: list[_Step] = []
        self._look: Look | None = None  # of the last step
        self._kept: Tensor | None = None  # [B, A], the actions of a schedule that acts once a segment
        self._acted = torch.zeros_like(keys_B, dtype=torch.bool)

    @classmethod
    def of(
        cls, schedule: Schedule | None, modality: Modality, keys_B: Tensor, turn: int, greedy: bool
    ) -> Steering | None:
        """None if there is no schedule, or if it does not steer the modality."""
        if schedule is None or not schedule.steers(modality):
            return None
        return cls(schedule, keys_B, (turn, int(modality)), greedy)

    @torch.no_grad()
    def decide(self, rows: Tensor, number: int, look: Look) -> Choice:
        """The choice for the rows [b] in a step. number: of the step, unique in the segment."""

        def uniform(n: int) -> Tensor:
            return noise.uniform(self.keys[rows], (*self.turn, number, STREAM), n)

        features = self.schedule.features(look)
        action = self.schedule.draw(features, None if self.greedy else uniform)
        fresh = torch.ones_like(self._acted[rows])
        if self.schedule.once:
            fresh = ~self._acted[rows]
            if self._kept is None:
                self._kept = action.new_zeros(len(self.keys), action.shape[1])
            action = torch.where(fresh[:, None], action, self._kept[rows])
            self._kept[rows] = action
            self._acted[rows] = True
        choice = self.schedule.choice(look, action)
        _check(self.schedule, look, features, action, choice)
        warmth = torch.ones_like(look.progress) if choice.temperature is None else choice.temperature
        self.steps.append(_Step(rows, features, action, fresh, warmth))
        self._look = look
        return choice

    def commit(self, choice: Choice, free: Tensor, score: Tensor) -> Tensor:
        """bool [b, N]: the tokens to commit under a choice with `commits`; at least one in each row with free tokens.

        free: bool [b, N], the tokens that may be committed. score: float [b, N], larger = committed earlier.
        """
        if choice.count is not None:
            return rules.commit_top(score, free, choice.count.clamp(min=1))
        if choice.bound is not None:
            assert self._look is not None
            return rules.commit_entropy(self._look.entropy, free, choice.bound[:, None])
        assert choice.commit is not None
        commit = choice.commit & free
        best = rules.commit_top(score, free, torch.ones_like(free[:, 0], dtype=torch.int64))
        return torch.where(commit.any(1, keepdim=True), commit, best)

    def committed(self, count: Tensor) -> None:
        """Records how many tokens each row of the last step committed, int64 [b]."""
        self.steps[-1].committed = count

    @torch.no_grad()
    def choices(self) -> list[Choices | None]:
        """The recorded choices of each of the B rows; None for a row without steps."""
        if not self.steps:
            return [None] * len(self.keys)
        row = torch.cat([s.rows for s in self.steps]).cpu()
        fresh, warmth = (torch.cat([getattr(s, n) for s in self.steps]).cpu() for n in ("fresh", "temperature"))
        features, action = (_stacked([getattr(s, n) for s in self.steps]).cpu() for n in ("features", "action"))
        count = torch.cat([s.committed for s in self.steps if s.committed is not None]).cpu()
        device = self.keys.device
        logp = self.schedule.log_prob(features.to(device), action.to(device)).cpu()
        if logp.shape != fresh.shape:
            raise ValueError(f"{_named(self.schedule)}: log_prob must be [{len(fresh)}], it is {list(logp.shape)}")
        logp = logp * fresh
        found: list[Choices | None] = []
        for b in range(len(self.keys)):
            own = row == b
            kept = Choices(features[own], action[own], logp[own], count[own], warmth[own], fresh[own])
            found.append(kept if len(kept) else None)
        return found


def _check(schedule: Schedule, look: Look, features: Tensor, action: Tensor, choice: Choice) -> None:
    """Raises ValueError, with the schedule's name, for invalid features, actions or choices."""
    b, n = look.masked.shape
    for name, value in (("features", features), ("action", action)):
        if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != b or not value.is_floating_point():
            raise ValueError(f"{_named(schedule)}: {name} must be a float tensor [{b}, …]")
    if not isinstance(choice, Choice):
        raise ValueError(f"{_named(schedule)}: choice must return a Choice, not {type(choice).__name__}")
    shapes = {"temperature": (b,), "count": (b,), "bound": (b,), "commit": (b, n)}
    given = {name: value for name in shapes if (value := getattr(choice, name)) is not None}
    if len(given.keys() - {"temperature"}) > 1:
        raise ValueError(f"{_named(schedule)}: a Choice has one of commit, count and bound, not {', '.join(given)}")
    for name, value in given.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != shapes[name]:
            raise ValueError(f"{_named(schedule)}: Choice.{name} must be a tensor {list(shapes[name])}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{_named(schedule)}: Choice.{name} has a value that is not finite")
    if choice.temperature is not None and bool((choice.temperature <= 0).any()):
        raise ValueError(f"{_named(schedule)}: Choice.temperature must be above 0")
    if choice.commit is not None and choice.commit.dtype != torch.bool:
        raise ValueError(f"{_named(schedule)}: Choice.commit must be bool")
    if choice.count is not None and choice.count.is_floating_point():
        raise ValueError(f"{_named(schedule)}: Choice.count must be whole numbers")


def _named(schedule: Schedule) -> str:
    return f"schedule {schedule.name or type(schedule).__name__}"


def _stacked(parts: list[Tensor]) -> Tensor:
    """Joins [b, F] of steps whose blocks differ in width, padded with 0."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])


def warmed(log_probs: Tensor, choice: Choice) -> Tensor:
    """Log-probabilities [b, N, V] at the chosen temperature."""
    if choice.temperature is None:
        return log_probs
    return (log_probs / choice.temperature[:, None, None]).log_softmax(-1)
