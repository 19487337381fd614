"""DiFFPO's schedule: one number for each text, how much entropy a step may leave."""

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
    """γ of the entropy bound (`text_entropy_bound`), chosen in the first step of a text from what the model says of it
    while all is masked, and kept. γ = start · exp(z). Pictures are left to the settings.

    start: γ with the first parameters, in nats. Source: DiFFPO (arXiv 2510.02212), whose head reads the prompt's hidden
    states.
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
