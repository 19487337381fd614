"""`trace` and `left_to_right` against the probabilities that the sampler itself recorded when it drew the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.covering import pairs
from tests.tables import each
from unidiff import noise
from unidiff.canvas import Canvas
from unidiff.estimators import draw_views, make, parse, run_views, values_of
from unidiff.grpo.experience import guidance_of
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality

PLAIN = "one_step:hide_prompt=0"  # leaves the prompt as it was
WARM = {"text_temperature": 0.8, "image_temperature": 1.3}


def recorded(canvas: Canvas, rollouts: list[Rollout]) -> Tensor:
    """[B, L] log-probability of each sampled token when it was committed."""
    out = torch.zeros(canvas.shape)
    for b, rollout in enumerate(rollouts):
        for ordinal, segment in enumerate(rollout.sequence):
            if not segment.prompt:
                columns = (canvas.segment[b] == ordinal) & (canvas.clean.offset[b] >= 0)
                assert segment.probability is not None
                out[b, columns] = segment.probability.log()
    return out * canvas.sampled


def replayed(model: UnifiedModel, rollouts: list[Rollout], text: str, image: str) -> tuple[Canvas, Tensor]:
    canvas = model.render([r.sequence for r in rollouts])
    pair = parse(text), parse(image)
    (draw,) = draw_views(canvas, *pair, 1, torch.arange(len(rollouts)))
    guidance = guidance_of(model, rollouts, rollouts[0].settings.scales)
    warmth = (WARM["text_temperature"], WARM["image_temperature"])
    with torch.no_grad():
        logp = run_views(model, canvas, draw.views, warmth, guidance)
    return canvas, values_of(canvas, draw, logp, *pair, torch.ones(canvas.shape))


@pytest.mark.parametrize(
    ("image_sampler", "edit", "axes"), pairs(("maskgit", "emerge"), ("random", "full"), (False, True))
)
def test_images_are_scored_as_they_were_drawn(
    build_model: Callable[..., UnifiedModel],
    model: UnifiedModel,
    sample: Callable[..., list[Rollout]],
    image_sampler: str,
    edit: str,
    axes: bool,
) -> None:
    model = build_model(axes=True) if axes else model
    rollouts = sample(of=model, image_sampler=image_sampler, image_steps=6, edit=edit, edit_share=0.6, **WARM)
    canvas, found = replayed(model, rollouts, PLAIN, "trace")
    own = canvas.sampled & (canvas.modality == Modality.IMAGE)
    steps = [canvas.step[own].unique().numel(), int(own.sum())]
    assert steps[0] > 1 and steps[1] > 30  # the test means something
    assert (found - recorded(canvas, rollouts))[own].abs().max() < 1e-4
    (whole,) = draw_views(canvas, make("trace"), make("trace", merge=99), 1, torch.arange(len(rollouts)))
    assert bool((whole.views[0].mask == canvas.sampled)[own].all())


@pytest.mark.parametrize("method", ["trace", "left_to_right"])
def test_texts_written_token_by_token(model: UnifiedModel, sample: Callable[..., list[Rollout]], method: str) -> None:
    rollouts = sample(text_block=1, edit="random", **WARM)
    canvas, found = replayed(model, rollouts, method, PLAIN)
    own = canvas.sampled & (canvas.modality == Modality.TEXT)
    assert int(own.sum()) > 20
    assert (found - recorded(canvas, rollouts))[own].abs().max() < 1e-4


@each(
    "settings",
    [
        {"text_threshold": 0.4},
        {"text_threshold": None, "text_steps": 3},
        {"text_entropy_bound": 5.0},
        {"text_order": "dilated"},
        {"text_threshold": 0.0, "text_gap": 3},
    ],
)
def test_texts_written_in_any_order(
    model: UnifiedModel, sample: Callable[..., list[Rollout]], lean: Callable[..., UnifiedModel], settings: dict
) -> None:
    """Of a model that ends no text: nothing was then seen behind an end token."""
    endless = lean(model, dict.fromkeys(model.spec.text_end, -60.0))
    rollouts = sample(of=endless, edit="random", **settings, **WARM)
    canvas, found = replayed(endless, rollouts, "trace", PLAIN)
    own = canvas.sampled & (canvas.modality == Modality.TEXT)
    order = canvas.step[own].reshape(len(rollouts), -1)
    assert order.shape[1] == model.spec.text_length and bool((order.diff(dim=1) < 0).any())
    assert (found - recorded(canvas, rollouts))[own].abs().max() < 1e-4
    _, in_one_go = replayed(endless, rollouts, PLAIN, PLAIN)
    assert (in_one_go - recorded(canvas, rollouts))[own].abs().max() > 0.1


# ---------------------------------------------------------------- both attentions, with guidance and without


@pytest.fixture(scope="module")
def any_model(request: pytest.FixtureRequest, model: UnifiedModel, published: Callable[[str], Path]) -> UnifiedModel:
    if request.param == "native":
        return model
    other = UnifiedModel.from_pretrained(published(request.param))
    if other.images is not None:  # random weights hardly ever announce a picture; of a range of two words they do
        announce = other.spec.image_next
        assert announce is not None
        other.spec = replace(other.spec, text_range=(announce, announce + 2), text_end=(announce,))
    return other


GUIDED = {"text_guidance": 0.7, "image_guidance": 1.5, "picture_guidance": 0.8}


@pytest.mark.parametrize(
    ("any_model", "image_sampler", "guidance", "edit"),
    pairs(("native", "llada", "mmada", "dimoo"), ("maskgit", "emerge"), ({}, GUIDED), ("random", "full")),
    indirect=["any_model"],
    ids=str,
)
def test_every_token_is_scored_as_it_was_drawn(
    any_model: UnifiedModel, image_sampler: Any, guidance: dict[str, float], edit: Any
) -> None:
    """In its own state, by the same attention, temperature and guidance; texts are written token by token."""
    pictures = any_model.images is not None
    guidance = guidance if pictures else {k: v for k, v in guidance.items() if k == "text_guidance"}
    config = SamplerConfig(
        text_block=1, image_sampler=image_sampler, image_steps=5, edit=edit, edit_share=0.5, max_rounds=2, **guidance,
        **WARM,
    )  # fmt: skip
    side = 4 * any_model.images.factor if pictures else 0
    if any_model.spec.family == "native":
        side = any_model.spec.image_grid[0] * any_model.images.factor
    prompts = [
        any_model.encode_prompt([words, *([Image.new("RGB", (side, side), colour)] if pictures else [])], config.guides)
        for words, colour in (("find a safe way", "red"), ("go", "blue"))
    ]
    rollouts = InterleavedSampler(any_model, config).sample(prompts, [noise.key(5, i) for i in range(6)])
    canvas, found = replayed(any_model, rollouts, "trace", "trace")
    assert (found - recorded(canvas, rollouts))[canvas.sampled].abs().max() < 1e-4
    images = canvas.sampled & (canvas.modality == Modality.IMAGE)
    assert int(canvas.sampled.sum()) > 20 and (not pictures or canvas.step[images].unique().numel() > 1)
    unguided = [
        replace(r, settings=replace(r.settings, text_guidance=0.0, image_guidance=0.0, picture_guidance=0.0))
        for r in rollouts
    ]
    _, without = replayed(any_model, unguided, "trace", "trace")
    assert bool(((without - found)[canvas.sampled].abs() > 0.01).any()) is bool(guidance)
