"""A schedule at work on one segment of some rows: it is asked in each step, and what it did is kept.

Dimensions: B rows of the segment, b of them at work in a step, N tokens.
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
    """What was done for the rows of a step. fresh: bool [b], rows whose action was drawn now."""

    rows: Tensor
    features: Tensor
    action: Tensor
    fresh: Tensor
    temperature: Tensor
    committed: Tensor | None = None


class Steering:
    """keys_B: int64 [B], the rows' noise keys. turn: part of the noise streams. greedy: the likeliest actions."""

    def __init__(self, schedule: Schedule, keys_B: Tensor, turn: tuple[int, ...], greedy: bool) -> None:
        self.schedule, self.keys, self.turn, self.greedy = schedule, keys_B, turn, greedy
        self.steps: list[_Step] = []
        self._kept: Tensor | None = None  # [B, A], the actions of a schedule that acts once a segment
        self._acted = torch.zeros_like(keys_B, dtype=torch.bool)

    @classmethod
    def of(
        cls, schedule: Schedule | None, modality: Modality, keys_B: Tensor, turn: int, greedy: bool
    ) -> Steering | None:
        """None where there is no schedule, or it does not steer this modality."""
        if schedule is None or not schedule.steers(modality):
            return None
        return cls(schedule, keys_B, (turn, int(modality)), greedy)

    @torch.no_grad()
    def decide(self, rows: Tensor, number: int, look: Look) -> Choice:
        """What the rows [b] do in a step. number: of the step, which no other step of the segment has."""

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
        warmth = torch.ones_like(look.progress) if choice.temperature is None else choice.temperature
        self.steps.append(_Step(rows, features, action, fresh, warmth))
        return choice

    def committed(self, count: Tensor) -> None:
        """int64 [b]: how many tokens the rows of the last step have committed."""
        self.steps[-1].committed = count

    @torch.no_grad()
    def choices(self) -> list[Choices | None]:
        """Of each of the B rows; None where it took no step."""
        if not self.steps:
            return [None] * len(self.keys)
        row = torch.cat([s.rows for s in self.steps]).cpu()
        fresh, warmth = (torch.cat([getattr(s, n) for s in self.steps]).cpu() for n in ("fresh", "temperature"))
        features, action = (_stacked([getattr(s, n) for s in self.steps]).cpu() for n in ("features", "action"))
        count = torch.cat([s.committed for s in self.steps if s.committed is not None]).cpu()
        device = self.keys.device
        logp = self.schedule.log_prob(features.to(device), action.to(device)).cpu() * fresh
        found: list[Choices | None] = []
        for b in range(len(self.keys)):
            own = row == b
            kept = Choices(features[own], action[own], logp[own], count[own], warmth[own], fresh[own])
            found.append(kept if len(kept) else None)
        return found


def _stacked(parts: list[Tensor]) -> Tensor:
    """Joins [b, F] of steps whose blocks differ in width; what one lacks is 0."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])


def warmed(log_probs: Tensor, choice: Choice) -> Tensor:
    """Log-probabilities [b, N, V] at the chosen temperature."""
    if choice.temperature is None:
        return log_probs
    return (log_probs / choice.temperature[:, None, None]).log_softmax(-1)


def steered(choice: Choice, look: Look, free: Tensor, score: Tensor) -> Tensor | None:
    """bool [b, N]: the tokens that a step commits, at least one of each row with free ones; None = as the settings say.

    free: bool [b, N], the tokens that may be committed. score: float [b, N], larger = committed earlier.
    """
    if choice.count is not None:
        return rules.commit_top(score, free, choice.count.clamp(min=1))
    if choice.bound is not None:
        return rules.commit_entropy(look.entropy, free, choice.bound[:, None])
    if choice.commit is None:
        return None
    commit = choice.commit & free
    best = rules.commit_top(score, free, torch.ones_like(free[:, 0], dtype=torch.int64))
    return torch.where(commit.any(1, keepdim=True), commit, best)
