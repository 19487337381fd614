"""Samples interleaved responses: text, image, text, image, … answer, directed by the model's own end tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from unidiff import noise
from unidiff.config import convert
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.writing import Writing
from unidiff.sequence import Interleaved, Locate, Prompt, Writes, check_parts

if TYPE_CHECKING:
    from PIL.Image import Image


def rollout(
    model: UnifiedModel,
    prompt: Sequence[str | Image],
    locate: Locate | None = None,
    seed: int = 0,
    writes: Writes = "interleaved",
    system: str | None = None,
    room: int | None = None,
    prepare: str | None = None,
    **settings: Any,
) -> Rollout:
    """Samples one response to texts and PIL images: `rollout(model, ["Where is the way out?", image])`.

    locate: finds the region that a text names, for edit="region" (a task's `region`, or `edit.box(…)`). writes,
    system, room, prepare: see `UnifiedModel.encode_prompt`. settings: fields of `SamplerConfig`; by default the
    family's (`ModelSpec.sampler`). For batches, see `InterleavedSampler`.
    """
    config = model.spec.sampler_config(**settings)
    encoded = model.encode_prompt(prompt, config.guides, writes, system=system, room=room, prepare=prepare)
    key = noise.key(convert(seed, int, "seed", words=False))
    return InterleavedSampler(model, config, locate).sample([encoded], [key])[0]


class InterleavedSampler:
    """Samples responses to batches of prompts.

    locate: finds the region that a text names (edit="region"), for prompts without their own `locate`. Without either,
    tokens are chosen by confidence. trace: segments keep the probabilities of every step (`Segment.trace`); tokens do
    not depend on it. Raises ValueError for settings that do not fit the model.
    """

    def __init__(
        self, model: UnifiedModel, config: SamplerConfig, locate: Locate | None = None, trace: bool = False
    ) -> None:
        if config.approximate_cache != "none" and model.spec.attention != "bidirectional":
            raise ValueError(
                f"approximate_cache is {config.approximate_cache!r}, but the model is block_causal: its cache is exact"
            )
        self.model, self.config, self.locate, self.trace = model, config, locate, trace

    @torch.no_grad()
    def sample(self, prompts: Sequence[Interleaved | Prompt], keys: Sequence[int]) -> list[Rollout]:
        """Samples len(keys) / len(prompts) rollouts of each prompt; returns them prompt by prompt.

        prompts: for guidance they must come from `UnifiedModel.encode_prompt`. They may differ in length, in pictures
        and in the kind of response; similar ones are sampled together. keys: one noise key per rollout
        (`noise.key(seed, step, prompt, sample)`). Raises ValueError if the counts do not fit, guidance lacks a prompt,
        or a rollout may exceed the model's positions; TypeError for prompts that are not encoded.
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
        each = len(keys) // len(prompts)
        done: list[Rollout | None] = [None] * len(keys)
        training = self.model.training
        self.model.eval()
        try:
            for places in self._alike(given):
                rows = [p * each + i for p in places for i in range(each)]
                own = [given[p] for p in places]
                writing = Writing(self.model, self.config, own, [keys[i] for i in rows], self.locate, self.trace)
                for row, rollout in zip(rows, writing.run()):
                    done[row] = rollout
        finally:
            self.model.train(training)
        return [rollout for rollout in done if rollout is not None]

    def _alike(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Groups the indices of prompts whose responses have the same parts, room and grid."""
        groups: dict[Hashable, list[int]] = {}
        for place, prompt in enumerate(prompts):
            picture = prompt.whole.last_image()
            grid = None if picture is None else picture.grid
            groups.setdefault((prompt.plan, prompt.room, prompt.behind, grid), []).append(place)
        return list(groups.values())
