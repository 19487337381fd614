"""Trains a schedule on the rollouts that it steered, with their advantages.

The loss is GRPO's over the schedule's steps: −min(ρ A, clip(ρ) A). ρ is an action's importance ratio (its probability
now over that when it was drawn), A the advantage of the segment. The loss is a mean over all steps of the rollouts.
No gradient flows through the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.experience import Experience
from unidiff.grpo.losses import check_finite, token_losses
from unidiff.grpo.process import everybody
from unidiff.schedules import Choices, Schedule
from unidiff.supervised import sum_gradients


class ScheduleUpdate:
    """A schedule and its Adam optimizer; `state_dict` holds both, for checkpoints."""

    def __init__(self, schedule: Schedule, config: GRPOConfig, accelerator: Accelerator) -> None:
        if not list(schedule.parameters()):
            raise ValueError(f"schedule {schedule.name!r} has no parameters to train; set model.schedule to use it")
        self.schedule, self.config, self.accelerator = schedule, config, accelerator
        self.optimizer = torch.optim.Adam(schedule.parameters(), lr=config.schedule_learning_rate)

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self.schedule.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state["schedule"])
        self.optimizer.load_state_dict(state["optimizer"])

    def run(self, step: int, experience: Experience) -> dict[str, float]:
        """Trains on the experience of a step. Returns metrics, equal on every process. Raises FloatingPointError
        before the optimizer's step if the gradient is not finite."""
        parts = by_width(experience)
        steps = self._sum(float(sum(len(old) for _, _, old, _ in parts)))
        metrics: dict[str, float] = {}
        for _ in range(self.config.num_iterations):
            self.optimizer.zero_grad(set_to_none=True)
            clipped = torch.zeros((), dtype=torch.float64)
            for features, action, old, advantage in parts:
                loss, beyond = self.loss(features, action, old, advantage)
                (loss / max(steps, 1.0)).backward()
                clipped += beyond
            norm = self._step(step)
            metrics = {"schedule/grad_norm": norm, "schedule/clip": self._sum(float(clipped)) / max(steps, 1.0)}
        return metrics | self._figures(experience)

    def loss(self, features: Tensor, action: Tensor, old: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses of n steps, and the number of clipped ratios. features, action: float32 [n, …].
        old, advantage: float32 [n]."""
        low, high = self.config.clip_range
        device = next(self.schedule.parameters()).device
        logp, old = self.schedule.log_prob(features.to(device), action.to(device))[None], old.to(device)[None]
        advantage = advantage.to(device)[None]
        loss, stats = token_losses(logp, old, advantage, torch.ones_like(old), epsilon_low=low, epsilon_high=high)
        return loss.sum(), stats.clipped.cpu()

    def _step(self, step: int) -> float:
        parameters = list(self.schedule.parameters())
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sum_gradients(self.schedule, self.accelerator)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        check_finite(norm, {}, f"step {step}, of the schedule")
        self.optimizer.step()
        return float(norm)

    def _figures(self, experience: Experience) -> dict[str, float]:
        """Means over the steered rollouts: steps per segment, tokens per step, temperature per step."""
        every = [c for r in experience.rollouts for s in r.segments if (c := s.choices) is not None]
        segments, steps = self._sum(float(len(every))), self._sum(float(sum(map(len, every))))
        tokens = self._sum(float(sum(int(c.committed.sum()) for c in every)))
        warmth = self._sum(float(sum(float(c.temperature.sum()) for c in every)))
        return {
            "schedule/steps": steps / max(segments, 1.0),
            "schedule/tokens": tokens / max(steps, 1.0),
            "schedule/temperature": warmth / max(steps, 1.0),
        }

    def _sum(self, value: float) -> float:
        return sum(everybody(value, self.accelerator))


def by_width(experience: Experience) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Features [n, F], actions [n, A], log-probabilities [n] and advantages [n] of actions with an advantage that is
    not 0, grouped by F and A."""
    routed = experience.routed
    found: dict[tuple[int, int], list[tuple[Choices, float]]] = {}
    for b, rollout in enumerate(experience.rollouts):
        for s, segment in enumerate(rollout.segments):
            choices = segment.choices
            if choices is not None and bool(routed.valid_BS[b, s]) and float(routed.advantage_BS[b, s]):
                widths = choices.features.shape[1], choices.action.shape[1]
                found.setdefault(widths, []).append((choices, float(routed.advantage_BS[b, s])))
    parts = []
    for group in found.values():
        own = [c.fresh for c, _ in group]
        features = torch.cat([c.features[f] for (c, _), f in zip(group, own)])
        action = torch.cat([c.action[f] for (c, _), f in zip(group, own)])
        old = torch.cat([c.log_prob[f] for (c, _), f in zip(group, own)])
        advantage = torch.cat([torch.full((int(f.sum()),), a) for (_, a), f in zip(group, own)])
        parts.append((features, action, old, advantage))
    return parts
