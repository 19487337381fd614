"""The trace of a rollout: what was drawn at each step, without changing what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unidiff import noise
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Interleaved, Modality, Segment

SETTINGS: list[dict[str, Any]] = [
    {"edit": "random", "edit_share": 0.3},
    {"edit": "full", "image_sampler": "emerge"},
    {"edit": "confidence", "text_block": 3, "text_threshold": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["edit"])
def test_a_trace_follows_the_step_map_and_changes_nothing(
    settings: dict[str, Any], model: UnifiedModel, prompts: list[Interleaved], sample: Callable[..., list[Rollout]]
) -> None:
    config = SamplerConfig(**{"max_rounds": 2, "image_steps": 5, **settings})
    keys = [noise.key(0, 0, i, 0) for i in range(len(prompts))]
    plain = InterleavedSampler(model, config).sample(prompts, keys)
    traced = InterleavedSampler(model, config, trace=True).sample(prompts, keys)
    seen = 0
    for a, b in zip(plain, traced):
        for before, segment in zip(a.segments, b.segments):
            assert before.trace is None and torch.equal(before.tokens, segment.tokens)
            assert torch.equal(before.step, segment.step) and segment.trace is not None
            assert len(segment.trace) >= int(segment.step.max()) + 1
            for k, row in enumerate(segment.trace):
                masked, now = segment.step >= k, segment.step == k
                if segment.modality is Modality.IMAGE or config.text_block is None:
                    assert torch.equal(row.isnan(), ~masked), f"step {k}"
                assert not (~row.isnan() & ~masked).any()  # a later block is masked, and nothing is drawn there
                assert torch.equal(row[now], segment.probability[now])
            seen += segment.modality is Modality.IMAGE
    assert seen, "no picture was drawn"


def test_a_trace_has_a_column_for_each_token() -> None:
    with pytest.raises(ValueError, match=r"Segment.trace is \[2, 3\], expected \[steps, 2\]"):
        Segment(Modality.TEXT, torch.tensor([7, 8]), trace=torch.zeros(2, 3))  # type: ignore[arg-type]
