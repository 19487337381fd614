"""GRPO on interleaved visual-textual reasoning: the main job.

    accelerate launch recipes/interleaved_reasoning.py                                # minutes, on 2 CPU cores
    accelerate launch recipes/interleaved_reasoning.py --assignment joint --seed 1 --output_dir outputs/joint
    accelerate launch recipes/interleaved_reasoning.py --config recipes/configs/frozen_lake.yaml --max_steps 0
    accelerate launch recipes/interleaved_reasoning.py --config recipes/configs/mmada.yaml --model checkpoints/mmada

The model reads a question and a picture of a frozen lake. It answers in rounds of a sentence that names a move and a
picture of the board after it, then lists its moves. Each new picture starts as a copy of the one before; only the
tokens of the cells that the sentence names are denoised again. Rewards judge every sentence and every picture where it
stands, and the router sends each to the tokens that earned it.

--help lists the settings. OUTPUT_DIR gets summary.json, metrics.jsonl, curves.png, report.html, rollouts, checkpoints,
the model. What a step was trained on, edit by edit:

    python tools/edit_rollout.py --rollouts outputs/run/rollouts/step-000040.safetensors

A run that was stopped or killed goes on with --resume --output_dir OUTPUT_DIR, with the settings that it had; one that
is finished, with a larger --max_steps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from unidiff import UnifiedModel
from unidiff.config import FilePath, setting
from unidiff.program import run_program
from unidiff.rewards.names import as_rewards
from unidiff.run import RunConfig, run_recipe
from unidiff.tasks import FrozenLake

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config(RunConfig):
    """A run on FrozenLake."""

    model: FilePath = setting(
        "run", str(ROOT / "base"), "checkpoint folder or hub name, of any family (docs/families.md)"
    )
    board_size: int = setting("data", 4, "cells of a board's side")
    tile: int | None = setting("data", None, "pixels of a cell's side; none = the board fills the model's picture")
    pictures: bool = setting(
        "data", True, "false = responses are one text, for a model of text alone or supervised.py --pictures false"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # What cannot be used is an error now, not after the model is loaded.
        as_rewards(self.rewards or (), self.task.rewards())

    @property
    def task(self) -> FrozenLake:
        """The task, as far as it does not depend on the model. Raises ValueError with the setting's name."""
        try:
            task = FrozenLake(size=self.board_size, pictures=self.pictures)
            return task if self.tile is None else dataclasses.replace(task, tile=self.tile)
        except ValueError as error:
            raise ValueError(f"board_{error}" if str(error).startswith("size:") else str(error)) from error


def task_for(model: UnifiedModel, config: Config) -> FrozenLake:
    """FrozenLake with boards that fill the model's picture, unless `tile` says otherwise."""
    task, images = config.task, model.images
    if images is None:
        if config.pictures:
            raise ValueError(f"family {model.spec.family} is one of text alone; set --pictures false")
        return dataclasses.replace(task, board="text")
    if config.tile is not None:
        return task
    height, width = (n * images.factor for n in model.spec.image_grid)
    if height != width or height % task.size:
        raise ValueError(
            f"board_size is {task.size}, but so many cells do not fill the model's picture of {height} x {width} "
            "pixels; choose another, or give the pixels of a cell's side (--tile)"
        )
    return dataclasses.replace(task, tile=height // task.size)


def main() -> None:
    run_recipe(Config, task_for, __doc__ or "")


if __name__ == "__main__":
    run_program(main)
