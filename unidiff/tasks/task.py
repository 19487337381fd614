"""What the trainer needs of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from unidiff.rewards.reward import Reward
from unidiff.rewards.segment_view import SegmentView


class Task(Protocol):
    """What the trainer needs of a task. An example has `.prompt` (texts and PIL images) and `.columns` (a dict)."""

    def example(self, split: str, index: int) -> Any:
        """The example at a place of a split ("train", "dev", "test"), always the same one."""
        ...

    def rewards(self) -> Sequence[Reward]:
        """The rewards that a run uses unless it is given others."""
        ...

    def region(self, text: str, grid: tuple[int, int]) -> np.ndarray | None:
        """[rows, columns] bool: the image tokens that a text names, for edit="region"."""
        ...

    def measure(self, rows: Sequence[tuple[SegmentView, ...]], examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Held-out figures of responses, one value a row (NaN where it does not apply)."""
        ...
