"""Classifier-free guidance as data, for sampling and scoring.

Guided logits are c + Σ_k s_k (c − u_k). c are the logits of the whole prompt; u_k those of a prompt that leaves out
"text" (the words) or "image" (the pictures). One term gives (1 + s) c − s u; image editing uses two. Scoring must
combine logits as sampling did, or importance ratios would compare different policies.
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
    """Guidance for scoring a canvas of B rows. For each prompt that leaves something out: a canvas with that prompt
    and the same responses, and its scales (text, image)."""

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
        """prompts: keyed by what they leave out, one per row. Returns None if all scales are 0."""
        names = [name for name, pair in scales.items() if any(pair)]
        canvases = [render([p + r for p, r in zip(prompts[n], responses)], spec, device) for n in names]
        return cls(canvases, [scales[n] for n in names]) if names else None

    def rows(self, index: Tensor) -> Guidance:
        return Guidance([canvas.rows(index) for canvas in self.canvases], self.scales)

    def masks(self, canvas: Canvas, mask: Tensor) -> list[Tensor]:
        """Maps a token mask [..., B, L] of `canvas` to each guidance canvas, without modalities of scale 0. All
        canvases contain the same responses, so their sampled tokens are the same, in the same order."""
        out = []
        for other, scales in zip(self.canvases, self.scales):
            guided = mask & torch.tensor(scales, device=mask.device).ne(0)[canvas.modality.clamp(min=0)]
            there = other.sampled.new_zeros(*mask.shape[:-2], *other.shape)
            there[..., other.sampled] = guided[..., canvas.sampled]
            out.append(there)
        return out

    def of_modality(self, modality: Modality) -> list[tuple[int, float]]:
        """(index of the canvas, scale) for each canvas that guides a modality."""
        return [(k, pair[modality]) for k, pair in enumerate(self.scales) if pair[modality]]
