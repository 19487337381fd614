"""Samples interleaved responses: text, image, text, image, … answer, as the model's own end tokens say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from unidiff import noise
from unidiff.config import convert
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.edit import Locate
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.writing import Writing
from unidiff.sequence import Interleaved, Prompt, check_parts

if TYPE_CHECKING:
    from PIL.Image import Image


def rollout(
    model: UnifiedModel,
    prompt: Sequence[str | Image],
    locate: Locate | None = None,
    seed: int = 0,
    **settings: Any,
) -> Rollout:
    """One interleaved response to texts and PIL images: `rollout(model, ["Where is the way out?", image])`.

    locate: finds the place that a text names, for edit="region" (a task's `region`, or `edit.box(…)`). settings:
    fields of `SamplerConfig`; the others are the family's own (`ModelSpec.sampler`). Batches: `InterleavedSampler`.
    """
    config = model.spec.sampler_config(**settings)
    encoded = model.encode_prompt(prompt, config.guides)
    key = noise.key(convert(seed, int, "seed", words=False))
    return InterleavedSampler(model, config, locate).sample([encoded], [key])[0]


class InterleavedSampler:
    """Samples responses to batches of prompts.

    locate: finds the region that a text names (edit="region"). trace: segments keep the probabilities of every step
    (`Segment.trace`); tokens do not depend on it. Raises ValueError for settings that do not fit the model.
    """

    def __init__(
        self, model: UnifiedModel, config: SamplerConfig, locate: Locate | None = None, trace: bool = False
    ) -> None:
        if config.approximate_cache != "none" and model.spec.attention != "bidirectional":
            raise ValueError(
                f"approximate_cache is {config.approximate_cache!r}, but the model is block_causal: its cache is exact"
            )
        if config.edit == "region" and locate is None and model.spec.image_next is not None:
            raise ValueError("edit='region' needs locate=…, which finds the place that a text names; or another edit")
        self.model, self.config, self.locate, self.trace = model, config, locate, trace

    @torch.no_grad()
    def sample(self, prompts: Sequence[Interleaved | Prompt], keys: Sequence[int]) -> list[Rollout]:
        """Rollouts of each prompt, len(keys) / len(prompts) of them, prompt by prompt.

        prompts: with guidance those of `UnifiedModel.encode_prompt`. keys: one noise key a rollout
        (`noise.key(seed, step, prompt, sample)`). Raises ValueError if the counts do not fit, the prompts' images have
        different grids, guidance lacks a prompt, or a rollout may outgrow the model's positions; TypeError for prompts
        that are not encoded.
        """
        check_parts(prompts, "prompts", Prompt, Interleaved)  # as `model.encode_prompt` and `model.encode` return them
        if not prompts or not keys or len(keys) % len(prompts):
            raise ValueError(f"{len(keys)} keys do not fit {len(prompts)} prompts")
        given = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
        for name in self.config.guides:
            if any(name not in p.without for p in given):
                raise ValueError(
                    f"guidance needs each prompt without its {name} too: encode it by "
                    f"model.encode_prompt(parts, {self.config.guides})"
                )
        training = self.model.training
        self.model.eval()
        try:
            return Writing(self.model, self.config, given, keys, self.locate, self.trace).run()
        finally:
            self.model.train(training)
