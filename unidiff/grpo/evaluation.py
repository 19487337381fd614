"""Held-out evaluation: greedy and sampled figures on prompts that training never sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unidiff import noise
from unidiff.grpo.experience import segment_views
from unidiff.model import UnifiedModel
from unidiff.rewards.segment_view import SegmentView
from unidiff.sampling.compute import Compute
from unidiff.sampling.rollout import InterleavedSampler, Rollout, SamplerConfig
from unidiff.tasks import Task

_EVAL = 1 << 20  # keeps evaluation noise apart from training steps


@dataclass
class Evaluation:
    """figures: mean of each measure over the prompts. rollouts, rows: the responses. compute: mean of a rollout."""

    figures: dict[str, float]
    rollouts: list[Rollout]
    rows: list[tuple[SegmentView, ...]]
    examples: list[Any]
    compute: Compute


def evaluate(
    model: UnifiedModel,
    task: Task,
    sampler: SamplerConfig,
    indices: Sequence[int],
    *,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 128,
) -> Evaluation:
    """One response to each prompt of a split. Its noise does not depend on the batch size or on training."""
    inner = InterleavedSampler(model, sampler, task.region)
    rollouts: list[Rollout] = []
    examples = [task.example(split, i) for i in indices]
    for start in range(0, len(indices), batch_size):
        part = examples[start : start + batch_size]
        keys = [noise.key(seed, _EVAL, i, 0) for i in indices[start : start + batch_size]]
        rollouts += inner.sample([model.encode(e.prompt) for e in part], keys)
    rows = segment_views(model, rollouts, examples)
    figures = {
        k: float(np.nanmean(v)) if np.isfinite(v).any() else 0.0 for k, v in task.measure(rows, examples).items()
    }
    compute = sum((r.compute for r in rollouts), Compute()).scaled(1 / max(len(rollouts), 1))
    return Evaluation(figures, rollouts, rows, examples, compute)


def both_ways(model: UnifiedModel, task: Task, sampler: SamplerConfig, indices: Sequence[int], **options: Any) -> dict:
    """{"greedy": Evaluation, "sampled": Evaluation}."""
    from dataclasses import replace

    return {
        "greedy": evaluate(model, task, replace(sampler, greedy=True), indices, **options),
        "sampled": evaluate(model, task, replace(sampler, greedy=False), indices, **options),
    }
