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

from dataclasses import dataclass
from pathlib import Path

from unidiff.config import FilePath, setting
from unidiff.program import run_program
from unidiff.run import RunConfig, run_recipe
from unidiff.tasks import Task, resolve

ROOT = Path(__file__).resolve().parent
BOARDS = {"board_size": 4, "tile": None, "pictures": True}


@dataclass(frozen=True)
class Config(RunConfig):
    """A run on FrozenLake, unless `task` names another task."""

    model: FilePath = setting(
        "run", str(ROOT / "base"), "checkpoint folder or hub name, of any family (docs/families.md)"
    )
    task: str | None = setting(
        "data",
        "frozen_lake",
        "a name, data.jsonl, file.py:name or package.module:name; several with commas (docs/tasks.md)",
    )
    board_size: int = setting("data", 4, "cells of a board's side")
    tile: int | None = setting("data", None, "pixels of a cell's side; none = the board fills the model's picture")
    pictures: bool = setting(
        "data", True, "false = responses are one text, for a model of text alone or supervised.py --pictures false"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name for name, default in BOARDS.items() if getattr(self, name) != default}
        if self.task == "frozen_lake":
            self.made_task()  # raises now, before the model is loaded, if settings do not fit
        elif given:
            raise ValueError(f"{min(given)} is a setting of frozen_lake, and task is {self.task}")

    def resolved(self) -> Task:
        if self.task != "frozen_lake":
            return super().resolved()
        given = {"size": self.board_size, "tile": self.tile, "pictures": self.pictures, **self.task_options}
        try:
            return resolve("frozen_lake", given)
        except ValueError as error:
            raise ValueError(f"board_{error}" if str(error).startswith("size:") else str(error)) from error


def main() -> None:
    run_recipe(Config, __doc__ or "")


if __name__ == "__main__":
    run_program(main)
