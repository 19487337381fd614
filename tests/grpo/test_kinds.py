"""A step of training on each kind of response, from rows of a user's own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.trainer import GRPOTrainer
from unidiff.model import UnifiedModel
from unidiff.rewards.reward import reward
from unidiff.tasks import FrozenLake, Rows, mix


@reward(on="text")
def short(segments, **columns):
    return [-float(len(s.text)) for s in segments]


@reward(on="image")
def redness(segments, **columns):
    return [float(s.pixels[..., 0].mean()) / 255 for s in segments]


def rows(writes: str) -> Rows:
    shown = Image.new("RGBA", (40, 90), (200, 30, 30, 128))  # of another size and mode than the model's
    data = [{"say": "find the goal", "shown": shown, "number": i} for i in range(4)]
    prompt = ["{say}"] if writes in ("text", "image") else ["{shown}", "{say}"]
    rewards = [short] if writes in ("text", "understand") else [redness]
    test = [{**row, "held": True} for row in data[:2]]
    return Rows({"train": data, "test": test}, prompt=prompt, writes=writes, rewards=rewards)  # type: ignore[arg-type]


@pytest.mark.parametrize("writes", ["text", "image", "edit", "understand", "mixed"])
def test_a_step_of_each_kind(model: UnifiedModel, writes: str, tmp_path: Path) -> None:
    task = mix(draw=rows("image"), say=rows("text"), lake=FrozenLake()) if writes == "mixed" else rows(writes)
    settings = {"num_prompts": 3, "num_generations": 4, "max_steps": 2, "eval_size": 3, "quiet": True, "max_rounds": 1}
    config = GRPOConfig(**settings, check_ratio_every=1, num_iterations=2, output_dir=str(tmp_path / "run"))
    trainer = GRPOTrainer(copy.deepcopy(model), task, config)
    history = trainer.train()
    assert max(m["ratio_first_iteration_max_dev"] for m in history) < 2e-5
    assert any(not torch.equal(model.state_dict()[k], v) for k, v in trainer.model.state_dict().items())
    figures = trainer.held_out(("greedy",))["greedy"].figures
    assert set(task.headline) & figures.keys()
