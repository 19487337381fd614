"""Looks at a task before anything is trained on it: prompts, pictures, lengths, and what responses earn.

    python tools/check_task.py --task shapes
    python tools/check_task.py --task data.jsonl --task.prompt "{question}" --rewards numeric_answer
    python tools/check_task.py --task my_tasks.py:jigsaw --model checkpoints/mmada --count 10

Every row of the data is read once. The first few examples are shown as the model reads them, with what the right
response earns, where the task knows it, and what an empty one does. OUTPUT gets page.html with all of it. Ends with
status 1 if something is wrong: data that cannot be used, a right response that has no room or earns no more than an
empty one, a reward without a value.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unidiff import UnifiedModel
from unidiff.command_line import parse
from unidiff.config import FilePath, setting
from unidiff.program import run_program
from unidiff.report.gallery import records
from unidiff.report.page import write_page
from unidiff.rewards.reward import RewardError
from unidiff.sequence import Prompt
from unidiff.tasks import resolve
from unidiff.tasks.validate import validate

BASE = Path(__file__).resolve().parent.parent / "recipes" / "base_tasks"


@dataclass(frozen=True)
class Config:
    """The task, the model, and the number of examples."""

    task: str = setting("", "frozen_lake", "a name, data.jsonl, file.py:name or package.module:name (docs/tasks.md)")
    task_options: dict[str, Any] = setting("", dict, "settings of the task, each as --task.NAME VALUE")
    rewards: tuple[str, ...] | None = setting("", None, "in the place of the task's own, as in a recipe")
    model: FilePath = setting("", str(BASE), "checkpoint folder or hub name: whose tokenizers and template are used")
    family: str | None = setting("", None, "of the model, where its config does not tell")
    split: str = setting("", "train", "of the task")
    count: int = setting("", 5, "examples that are shown")
    output: FilePath = setting("", "outputs/check_task", "folder of the page")

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}; it must be at least 1")


def main() -> int:
    sys.path.append(os.getcwd())  # for a user's own tasks and rewards
    config = parse(Config, description=__doc__ or "")
    try:
        task = resolve(config.task, config.task_options)
        task.check()
        model = UnifiedModel.from_pretrained(config.model, config.family)
        found = validate(model, task, config.split, config.count, config.rewards)
    except (ValueError, TypeError, OSError, ImportError, RewardError) as error:
        sys.exit(f"error: {error}")
    sizes = {split: task.length(split) for split in ("train", "dev", "test") if _has(task, split)}
    print(f"task {config.task}: writes {task.writes!r}; " + ", ".join(f"{k} {_count(n)}" for k, n in sizes.items()))
    shown = None
    for prompt, line in zip(found.prompts, found.lines):
        if prompt is not shown:
            print(f"\n{_read(model, prompt)}")
            shown = prompt
        print(f"  {line}")
    titles = {row: f"{found.batch.titles[row]}: {name}" for row, name in enumerate(found.names)}
    page = write_page(
        Path(config.output) / "page.html",
        title=f"unidiff · task {config.task}",
        summary={"split": config.split, "model": config.model},
        galleries={"examples": records(model, found.batch, titles=titles)},
    )
    print(f"\nlook at {page}")
    for fault in found.faults:
        print(f"wrong: {fault}")
    return int(bool(found.faults))


def _read(model: UnifiedModel, prompt: Prompt) -> str:
    """A prompt as the model reads it."""
    return " ".join(
        str(model.tokenizer.decode(s.tokens)) if s.grid is None else f"[picture of {s.grid[0]} x {s.grid[1]} tokens]"
        for s in prompt.whole
    )


def _has(task: Any, split: str) -> bool:
    try:
        task.length(split)
        task.example(split, 0)
    except ValueError:
        return False
    return True


def _count(length: int | None) -> str:
    return "without end" if length is None else str(length)


if __name__ == "__main__":
    run_program(main)
