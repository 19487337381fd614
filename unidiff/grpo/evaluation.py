"""Measures of held-out responses and of a step's rollouts, as means over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator

from unidiff import noise
from unidiff.grpo.experience import Experience, segment_views
from unidiff.grpo.process import everybody
from unidiff.model import UnifiedModel
from unidiff.rewards.reward import Reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.rewards.table import reward_table
from unidiff.sampling.compute import Compute
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.tasks.encode import encode, ready
from unidiff.tasks.task import Task

_EVAL = 1 << 20  # keeps evaluation noise apart from training steps


@dataclass
class Evaluation:
    """figures: mean of each measure over all prompts; a measure that applies to no prompt is left out. compute: mean
    cost of all responses. per_row: each measure of this process's prompts, NaN where it does not apply. rollouts, rows,
    examples: this process's responses."""

    figures: dict[str, float]
    compute: Compute
    per_row: dict[str, np.ndarray]
    rollouts: list[Rollout]
    rows: list[tuple[SegmentView, ...]]
    examples: list[Any]


def evaluate(
    model: UnifiedModel,
    task: Task,
    sampler: SamplerConfig,
    indices: Sequence[int],
    *,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 128,
    accelerator: Accelerator | None = None,
    trace: bool = False,
    rewards: Sequence[Reward] = (),
) -> Evaluation:
    """Samples one response per prompt of a split; an accelerator divides the prompts among its processes.

    A response's noise depends only on (seed, index): not on the batch size, the processes or earlier training.
    trace: keep the probabilities of every denoising step (`Segment.trace`), for reports. rewards: also report these
    rewards as figures (see `reward_figures`).
    """
    if accelerator is not None:
        indices = indices[accelerator.process_index :: accelerator.num_processes]
    inner = InterleavedSampler(model, sampler, trace=trace)
    rollouts: list[Rollout] = []
    examples = [ready(model, task, task.example(split, i)) for i in indices]
    for start in range(0, len(indices), batch_size):
        part = examples[start : start + batch_size]
        keys = [noise.key(seed, _EVAL, i, 0) for i in indices[start : start + batch_size]]
        rollouts += inner.sample([encode(model, task, e, sampler.guides) for e in part], keys)
    rows = segment_views(model, rollouts, examples)
    per_row = reward_figures(rewards, rows) | task.measure(rows, examples)
    compute = mean_compute(rollouts, accelerator)
    return Evaluation(means(per_row, accelerator), compute, per_row, rollouts, rows, examples)


def reward_figures(rewards: Sequence[Reward], rows: Sequence[tuple[SegmentView, ...]]) -> dict[str, np.ndarray]:
    """Rewards of held-out responses: "reward", the weighted sum, and "reward/<name>"; NaN where there is no value."""
    if not rewards:
        return {}
    table = reward_table(rewards, rows)
    means_BF = table.row_means_BF.numpy()
    total_B = np.nansum(means_BF * np.array(table.weights), axis=1)
    figures = {"reward": np.where(np.isnan(means_BF).all(1), np.nan, total_B)}
    return figures | {f"reward/{name}": means_BF[:, f] for f, name in enumerate(table.names)}


def means(per_row: dict[str, np.ndarray], accelerator: Accelerator | None = None) -> dict[str, float]:
    """Mean of each measure over the rows of all processes, without NaN. A measure without any value is left out:
    `image_exact` of responses without pictures is not 0. A measure that one process lacks counts as NaN there."""
    parts = everybody(per_row, accelerator)
    names = dict.fromkeys(name for part in parts for name in part)
    columns = {name: np.concatenate([part[name] for part in parts if name in part]) for name in names}
    return {name: float(np.nanmean(v)) for name, v in columns.items() if np.isfinite(v).any()}


def mean_compute(rollouts: Sequence[Rollout], accelerator: Accelerator | None = None) -> Compute:
    """Mean cost of a rollout, over all processes."""
    parts = everybody((sum((r.compute for r in rollouts), Compute()), len(rollouts)), accelerator)
    return sum((c for c, _ in parts), Compute()).scaled(1 / max(sum(n for _, n in parts), 1))


def step_figures(task: Task, experience: Experience, accelerator: Accelerator) -> dict[str, float]:
    """The task's measures of a step's rollouts, shares of stop reasons, and mean cost, over all processes."""
    per_row = task.measure(experience.rows, experience.examples)
    for stop in Stop:
        per_row[f"stop/{stop.name.lower()}"] = np.array([r.stop is stop for r in experience.rollouts], float)
    cost = mean_compute(experience.rollouts, accelerator)
    phases = {f"compute/{p}/{kind}": getattr(c, kind) for p, c in cost.items() for kind in ("token_forwards", "flops")}
    total = {f"compute/total/{kind}": value for kind, value in cost.total.to_dict().items()}
    return means(per_row, accelerator) | phases | total
