"""Evaluates a model on several tasks, beside responses that are known: one table.

    python tools/suite.py                                                   # FrozenLake, with the base model
    python tools/suite.py --tasks maze,sokoban,jigsaw --model outputs/base-puzzles
    python tools/suite.py --tasks frozen_lake --rows oracle,random          # without sampling

Rows of a task: oracle (its right response), demonstrator (what a base is trained on), random (legal moves by chance,
with the right pictures), and the model's responses, greedy and sampled, over the same prompts. The figures that at
least half of the tasks have are the columns. OUTPUT gets suite.json with all figures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unidiff import UnifiedModel
from unidiff.command_line import parse
from unidiff.config import FilePath, setting
from unidiff.files import write_json
from unidiff.grpo.evaluation import evaluate, means
from unidiff.grpo.experience import segment_views
from unidiff.program import run_program
from unidiff.tasks import Task, resolve
from unidiff.tasks.encode import encode, ready
from unidiff.tasks.validate import as_rollout

BASE = Path(__file__).resolve().parent.parent / "recipes" / "base"
KNOWN = {"oracle": "best", "demonstrator": "demonstration", "random": "random_walk"}  # row -> method of a task
SAMPLED = ("greedy", "sampled")


@dataclass(frozen=True)
class Config:
    """The tasks, the rows and the model."""

    tasks: tuple[str, ...] = setting("", ("frozen_lake",), "names, files or modules, as in --task of a recipe")
    rows: tuple[str, ...] = setting("", (*KNOWN, *SAMPLED), "oracle, demonstrator, random, greedy, sampled")
    model: FilePath = setting("", str(BASE), "checkpoint folder or hub name")
    family: str | None = setting("", None, "of the model, where its config does not tell")
    split: str = setting("", "test", "of the tasks")
    count: int = setting("", 128, "prompts of each task")
    seed: int = setting("", 0, "of the sampled row")
    device: str = setting("", "cpu", "of the model")
    output: FilePath = setting("", "outputs/suite", "folder of suite.json")

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}; it must be at least 1")
        if unknown := [row for row in self.rows if row not in (*KNOWN, *SAMPLED)]:
            raise ValueError(f"rows: {unknown[0]!r} is not known; choose from {', '.join((*KNOWN, *SAMPLED))}")


def main() -> None:
    config = parse(Config, description=__doc__ or "")
    try:
        model = UnifiedModel.from_pretrained(config.model, config.family, device=config.device)
        found = {}
        for name in config.tasks:
            task = resolve(name)
            task.check()
            found[name] = figures(model, task.fitted(model), config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(found))
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "suite.json", found)
    print(f"all figures: {folder / 'suite.json'}")


def figures(model: UnifiedModel, task: Task, config: Config) -> dict[str, dict[str, float]]:
    """Each row's figures by name, without rows that the task does not support."""
    indices = range(min(config.count, task.length(config.split) or config.count))
    found: dict[str, dict[str, float]] = {}
    for row in config.rows:
        respond: Callable[[Any], Any] | None = getattr(task, KNOWN[row], None) if row in KNOWN else None
        if row in SAMPLED:
            sampler = model.spec.sampler_config(greedy=row == "greedy")
            found[row] = evaluate(model, task, sampler, indices, split=config.split, seed=config.seed).figures
        elif respond is not None and respond(task.example(config.split, 0)) is not None:
            found[row] = known(model, task, config.split, indices, respond)
    return found


@torch.no_grad()
def known(
    model: UnifiedModel, task: Task, split: str, indices: Sequence[int], respond: Callable[[Any], Any]
) -> dict[str, float]:
    """Figures of given responses, with pictures encoded and decoded by the model's image tokenizer."""
    examples = [ready(model, task, task.example(split, i)) for i in indices]
    rollouts = [as_rollout(model, encode(model, task, e), respond(e)) for e in examples]
    return means(task.measure(segment_views(model, rollouts, examples), examples))


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """A Markdown table, in percent: one line per task and row, one column per figure of at least half of the tasks."""
    counts: dict[str, int] = {}
    for rows in found.values():
        for name in dict.fromkeys(name for row in rows.values() for name in row):
            counts[name] = counts.get(name, 0) + 1
    columns = [name for name, count in counts.items() if 2 * count >= len(found)][:8]
    lines = [" | ".join(["| task", "row", *columns]) + " |", "|---" * (2 + len(columns)) + "|"]
    for task, rows in found.items():
        for row, values in rows.items():
            cells = [f"{100 * values[c]:.1f} %" if c in values else "–" for c in columns]
            lines.append(" | ".join([f"| {task}", row, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
