"""Fixtures: a trainer on the tiny model, small enough that a step takes a tenth of a second."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # results are compared bit by bit

import pytest
import torch
from torch import Tensor

from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.trainer import GRPOTrainer
from unidiff.model import UnifiedModel
from unidiff.rewards.reward import Reward, reward
from unidiff.tasks import FrozenLake

TINY: dict[str, Any] = {
    "num_prompts": 2,
    "num_generations": 3,
    "max_rounds": 2,
    "text_steps": 3,
    "text_threshold": None,
    "image_steps": 3,
    "edit": "random",  # the tiny model's texts name no cells
    "edit_share": 0.2,
    "micro_batch_size": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "lr_schedule": "constant",
    "max_steps": 2,
    "save_steps": 0,
    "eval_size": 2,
    "check_ratio_every": 1,
    "quiet": True,
}


@reward(on="text", weight=0.5)
def short_words(segments, **columns):
    """Some number that differs from text to text."""
    return [float(s.tokens.sum() % 7) / 6 for s in segments]


@reward(on="image")
def bright(segments, **columns):
    """Some number that differs from picture to picture."""
    return [float(s.pixels.mean()) / 255 for s in segments]


REWARDS = (short_words, bright)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_trainer(model: UnifiedModel, task: FrozenLake, tmp_path) -> Callable[..., GRPOTrainer]:
    """make_trainer(rewards, **settings) -> a trainer of a fresh copy of the tiny model. dtype: see `exact`."""

    def make(
        rewards=REWARDS,
        *,
        policy: UnifiedModel | None = None,
        options: Any = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ):
        config = GRPOConfig(**{"output_dir": str(tmp_path / "run"), **TINY, **settings})
        policy = policy or copy.deepcopy(model)
        return GRPOTrainer(policy if dtype is None else policy.to(dtype), task, config, rewards, **(options or {}))

    return make


@pytest.fixture(scope="session")
def rewards() -> tuple[Reward, Reward]:
    """One for texts and one for pictures: what `make_trainer` uses unless it is told otherwise."""
    return REWARDS


@pytest.fixture(scope="session")
def weights() -> Callable[[GRPOTrainer], dict[str, Tensor]]:
    """weights(trainer) -> a copy of its parameters by name."""
    return lambda trainer: {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


@pytest.fixture(scope="session")
def difference() -> Callable[[dict[str, Tensor], dict[str, Tensor]], float]:
    """difference(weights, weights) -> the largest one between two of a name."""

    def largest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
        assert first.keys() == second.keys()
        return max(float((first[k] - second[k]).abs().max()) for k in first)

    return largest


@pytest.fixture(scope="session")
def exact() -> torch.dtype:
    """The dtype of runs that sum in other orders (other micro-batches, processes, threads) and are compared.

    In float32 the noise of such sums is 1e-7 of a gradient's norm. AdamW divides each weight's gradient by its own
    size plus 1e-8, so where a gradient is mostly noise the weight may move by a whole learning rate the other way. In
    float64 the noise is 1e-16 of the norm, far below that 1e-8.
    """
    return torch.float64


@pytest.fixture(scope="session")
def same_metrics(timeless: Callable[[dict[str, float]], dict[str, float]]) -> Callable[..., None]:
    """same_metrics(one, other): asserts that two steps of `exact` runs agree in every metric but seconds: to the sixth
    and last digit that is written, and both ratios to float32 noise."""

    def compare(one: dict[str, float], other: dict[str, float]) -> None:
        noise = "ratio_first_iteration_max_dev"
        first, second = timeless(one), timeless(other)
        assert first.keys() == second.keys()
        assert max(m.pop(noise, 0.0) for m in (first, second)) < 1e-5
        assert second == pytest.approx(first, rel=1e-5, abs=1e-12)

    return compare


@pytest.fixture(scope="session")
def timeless() -> Callable[[dict[str, float]], dict[str, float]]:
    """timeless(metrics) -> metrics without seconds, which no two runs share."""
    return lambda metrics: {k: v for k, v in metrics.items() if "seconds" not in k}
