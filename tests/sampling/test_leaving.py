"""Rows that are done are not run while others of their batch go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.covering import pairs, slow_after
from tests.families.checkpoints import make_checkpoint
from unidiff import noise
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.fill import fill
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler

WORDS = ("find a safe way", "go", "to the goal then", "red cube", "find the goal", "what is red ?")
THRESHOLD = {"text_threshold": 0.9, "text_block": 8}
STEPS = {"text_threshold": None, "text_steps": 24, "text_block": 8}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> UnifiedModel:
    """A bidirectional model whose texts of up to 24 tokens end at different lengths: it knows 12 words, one an end."""
    model = UnifiedModel.from_pretrained(make_checkpoint("llada", tmp_path_factory.mktemp("llada")))
    low = model.spec.text_range[0] + 20
    assert not low <= model.spec.mask < low + 12
    model.spec = dataclasses.replace(model.spec, text_range=(low, low + 12), text_end=(low,), text_length=24)
    return model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each pass through the body."""
    rows: list[int] = []
    hidden = UnifiedModel.hidden

    def spy(self: UnifiedModel, tokens: Any, *args: Any) -> torch.Tensor:
        rows.append(tokens.shape[0])
        return hidden(self, tokens, *args)

    monkeypatch.setattr(UnifiedModel, "hidden", spy)
    yield rows


def sample(model: UnifiedModel, count: int = 12, only: int | None = None, **settings: Any) -> list[Rollout]:
    config = SamplerConfig(**settings)
    rows = range(count) if only is None else [only]
    prompts = [model.encode_prompt([WORDS[i % len(WORDS)]], config.guides) for i in rows]
    return InterleavedSampler(model, config).sample(prompts, [noise.key(3, i) for i in rows])


KINDS = ({"text_temperature": 0.0}, {}, {"text_guidance": 0.8})


@pytest.mark.parametrize(
    ("cache", "how", "kind"), slow_after(3, pairs(("none", "prefix", "dual"), (THRESHOLD, STEPS), KINDS)), ids=str
)
def test_tokens_are_those_of_a_row_alone(
    writer: UnifiedModel, run: list[int], cache: str, how: dict[str, Any], kind: dict[str, Any]
) -> None:
    settings = {**how, **kind, "approximate_cache": cache}
    together = sample(writer, **settings)
    forwards = sum(r.compute["text"].forwards for r in together)
    assert sum(run) == forwards  # what the meter counts is what is run
    if "text_temperature" not in kind:
        assert len({len(r.segments[0]) for r in together}) >= 4
        assert sum(run) < 0.8 * len(run) * max(run)
    for i, rollout in enumerate(together):
        (alone,) = sample(writer, only=i, **settings)
        for name in ("tokens", "step"):
            assert torch.equal(getattr(alone.segments[0], name), getattr(rollout.segments[0], name))
        assert (alone.segments[0].probability - rollout.segments[0].probability).abs().max() < 1e-5
        assert alone.compute["text"].values()[:3] == rollout.compute["text"].values()[:3]


def test_blocks_behind_the_end_are_not_run(writer: UnifiedModel) -> None:
    for rollout in sample(writer, **STEPS):
        blocks = -(-len(rollout.segments[0]) // 8)
        assert rollout.compute["text"].forwards <= 8 * blocks


@pytest.mark.parametrize("guidance", [0.0, 0.8])
def test_layouts_that_are_filled_leave_too(writer: UnifiedModel, run: list[int], guidance: float) -> None:
    config = SamplerConfig(text_guidance=guidance, **STEPS)
    layouts, keys = [writer.template.text("find a safe way", 24)] * 8, [noise.key(5, i) for i in range(8)]
    together = fill(writer, layouts, keys, config)
    assert len(set(run)) >= 3 and run[0] == max(run)
    for key, done in zip(keys, together):
        (alone,) = fill(writer, layouts[:1], [key], config)
        assert torch.equal(alone.ids, done.ids) and torch.equal(alone.step, done.step)
