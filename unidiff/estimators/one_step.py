"""All sampled tokens in one step, under a perturbed prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.estimators import Estimator, Place, register, token_uniform
from unidiff.sequence import Canvas, Modality

_HIDE = 2  # noise stream beside those of the modalities


@register("one_step")
@dataclass(frozen=True)
class OneStep(Estimator):
    """ℓ_j = log p(o_j | all of o masked, and each content token of the prompt with probability p).

    Text and image tokens of the prompt alike, drawn anew in each inner iteration, so that iterations differ.

    hide_prompt: p. Source: diffu-GRPO (d1, arXiv 2504.12216), p = 0.15.
    """

    hide_prompt: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.hide_prompt <= 1:
            raise ValueError(f"hide_prompt is {self.hide_prompt}; a probability lies in [0, 1]")

    def mask(
        self,
        canvas: Canvas,
        place: Place,
        modality: Modality,
        iteration: int,
        iterations: int,
        keys_B: Tensor,
    ) -> Tensor:
        """[B, L] bool, see `Estimator.mask`."""
        return canvas.sampled & (canvas.modality == modality)

    def hide(self, canvas: Canvas, iteration: int, keys_B: Tensor) -> Tensor:
        """[B, L] bool: prompt tokens to mask.

        The numbers do not depend on who asks: where text and images both use this method, a token is hidden
        with probability p, not 1 − (1−p)².
        """
        uniform = token_uniform(canvas, keys_B, iteration, _HIDE)
        return prompt_content(canvas) & (uniform < self.hide_prompt)


def prompt_content(canvas: Canvas) -> Tensor:
    """[B, L] bool: content tokens of the segments before the first one that has sampled tokens."""
    last = torch.iinfo(canvas.segment.dtype).max
    first = torch.where(canvas.sampled, canvas.segment, last).amin(1, keepdim=True)
    return canvas.clean.valid & (canvas.clean.offset >= 0) & (canvas.segment < first)
