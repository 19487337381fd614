"""Greedy texts that are drafted ahead: the tokens, steps and probabilities of one pass a step, in fewer passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.covering import slow_after
from tests.families.checkpoints import make_checkpoint
from tests.sampling.test_bidirectional import parts
from unidiff import noise
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.fill import fill
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.tasks import FrozenLake

RULES: dict[str, dict[str, Any]] = {
    "one token a step": {"text_threshold": None, "text_steps": 24},
    "two tokens a step": {"text_threshold": None, "text_steps": 12, "text_order": "margin"},
    "blocks": {"text_threshold": None, "text_steps": 24, "text_block": 8, "text_order": "entropy"},
    "threshold": {"text_threshold": 0.1},
    "entropy bound": {"text_entropy_bound": 0.5},
    "dilated": {"text_order": "dilated"},
    "gap": {"text_threshold": 0.01, "text_gap": 3},
    "guided": {"text_threshold": None, "text_steps": 24, "text_guidance": 0.8},
}


@pytest.fixture(scope="module", params=["native", "llada", "dimoo"])
def writer(request: pytest.FixtureRequest, exact_model: UnifiedModel, tmp_path_factory: Any) -> UnifiedModel:
    """A model whose texts have several lengths."""
    if request.param == "native":
        return exact_model
    folder = make_checkpoint(request.param, tmp_path_factory.mktemp("ahead"))
    return UnifiedModel.from_pretrained(folder, text_length=24).double()


def sample(model: UnifiedModel, count: int = 6, **settings: Any) -> list[Rollout]:
    config = SamplerConfig(max_rounds=2, image_steps=2, edit="random", **{"greedy": True, **settings})
    words = ["find a safe way", "go", "to the goal then", "what is red", "find", "a safe way"]
    rows = range(count)
    if model.spec.family == "native":
        task = FrozenLake()
        given = [task.example("train", i).prompt for i in rows]
    else:
        given = [parts(model, "red", words[i % 6]) for i in rows]
    prompts = [model.encode_prompt(p, config.guides) for p in given]
    return InterleavedSampler(model, config).sample(prompts, [noise.key(3, i) for i in rows])


def same(ours: list[Rollout], plain: list[Rollout]) -> None:
    for one, other in zip(ours, plain, strict=True):
        assert len(one.segments) == len(other.segments)
        for a, b in zip(one.segments, other.segments):
            assert torch.equal(a.tokens, b.tokens) and (a.step is None) == (b.step is None)
            if a.step is not None and b.step is not None and a.probability is not None and b.probability is not None:
                assert torch.equal(a.step, b.step)
                assert (a.probability - b.probability).abs().max() < 1e-6


def passes(rollouts: list[Rollout]) -> float:
    return sum(r.compute["text"].forwards for r in rollouts)


@pytest.mark.parametrize("rule", slow_after(4, RULES))
def test_the_same_tokens_in_fewer_passes(writer: UnifiedModel, rule: str) -> None:
    plain = sample(writer, **RULES[rule])
    for ahead in (2, 5):
        drafted = sample(writer, text_ahead=ahead, **RULES[rule])
        same(drafted, plain)
        assert passes(drafted) <= passes(plain)
        assert all(r.compute["text"].flops >= 0.9 * p.compute["text"].flops for r, p in zip(drafted, plain))
    if rule == "one token a step":
        assert passes(drafted) < 0.9 * passes(plain)


def test_a_row_alone(writer: UnifiedModel) -> None:
    together = sample(writer, text_ahead=4, **RULES["blocks"])
    same(together[:1], sample(writer, count=1, text_ahead=4, **RULES["blocks"]))


def test_layouts(tmp_path: Any) -> None:
    model = UnifiedModel.from_pretrained(make_checkpoint("llada", tmp_path), text_length=24).double()
    template: Any = model.template
    layouts, keys = [template.text("find a safe way", 24)] * 3, [noise.key(5, i) for i in range(3)]
    plain = fill(model, layouts, keys, SamplerConfig(greedy=True, **RULES["blocks"]))
    drafted = fill(model, layouts, keys, SamplerConfig(greedy=True, text_ahead=3, **RULES["blocks"]))
    for one, other in zip(drafted, plain, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.step, other.step)


def test_sampled_texts_take_a_pass_a_step(writer: UnifiedModel) -> None:
    settings = {**RULES["one token a step"], "greedy": False}
    plain, asked = sample(writer, **settings), sample(writer, text_ahead=4, **settings)
    same(asked, plain)
    assert passes(asked) == passes(plain)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="text_ahead is 0; it must be at least 1"):
        SamplerConfig(text_ahead=0)
    for other in ({"text_order": "random"}, {"approximate_cache": "dual"}):
        with pytest.raises(ValueError, match="text_ahead is 2: it needs an order that is not random, and no approx"):
            SamplerConfig(text_ahead=2, **other)  # type: ignore[arg-type]
