"""Classifier-free guidance as data: what a prompt is compared with, in sampling and in scoring.

Guided logits are c + Σ_k s_k (c − u_k): c of the whole prompt, u_k of a prompt that leaves something out, "text" (the
words) or "image" (the pictures). Two terms are the form of image editing; one is (1 + s) c − s u. Scoring combines
logits as sampling did, or ratios would compare a policy with another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.canvas import Canvas, render
from unidiff.sequence import Interleaved, Modality
from unidiff.spec import ModelSpec

LEFT_OUT = ("text", "image")


@dataclass
class Guidance:
    """What a canvas of B rows is scored with: for each prompt that leaves something out the canvas of the same
    responses behind it, and its scale for each modality (text, image)."""

    canvases: list[Canvas]
    scales: list[tuple[float, float]]

    @classmethod
    def of(
        cls,
        prompts: Mapping[str, Sequence[Interleaved]],
        responses: Sequence[Interleaved],
        scales: Mapping[str, tuple[float, float]],
        spec: ModelSpec,
        device: torch.device | str = "cpu",
    ) -> Guidance | None:
        """prompts: by what they leave out, one a row. None without any scale but 0."""
        names = [name for name, pair in scales.items() if any(pair)]
        canvases = [render([p + r for p, r in zip(prompts[n], responses)], spec, device) for n in names]
        return cls(canvases, [scales[n] for n in names]) if names else None

    def rows(self, index: Tensor) -> Guidance:
        return Guidance([canvas.rows(index) for canvas in self.canvases], self.scales)

    def masks(self, canvas: Canvas, mask: Tensor) -> list[Tensor]:
        """The masked tokens [..., B, L] of `canvas` in each of the other canvases, without those of a modality with
        scale 0. All of them hold the same responses, so their sampled tokens are the same, in the same order."""
        out = []
        for other, scales in zip(self.canvases, self.scales):
            guided = mask & torch.tensor(scales, device=mask.device).ne(0)[canvas.modality.clamp(min=0)]
            there = other.sampled.new_zeros(*mask.shape[:-2], *other.shape)
            there[..., other.sampled] = guided[..., canvas.sampled]
            out.append(there)
        return out

    def of_modality(self, modality: Modality) -> list[tuple[int, float]]:
        """Which canvases guide a modality, and with which scale."""
        return [(k, pair[modality]) for k, pair in enumerate(self.scales) if pair[modality]]
