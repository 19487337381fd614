"""Any generator of reasoning-gym (extra `gym`): over a hundred kinds of puzzles, each with its own scorer."""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from unidiff.config import convert, nearest
from unidiff.rewards.reward import Reward, reward
from unidiff.scorers.text import extract
from unidiff.tasks.published.math import ASK_TAG, TAG
from unidiff.tasks.task import Example, Responses, Task

SPLITS = {"train": 0, "dev": 1, "test": 2}


class ReasoningGym(Task):
    """The puzzles of one generator.

    dataset: its name, such as "countdown". size, held_out: number of puzzles in train, and in each of dev and test;
    puzzle i of a data set comes from `seed + i`, so splits do not share seeds. room: tokens of a response. tags: True:
    the prompt asks for the answer in <answer>; False: the whole response is the answer. options: the generator's own
    settings.

    Raises ImportError without the package, ValueError for an unknown generator or setting.
    """

    writes = "text"
    prepare = None
    headline = ("success", "score")

    def __init__(
        self,
        dataset: str,
        seed: int = 0,
        size: int = 20_000,
        held_out: int = 1_000,
        room: int = 256,
        tags: bool = True,
        **options: Any,
    ) -> None:
        self.dataset, self.seed, self.room, self.tags = dataset, seed, room, tags
        self.sizes = {"train": size, "dev": held_out, "test": held_out}
        self.options = _read(dataset, options)
        self._rows("train")  # raises now if a setting is out of range

    @functools.cache  # noqa: B019 - a task lives as long as its run
    def _rows(self, split: str) -> Any:
        import reasoning_gym  # type: ignore[import-not-found]

        begin = self.seed + sum(self.sizes[name] for name in list(self.sizes)[: SPLITS[split]])
        try:
            return reasoning_gym.create_dataset(self.dataset, seed=begin, size=self.sizes[split], **self.options)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"task reasoning_gym, {self.dataset}: {error}") from error

    def length(self, split: str) -> int:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        return self.sizes[split]

    def example(self, split: str, index: int) -> Example:
        if not 0 <= index < self.length(split):
            raise ValueError(f"index {index} of split {split!r}: it has {self.length(split)} puzzles")
        entry = self._rows(split)[index]
        columns = {"entry": entry, "answer": entry["answer"]}
        return Example([ASK_TAG * self.tags + entry["question"]], columns, f"{split} {self.dataset} {index}")

    def rewards(self) -> list[Reward]:
        @reward(on="text")
        def score(segments: Sequence[Any], **columns: Any) -> list[float]:
            """The generator's own score of the answer."""
            return [self.score(s.text or "", s.columns["entry"]) for s in segments]

        return [score]

    def score(self, text: str, entry: dict[str, Any]) -> float:
        """The generator's score of the answer in a response, 0 to 1."""
        answer = extract(text, TAG if self.tags else None)
        return 0.0 if answer is None else float(self._rows("train").score_answer(answer.strip(), entry))

    def measure(self, rows: Responses, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        scores = np.array([self.score(row[-1].text or "", e.columns["entry"]) for row, e in zip(rows, examples)])
        return {"success": (scores >= 1.0).astype(float), "score": scores}

    def best(self, example: Example) -> list[Any]:
        answer = str(example.columns["answer"])
        return [f"<answer>{answer}</answer>" if self.tags else answer]


def _read(dataset: str, options: dict[str, Any]) -> dict[str, Any]:
    """The generator's settings; texts are converted to the generator's types."""
    try:
        from reasoning_gym.factory import DATASETS  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError('reasoning_gym needs its package: pip install "unidiff[gym]"') from error
    if dataset not in DATASETS:
        raise ValueError(f"dataset is {dataset!r}; reasoning-gym has no such generator{nearest(dataset, DATASETS)}")
    hints = typing.get_type_hints(DATASETS[dataset][1])
    for name in options:
        if name not in hints:
            raise ValueError(f"{dataset} has no setting {name!r}{nearest(name, hints)}")
    return {k: convert(v, hints[k], f"task.{k}") if isinstance(v, str) else v for k, v in options.items()}
