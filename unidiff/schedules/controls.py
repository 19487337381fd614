"""Co-GRPO's schedule: the temperature of a step, and the number of tokens that it commits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unidiff.schedules.schedule import Choice, Look, Schedule, Uniform, register_schedule
from unidiff.sequence import Modality

_LEVELS = (0.1, 0.5, 0.9)


class Gaussian(Schedule):
    """Base of schedules whose action is a few unconstrained numbers: independent Gaussians, whose means are a small
    network's outputs. Initially each mean is 0.

    numbers: size of the action. inputs: features of the network. hidden: its width. spread: initial standard deviation.
    """

    def __init__(self, numbers: int, inputs: int, hidden: int = 32, spread: float = 0.4) -> None:
        super().__init__()
        last = nn.Linear(hidden, numbers)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mean = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), last)
        self.log_std = nn.Parameter(torch.full((numbers,), math.log(spread)))

    def draw(self, features: Tensor, uniform: Uniform | None) -> Tensor:
        mean = self.mean(features)
        if uniform is None:
            return mean
        normal = torch.special.ndtri(uniform(mean.shape[1])).float()
        return mean + normal * self.log_std.exp()

    def log_prob(self, features: Tensor, action: Tensor) -> Tensor:
        scaled = (action - self.mean(features)) / self.log_std.exp()
        return (-(scaled**2) / 2 - self.log_std - math.log(2 * math.pi) / 2).sum(-1)


def summary(look: Look) -> Tensor:
    """float32 [b, 6]: progress, share masked, three quantiles of the model's confidence, and the modality."""
    modality = torch.full_like(look.progress, float(look.modality))
    return torch.stack([look.progress, look.left, *look.quantiles(*_LEVELS).unbind(1), modality], 1)


@register_schedule("controls")
class Controls(Gaussian):
    """Chooses in each step a temperature and a number of tokens to commit, from progress, share masked, quantiles of
    the confidence and modality.

    The temperature is the settings' times 2^tanh(z), between half and twice. The number is ceil(σ(z + log-odds of
    `share`) · masked), at least 1, at most all masked tokens.

    temperature, count: whether it chooses these. share: the share of masked tokens that a new schedule commits per
    step. texts, pictures: the modalities that it steers. Source: Co-GRPO (arXiv 2512.22288), without its re-mask ratio
    and guidance scale.
    """

    def __init__(
        self,
        temperature: bool = True,
        count: bool = True,
        share: float = 0.25,
        texts: bool = True,
        pictures: bool = True,
    ) -> None:
        if not (texts or pictures):
            raise ValueError("schedule controls: it steers nothing; leave texts or pictures at yes")
        if not (temperature or count):
            raise ValueError("schedule controls: it decides nothing; leave temperature or count at yes")
        if not 0 < share < 1:
            raise ValueError(f"schedule controls: share is {share}; it must be in (0, 1)")
        super().__init__(numbers=int(temperature) + int(count), inputs=6)
        self.of = {Modality.TEXT: texts, Modality.IMAGE: pictures}
        self.temperature, self.count, self.start = temperature, count, math.log(share / (1 - share))

    def steers(self, modality: Modality) -> bool:
        return self.of[modality]

    def features(self, look: Look) -> Tensor:
        return summary(look)

    def choice(self, look: Look, action: Tensor) -> Choice:
        warmth, count = None, None
        if self.temperature:
            warmth = torch.exp2(action[:, 0].tanh())
        if self.count:
            share = torch.sigmoid(action[:, -1] + self.start)
            count = (share * look.masked.sum(1)).ceil().long().clamp(min=1)
        return Choice(temperature=warmth, count=count)
