"""Guidance of block-causal models: sampled and scored alike, with and without the cache, in a GRPO step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.covering import slow_after
from unidiff import noise
from unidiff.grpo.experience import guidance_of
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.edit import Locate
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality
from unidiff.tasks import FrozenLake

SCALES: list[dict[str, float]] = [
    {"text_guidance": 0.8},
    {"image_guidance": 1.5},
    {"picture_guidance": 2.0},
    {"text_guidance": 0.5, "image_guidance": 1.5, "picture_guidance": 0.7},
]
EACH = pytest.mark.parametrize("scales", slow_after(1, SCALES[::-1]), ids=lambda s: "-".join(s))


@pytest.fixture
def guided(exact_model: UnifiedModel, task: FrozenLake, locate: Locate) -> Callable[..., list[Rollout]]:
    """By the exact model, for guidance multiplies what sums round."""
    model = exact_model

    def run(**settings: Any) -> list[Rollout]:
        config = SamplerConfig(**{"max_rounds": 2, "image_steps": 3, **settings})
        prompts = [model.encode_prompt(task.example("train", i).prompt, config.guides) for i in range(4)]
        sampler = InterleavedSampler(model, config, locate)
        return sampler.sample(prompts, [noise.key(3, i) for i in range(8)])

    return run


EDITS = ("region", "confidence", "full")


@pytest.mark.parametrize(("scales", "edit"), [*zip(SCALES, EDITS), *((SCALES[-1], edit) for edit in EDITS)], ids=str)
def test_sampled_probabilities_are_guided_scores(
    exact_model: UnifiedModel, guided: Callable[..., list[Rollout]], scales: dict[str, float], edit: str
) -> None:
    model = exact_model
    settings = {"edit": edit, "text_threshold": None, "text_steps": 1, "image_steps": 1, "image_temperature": 0.8}
    rollouts = guided(**settings, **scales)
    canvas = model.render([r.sequence for r in rollouts])
    recorded = torch.ones(canvas.shape)
    for row, rollout in enumerate(rollouts):
        for s, segment in enumerate(rollout.sequence):
            if not segment.prompt:
                recorded[row, (canvas.segment[row] == s) & (canvas.clean.offset[row] >= 0)] = segment.probability
    guidance = guidance_of(model, rollouts, rollouts[0].settings.scales)
    found = model.score(canvas, canvas.sampled, temperature=(1.0, 0.8), guidance=guidance).detach().exp()
    plain = model.score(canvas, canvas.sampled, temperature=(1.0, 0.8)).detach().exp()
    assert (found - recorded)[canvas.sampled].abs().max() < 2e-6
    own = Modality.TEXT if "text_guidance" in scales else Modality.IMAGE
    assert ((plain - found).abs()[canvas.sampled & (canvas.modality == own)]).max() > 1e-3  # it does something


@EACH
def test_the_cache_changes_nothing(guided: Callable[..., list[Rollout]], scales: dict[str, float]) -> None:
    """Invariant 5."""
    for a, b in zip(guided(**scales), guided(cache=False, **scales)):
        assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(a.segments, b.segments, strict=True))


def test_what_guidance_costs(guided: Callable[..., list[Rollout]]) -> None:
    """Images with two terms run three rows where one was run; texts without guidance one."""
    plain, three = guided(edit="full"), guided(edit="full", image_guidance=1e-9, picture_guidance=1e-9)
    for a, b in zip(plain, three):
        assert b.compute["text"].token_forwards == a.compute["text"].token_forwards
        if "image" in a.compute:
            assert b.compute["image"].token_forwards == 3 * a.compute["image"].token_forwards
        assert b.compute["prompt"].token_forwards == 3 * a.compute["prompt"].token_forwards
