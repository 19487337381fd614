"""Rollouts to report on: sampled ones of the tests' model, and demonstrations dressed as rollouts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from unidiff import noise, supervised
from unidiff.grpo.experience import segment_views
from unidiff.grpo.rollout_file import RolloutBatch, fingerprint, router_settings
from unidiff.model import UnifiedModel
from unidiff.rewards.router import RewardRouter, Routed
from unidiff.rewards.segment_view import SegmentView
from unidiff.rewards.table import RewardTable, reward_table
from unidiff.sampling.compute import Compute, Cost
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Interleaved
from unidiff.tasks import FrozenLake


@dataclass
class Batch:
    """B rollouts with their views and what they earned, in groups of `group`."""

    rollouts: list[Rollout]
    rows: list[tuple[SegmentView, ...]]
    table: RewardTable
    routed: Routed

    @classmethod
    def of(cls, model: UnifiedModel, task: FrozenLake, rollouts: list[Rollout], examples: list, group: int) -> Batch:
        rows = segment_views(model, rollouts, examples)
        table = reward_table(task.rewards(), rows)
        return cls(rollouts, rows, table, RewardRouter().route(table, torch.arange(len(rollouts)) // group))


@pytest.fixture(scope="session")
def sampled(model: UnifiedModel, task: FrozenLake) -> Batch:
    """16 rollouts of two prompts; some of them reach a picture."""
    sampler = InterleavedSampler(model, SamplerConfig(edit="random", image_steps=4, max_rounds=2))
    examples = [task.example("dev", i) for i in range(2)]
    keys = [noise.key(0, 0, p, s) for p in range(2) for s in range(8)]
    rollouts = sampler.sample([model.encode(e.prompt) for e in examples], keys)
    return Batch.of(model, task, rollouts, [e for e in examples for _ in range(8)], 8)


@pytest.fixture(scope="session")
def demonstrated(model: UnifiedModel, task: FrozenLake) -> Batch:
    """16 demonstrations with made-up step maps: legal moves, exact pictures, some answers at the goal."""
    rollouts = [_as_rollout(row, i) for i, row in enumerate(supervised.corpus(model, task, range(16), "dev"))]
    return Batch.of(model, task, rollouts, [task.example("dev", i) for i in range(16)], 4)


def _as_rollout(row: Interleaved, key: int) -> Rollout:
    segments = []
    for segment in row:
        n = len(segment)
        edited = torch.ones(n, dtype=torch.bool) if segment.edited is None else segment.edited
        step = torch.where(edited, torch.arange(n) % 3, -1).int()
        probability = torch.where(edited, torch.linspace(0.2, 1, n), 1.0)
        segments.append(segment if segment.prompt else replace(segment, step=step, probability=probability))
    cost = Compute(text=Cost(8, 40, 4e6, 0.5), image=Cost(4, 64, 8e6, 0.25))
    return Rollout(Interleaved(segments), Stop.ANSWERED, cost, key, SamplerConfig())


@pytest.fixture(scope="session")
def traced(model: UnifiedModel, task: FrozenLake) -> RolloutBatch:
    """8 rollouts of two prompts, judged and routed, whose edits take 3 steps each, with a trace of every step."""
    settings = SamplerConfig(edit="random", edit_share=0.5, image_steps=6, max_rounds=2)
    sampler = InterleavedSampler(model, settings, trace=True)
    examples = [task.example("dev", i) for i in range(2)]
    keys = [noise.key(3, p, s) for p in range(2) for s in range(4)]
    rollouts = sampler.sample([model.encode(e.prompt) for e in examples], keys)
    made = Batch.of(model, task, rollouts, [e for e in examples for _ in range(4)], 4)
    titles = [f"board {i // 4}" for i in range(8)]
    batch = RolloutBatch(rollouts, titles, torch.arange(8) // 4, fingerprint(model), table=made.table)
    batch.routed, batch.router = made.routed, router_settings(RewardRouter())
    assert any(len(r.segments) > 1 for r in rollouts), "no rollout has a picture: choose another seed"
    return batch
