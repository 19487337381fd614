"""The task interface: examples, the kind of response, rewards and held-out figures."""

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

ELSEWHERE = 1_000_003  # offset from an example's index to that of another example, for `Task.simulate`
Responses = Sequence[tuple[SegmentView, ...]]  # the sampled segments of each response


@dataclass(frozen=True)
class Example:
    """One prompt.

    prompt: texts, PIL images and picture files in order. columns: further data for reward functions, by name. title:
    its name in reports. kind: its kind, if rewards differ by kind. region: a mask for edits, mode "L", of the size of
    the prompt's last picture; nonzero = may be edited; None = the task's `region`. system: the system message; None =
    the task's.
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
    """The base of all tasks. Everything except `example` has a default.

    writes: what a response consists of (`unidiff.sequence.Writes`). system: the system message; None = the family's
    own. room: tokens of the canvas of a text; None = the model's `text_length`. prepare: the family's rule for pictures
    in prompts ("default", "understand", "document"); None = they already fit the model. headline: the held-out figures
    that reports show first; the first one is the run's headline. decoding: "greedy" or "sampled", the responses that
    the headline is measured on.
    """

    writes: Writes = "interleaved"
    system: str | None = None
    room: int | None = None
    prepare: str | None = "default"
    headline: tuple[str, ...] = ("reward",)
    decoding: Literal["greedy", "sampled"] = "greedy"

    def length(self, split: str) -> int | None:
        """The number of examples of a split; None = unlimited. Raises ValueError for an unknown split."""
        return None

    def example(self, split: str, index: int) -> Example:
        """The index-th example of a split ("train", "test", …). It must be deterministic."""
        raise NotImplementedError(f"{type(self).__name__} has no `example`; a task needs one")

    def rewards(self) -> Sequence[Reward | Callable[..., Any] | str]:
        """The default rewards of a run."""
        return ()

    def region(self, text: str, grid: tuple[int, int]) -> Any:
        """[rows, columns] bool: the image tokens that a text names, for edit="region"; None = none. If a task does not
        override it, the tokens to edit are chosen by confidence."""
        return None

    def measure(self, rows: Responses, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Held-out figures of responses besides rewards, one value per row (NaN where it does not apply). The figure
        "success" says whether a response is right."""
        return {}

    def demonstration(self, example: Any, attempt: int = 0) -> list[str | Image.Image] | None:
        """A response to imitate (texts and pictures), for supervised training; None = none."""
        return None

    def best(self, example: Any) -> list[str | Image.Image] | None:
        """A correct response; None = unknown."""
        return None

    def simulate(self, example: Any, texts: Sequence[str], other: bool = False) -> Image.Image:
        """The correct picture after the texts of an interleaved response so far; `SamplerConfig.picture_source` can use
        it instead of the model's own. other: a picture of another example, after the same number of texts."""
        raise NotImplementedError(f"{type(self).__name__} has no `simulate`")

    # ------------------------------------------------- rarely overridden

    def fitted(self, model: UnifiedModel) -> Task:
        """The task adapted to a model, for example with pictures of the model's size. Raises ValueError if the model
        cannot do it."""
        return self

    def of(self, example: Any) -> Task:
        """The task of an example: this task, or for a mix the part that it comes from."""
        return self

    def training_example(self, place: Place) -> Any:
        """A training prompt of a run. A finite split is shuffled anew in every epoch."""
        size = self.length("train")
        return self.example("train", endless(place) if size is None else permuted(place, size))

    def locate(self, example: Any) -> Locate | None:
        """A function that finds the region a text names, for edits of an example; None = choose by confidence."""
        return None if type(self).region is Task.region else self.region

    def check(self) -> None:
        """Raises ValueError, with file, row and column, for unusable data. A run calls it before it loads a model."""


def check_task(task: Any) -> Task:
    """Raises TypeError for anything but a task."""
    if not isinstance(task, Task):
        raise TypeError(f"task is a {type(task).__name__}; it must be a unidiff.tasks.Task: subclass it")
    return task
