"""`trace` and `left_to_right` against the probabilities that the sampler itself recorded when it drew the tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unidiff.estimators import draw_views, make, parse, score
from unidiff.model import UnifiedModel
from unidiff.sampling.rollout import Rollout
from unidiff.sequence import Canvas, Modality

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
    with torch.no_grad():
        return canvas, score(model, canvas, draw, *pair, torch.ones(canvas.shape), tuple(WARM.values()))


@pytest.mark.parametrize("image_sampler", ["maskgit", "emerge"])
@pytest.mark.parametrize("edit", ["random", "full"])
def test_images_are_scored_as_they_were_drawn(
    model: UnifiedModel, sample: Callable[..., list[Rollout]], image_sampler: str, edit: str
) -> None:
    rollouts = sample(image_sampler=image_sampler, image_steps=6, edit=edit, edit_share=0.6, **WARM)
    canvas, found = replayed(model, rollouts, PLAIN, "trace")
    own = canvas.sampled & (canvas.modality == Modality.IMAGE)
    steps = [canvas.step[own].unique().numel(), int(own.sum())]
    assert steps[0] > 1 and steps[1] > 50  # the test means something
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


@pytest.mark.parametrize("settings", [{"text_threshold": 0.4}, {"text_threshold": None, "text_steps": 3}], ids=str)
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
