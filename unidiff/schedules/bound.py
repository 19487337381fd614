"""DiFFPO's schedule: one entropy bound for each text."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from unidiff.schedules.controls import Gaussian, summary
from unidiff.schedules.schedule import Choice, Look, register_schedule
from unidiff.sequence import Modality


@register_schedule("bound")
class Bound(Gaussian):
    """γ of the entropy bound (`text_entropy_bound`). It is chosen in a text's first step, from the model's
    distributions while all tokens are masked, and then kept. γ = start · exp(z). Pictures follow the settings.

    start: initial γ, in nats. Source: DiFFPO (arXiv 2510.02212), whose head reads the prompt's hidden states instead.
    """

    once: ClassVar[bool] = True

    def __init__(self, start: float = 0.3) -> None:
        if start <= 0:
            raise ValueError(f"schedule bound: start is {start}; it must be above 0")
        super().__init__(numbers=1, inputs=6)
        self.start = math.log(start)

    def steers(self, modality: Modality) -> bool:
        return modality is Modality.TEXT

    def features(self, look: Look) -> Tensor:
        return summary(look)

    def choice(self, look: Look, action: Tensor) -> Choice:
        return Choice(bound=torch.exp(self.start + action[:, 0]))
