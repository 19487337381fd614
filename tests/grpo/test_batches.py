"""Which rollouts and views share a forward pass: the same log-probabilities, fewer tokens, no more memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tables import each
from unidiff import noise
from unidiff.canvas import Canvas, Tokens
from unidiff.estimators import ESTIMATORS, Draw, View, draw_views, make, parse, run_views
from unidiff.grpo.batches import cut, view_tokens
from unidiff.model import UnifiedModel
from unidiff.tasks import FrozenLake

ROWS = 6


@pytest.fixture(scope="module", params=["native", "mmada"])
def policy(request: pytest.FixtureRequest, model: UnifiedModel, published: Callable[[str], Path]) -> UnifiedModel:
    return model if request.param == "native" else UnifiedModel.from_pretrained(published(request.param))


@pytest.fixture(scope="module")
def canvas(policy: UnifiedModel, model: UnifiedModel) -> Canvas:
    """Rollouts of several lengths, in the native model's tokens or (texts only) in the other's."""
    if policy is model:
        from unidiff.sampling.config import SamplerConfig
        from unidiff.sampling.sampler import InterleavedSampler

        examples = [FrozenLake().example("train", i) for i in range(ROWS)]
        sampler = InterleavedSampler(model, SamplerConfig(text_temperature=1.5), FrozenLake().region)
        found = sampler.sample([model.encode_prompt(e.prompt) for e in examples], [noise.key(i) for i in range(ROWS)])
        return model.render([r.sequence for r in found])
    texts = ["up", "go up and then left", "where to go", "up up", "down the lake and up again", "on"]
    return policy.render([policy.encode(["a lake"]) + policy.encode([t, t[:3]], prompt=False) for t in texts])


def draw_of(canvas: Canvas, text: str, image: str) -> Draw:
    keys = torch.tensor([noise.key(4, i) for i in range(ROWS)])
    (draw,) = draw_views(canvas, parse(text), parse(image), 1, keys)
    return draw


def stepless(canvas: Canvas, name: str) -> bool:
    return name in ("trace", "two_times", "transition") and bool((canvas.sampled & (canvas.step < 0)).any())


@pytest.mark.parametrize("name", [*ESTIMATORS, "elbo:samples=6"])
def test_one_pass_for_all_views_gives_what_each_gives_alone(policy: UnifiedModel, canvas: Canvas, name: str) -> None:
    if stepless(canvas, name):
        pytest.skip("these texts were not sampled")
    draw, passes = draw_of(canvas, name, "one_step"), []

    def counted(*given: object) -> torch.Tensor:
        passes.append(given)
        return policy(*given)

    with torch.no_grad():
        found = run_views(counted, canvas, draw.views)
        for view, values in zip(draw.views, found, strict=True):
            expected = torch.where(view.scored, policy.score(canvas, view.mask, view.hide), 0.0)
            torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-5)
    assert len(passes) == 1 + any(v.hide is not None for v in draw.views) * (len(draw.views) > 1)


@pytest.mark.parametrize("name", ["left_to_right", "coupled", "elbo:samples=4", "fading_out"])
def test_tokens_are_counted_as_they_are_run(
    policy: UnifiedModel, canvas: Canvas, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, ran, hidden = draw_of(canvas, name, name), [], policy.hidden

    def watched(tokens: Tokens, *given: object) -> torch.Tensor:
        ran.append(int(tokens.valid.sum()))
        return hidden(tokens, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(policy, "hidden", watched)
    with torch.no_grad():
        run_views(policy, canvas, draw.views)
    shared, own = view_tokens(canvas, draw.views, policy.spec.attention)
    assert sum(ran) == int(shared.sum() + own.sum())


@each(("size", "name"), itertools.product([1, 2, 4, 100], ["left_to_right", "elbo:samples=6", "fading_out"]))
def test_a_pass_has_no_more_tokens_than_so_many_rows_of_one_view(
    policy: UnifiedModel, canvas: Canvas, name: str, size: int
) -> None:
    draw, attention = draw_of(canvas, name, "image_random"), policy.spec.attention
    batches = cut(canvas, draw, torch.arange(ROWS), size, attention)
    assert sorted(torch.cat([rows for rows, _ in batches]).tolist()) == list(range(ROWS))
    once, own = view_tokens(canvas, draw_of(canvas, "one_step", "one_step").views, attention)
    limit = size * int((once + own[0]).max())
    for rows, passes in batches:
        own_canvas, views = canvas.rows(rows), draw.rows(rows).views
        assert len(rows) <= size
        assert [k for part in passes for k in range(len(views))[part]] == list(range(len(views)))
        for part in passes:
            shared, own = view_tokens(own_canvas, views[part], attention)
            assert len(rows) * int((shared + own.sum(0)).max()) <= limit or part.stop - part.start == 1
    if name == "fading_out":
        assert [len(rows) for rows, _ in batches] == [len(part) for part in torch.arange(ROWS).split(size)]
    if size == 100:
        assert len(batches) == 1 and len(batches[0][1]) == 1


def test_views_that_score_nothing_have_no_pass_of_their_own(policy: UnifiedModel, canvas: Canvas) -> None:
    draw, nothing = draw_of(canvas, "left_to_right", "left_to_right"), View(torch.zeros_like(canvas.sampled))
    views = [nothing, *draw.views[:2], nothing, *draw.views[2:], nothing]
    padded = Draw(views, draw.weight, (len(views), len(views)))
    batches = cut(canvas, padded, torch.arange(ROWS), 1, policy.spec.attention)
    assert any(len(passes) > 1 for _, passes in batches)
    for rows, passes in batches:
        own = padded.rows(rows).views
        assert [k for part in passes for k in range(len(own))[part]] == list(range(len(own)))
        assert all(any(bool(view.scored.any()) for view in own[part]) for part in passes)


def test_the_prompt_is_run_once_for_all_views(model: UnifiedModel) -> None:
    """Block-causal: so eight views of a short text cost little more than one. The clean text itself is not run: no view
    sees it."""
    prompt = model.encode(FrozenLake().example("train", 0).prompt)
    canvas = model.render([prompt + model.encode(["up"], prompt=False)])
    views = draw_views(canvas, make("elbo", samples=8), make("one_step"), 1, torch.tensor([1]))[0].views
    shared, own = view_tokens(canvas, views, "block_causal")
    assert shared.tolist() == [int((~canvas.sampled).sum())]
    assert shared.item() == canvas.shape[1] - len(model.encode(["up"], prompt=False)[-1])
    assert own.tolist() == [[model.spec.text_length]] * 8
