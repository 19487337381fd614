"""Several tasks at once. Each task's rewards and figures apply to its own rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from unidiff.rewards.names import as_rewards
from unidiff.rewards.reward import Reward
from unidiff.sequence import Locate
from unidiff.tasks.task import Example, Place, Responses, Task, check_task

_PATTERN = 1000  # maximum length of the pattern of tasks


def mix(weights: Sequence[float] | None = None, **tasks: Task) -> Mix:
    """Mixes named tasks in proportion to weights: `mix(math=a, lake=FrozenLake(), weights=[2, 1])`.

    Rewards and figures are named "math/…" and see only rows of that task. Raises TypeError for anything but a task,
    ValueError for weights that do not fit.
    """
    return Mix(tasks, weights)


class Mix(Task):
    """See `mix`. Training prompts follow a fixed pattern, in which every task has its share."""

    def __init__(self, tasks: dict[str, Task], weights: Sequence[float] | None = None) -> None:
        self.tasks = {name: check_task(task) for name, task in tasks.items()}
        if not self.tasks:
            raise ValueError("mix needs at least one task: mix(math=…, lake=…)")
        given = [1.0] * len(tasks) if weights is None else [float(w) for w in weights]
        if len(given) != len(tasks) or not all(math.isfinite(w) and w > 0 for w in given):
            raise ValueError(f"weights is {weights!r}; give one number above 0 for each of the {len(tasks)} tasks")
        self.weights, self.pattern = given, _pattern(given)
        own = (figure for name, task in self.tasks.items() for figure in _headline(name, task))
        self.headline = ("success", *own)

    def of(self, example: Any) -> Task:
        name, _, rest = example.kind.partition("/")
        inner = dataclasses.replace(example, kind=rest)
        return self.tasks[name].of(inner)

    def length(self, split: str) -> int | None:
        """The number of prompts before one of the tasks runs out."""
        sizes = []
        for k, task in enumerate(self.tasks.values()):
            if (own := task.length(split)) is not None:
                rounds, rest = divmod(own, self.pattern.count(k))
                places = [i for i, which in enumerate(self.pattern) if which == k]
                sizes.append(rounds * len(self.pattern) + places[rest])
        return min(sizes) if sizes else None

    def example(self, split: str, index: int) -> Example:
        name, own = self._place(index)
        return self._named(name, self.tasks[name].example(split, own))

    def training_example(self, place: Place) -> Example:
        name, own = self._place(place.number)
        return self._named(name, self.tasks[name].training_example(dataclasses.replace(place, number=own)))

    def _place(self, index: int) -> tuple[str, int]:
        """The task of the index-th prompt, and the prompt's index in that task."""
        rounds, at = divmod(index, len(self.pattern))
        k = self.pattern[at]
        return list(self.tasks)[k], rounds * self.pattern.count(k) + self.pattern[:at].count(k)

    def _named(self, name: str, example: Any) -> Any:
        kind = f"{name}/{example.kind}" if example.kind else name
        return dataclasses.replace(example, kind=kind, title=f"{name}: {example.title}" if example.title else name)

    def rewards(self) -> list[Reward]:
        return [
            dataclasses.replace(one, name=f"{name}/{one.name}", kind=f"{name}/{one.kind}".rstrip("/"))
            for name, task in self.tasks.items()
            for one in as_rewards(task.rewards())
        ]

    def locate(self, example: Any) -> Locate | None:
        return self.of(example).locate(example)

    def measure(self, rows: Responses, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        figures: dict[str, np.ndarray] = {"success": np.full(len(examples), np.nan)}
        for name, task in self.tasks.items():
            at = [i for i, e in enumerate(examples) if e.kind.partition("/")[0] == name]
            if not at:
                continue
            for figure, values in task.measure([rows[i] for i in at], [examples[i] for i in at]).items():
                figures[f"{name}/{figure}"] = whole = np.full(len(examples), np.nan)
                whole[at] = values
                if figure == "success":
                    figures[figure][at] = values
        return figures

    def demonstration(self, example: Any, attempt: int = 0) -> Any:
        return self.of(example).demonstration(example, attempt)

    def best(self, example: Any) -> Any:
        return self.of(example).best(example)

    def fitted(self, model: Any) -> Mix:
        return Mix({name: task.fitted(model) for name, task in self.tasks.items()}, self.weights)

    def check(self) -> None:
        for task in self.tasks.values():
            task.check()


def _headline(name: str, task: Task) -> list[str]:
    """A task's headline figures, prefixed with its name. "reward" is replaced by the task's individual rewards."""
    figures: list[str] = []
    for one in task.headline:
        own = [r.name for r in as_rewards(task.rewards())] if one == "reward" else []
        figures += [f"reward/{name}/{each}" for each in own] if own else [f"{name}/{one}"]
    return figures


def _pattern(weights: Sequence[float]) -> list[int]:
    """The order of tasks: the shortest pattern in which each task's share is within 1 % of its weight, evenly
    spread."""
    shares = [w / sum(weights) for w in weights]
    for length in range(len(shares), _PATTERN + 1):
        counts = [round(share * length) for share in shares]
        near = all(abs(n / length - share) <= 0.01 * share for n, share in zip(counts, shares))
        if sum(counts) == length and min(counts) > 0 and near:
            break
    else:
        raise ValueError(f"weights {list(weights)} are too far apart; the smallest needs a thousandth of the sum")
    due = [((i + 0.5) / n, k) for k, n in enumerate(counts) for i in range(n)]
    return [k for _, k in sorted(due)]
