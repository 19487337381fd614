"""What a task is: examples, what a response to them consists of, rewards and held-out figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from unidiff.rewards.reward import Reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.sequence import Locate, Writes
from unidiff.tasks.order import endless, permuted

if TYPE_CHECKING:
    from unidiff.model import UnifiedModel

ELSEWHERE = 1_000_003  # from an example's index to that of another one, for `Task.simulate`
Responses = Sequence[tuple[SegmentView, ...]]  # the sampled segments of each


@dataclass(frozen=True)
class Example:
    """One prompt.

    prompt: texts, PIL images and picture files in order. columns: what reward functions get beside the response, by
    name. title: names it in reports. kind: which rows it is one of, where rewards differ by kind. region: a picture of
    mode "L", the size of the prompt's last picture, in which what is not 0 may be edited; None = the task's way.
    system: what the system says; None = the task's words.
    """

    prompt: Sequence[str | Image.Image | Path] = field(repr=False)
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False)
    title: str = ""
    kind: str = ""
    region: Image.Image | None = field(default=None, repr=False)
    system: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Place:
    """The place of a training prompt in a run: the `prompt`-th of a step, the `number`-th of the whole run."""

    seed: int
    step: int
    prompt: int
    number: int


class Task:
    """What a run trains on. Everything but `example` has a default.

    writes: what a response consists of (`unidiff.sequence.Writes`). system: what the system says; None = the family's
    own words. room: tokens of the canvas of a text; None = the model's `text_length`. prepare: the family's rule by
    which pictures of prompts are prepared ("default", "understand", "document"); None = they are as the model takes
    them. headline: the held-out figures that reports lead with; the first is the run's headline. decoding: of the
    responses that the headline is of, "greedy" or "sampled".
    """

    writes: Writes = "interleaved"
    system: str | None = None
    room: int | None = None
    prepare: str | None = "default"
    headline: tuple[str, ...] = ("reward",)
    decoding: Literal["greedy", "sampled"] = "greedy"

    def length(self, split: str) -> int | None:
        """How many examples a split has; None = any number. Raises ValueError for a split that does not exist."""
        return None

    def example(self, split: str, index: int) -> Example:
        """The example at a place of a split ("train", "test", …), always the same one."""
        raise NotImplementedError(f"{type(self).__name__} has no `example`; a task needs one")

    def rewards(self) -> Sequence[Reward | Callable[..., Any] | str]:
        """The rewards that a run uses unless it is given others."""
        return ()

    def region(self, text: str, grid: tuple[int, int]) -> Any:
        """[rows, columns] bool: the image tokens that a text names, for edit="region"; None = none. A task that does
        not override it has edits chosen by confidence."""
        return None

    def measure(self, rows: Responses, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Held-out figures of responses beside their rewards, one value a row (NaN where it does not apply). One named
        "success" says which responses are right."""
        return {}

    def demonstration(self, example: Any, attempt: int = 0) -> list[str | Image.Image] | None:
        """A response to imitate (texts and pictures), for supervised training; None = there is none."""
        return None

    def best(self, example: Any) -> list[str | Image.Image] | None:
        """The right response; None = it is not known."""
        return None

    def simulate(self, example: Any, texts: Sequence[str], other: bool = False) -> Image.Image:
        """The picture that is right after the texts of an interleaved response so far. `SamplerConfig.picture_source`
        can put it in the place of the model's own. other: one of another example, after as many texts."""
        raise NotImplementedError(f"{type(self).__name__} has no `simulate`")

    # ------------------------------------------------- rarely overridden

    def fitted(self, model: UnifiedModel) -> Task:
        """The task as a run of this model takes it, such as with pictures of its size. Raises ValueError for a model
        that cannot do it."""
        return self

    def of(self, example: Any) -> Task:
        """The task that an example is of: this one, unless it is made of several."""
        return self

    def training_example(self, place: Place) -> Any:
        """A training prompt of a run. Every example of a finite split comes once an epoch, in an order of its own."""
        size = self.length("train")
        return self.example("train", endless(place) if size is None else permuted(place, size))

    def locate(self, example: Any) -> Locate | None:
        """Finds the place that a text names, for edits of an example; None = edits are chosen by confidence."""
        return None if type(self).region is Task.region else self.region

    def check(self) -> None:
        """Raises ValueError, with file, row and column, for data that cannot be used. A run calls it before it loads
        anything."""


def check_task(task: Any) -> Task:
    """Raises TypeError for anything but a task."""
    if not isinstance(task, Task):
        raise TypeError(f"task is a {type(task).__name__}; it must be a unidiff.tasks.Task: subclass it")
    return task
