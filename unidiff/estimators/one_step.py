"""All sampled tokens in one step, under a perturbed prompt."""

from __future__ import annotations

from dataclasses import dataclass

from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.registry import register
from unidiff.estimators.view import View


@register("one_step")
@dataclass(frozen=True)
class OneStep(Estimator):
    """ℓ_j = log p(o_j | all of o masked, and each content token of the prompt masked with probability p).

    Prompt masks cover text and image tokens. They are redrawn in each inner iteration, so that iterations differ.

    hide_prompt: p. Source: diffu-GRPO (d1, arXiv 2504.12216), p = 0.15.
    """

    hide_prompt: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.hide_prompt <= 1:
            raise ValueError(f"hide_prompt is {self.hide_prompt}; a probability is in [0, 1]")

    def views(self, ask: Ask) -> list[View]:
        return [View(ask.among, hide=ask.prompt & (ask.prompt_uniform() < self.hide_prompt))]
