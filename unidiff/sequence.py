"""Interleaved sequences of text and image tokens. Data only.

`Segment` is one run of tokens of one modality, `Interleaved` a tuple of segments.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import BoolTensor, FloatTensor, IntTensor, LongTensor, Tensor

if TYPE_CHECKING:
    from unidiff.schedules.schedule import Choices


# What a response consists of, in the order of Kind: one text; a picture; an edit of the prompt's last picture; a text
# about pictures; or rounds of text and picture until the model answers. A tuple is a fixed plan: ("image", "text").
Kind = Literal["text", "image", "edit", "understand", "interleaved"]
KINDS = get_args(Kind)
Writes = Kind | tuple[Kind, ...]

# Finds the region that a text names: (text, grid) -> bool [rows, columns], or None if the text names no region.
Locate = Callable[[str, tuple[int, int]], Any]


class Modality(IntEnum):
    """The modality of a token. In `Tokens.modality` a pad is -1."""

    TEXT = 0
    IMAGE = 1


@dataclass(frozen=True, eq=False)
class Segment:
    """One run of tokens of one modality.

    tokens: [n] int64 ids in the model's vocabulary, without delimiters or row separators. A sampled text includes
    its end token. grid: rows and columns of an image, n == rows * columns. edited: [n] bool, the tokens of a sampled
    image that were denoised again; the others are copied from the image before. None = every token was sampled.
    step: [n] int32, the denoising step that committed each token, -1 = copied. probability: [n] float32 of each token
    when it was committed (1 where copied). trace: [T, n] float32, for each of T steps the probability of the token
    drawn at each position that was still masked (in a text: in the current block), NaN elsewhere; None = not recorded.
    warmth: [n] float32, a schedule's factor on the temperature of each token; None = 1. choices: what a schedule
    did in each step; None = no schedule. room: tokens of the canvas in which a text was sampled;
    None = `ModelSpec.text_length`. behind: ids that the family's template puts after the segment; they are visible
    while the segment is sampled.
    """

    modality: Modality
    tokens: LongTensor
    prompt: bool = False
    grid: tuple[int, int] | None = None
    edited: BoolTensor | None = None
    step: IntTensor | None = None
    probability: FloatTensor | None = None
    trace: FloatTensor | None = None
    warmth: FloatTensor | None = None
    choices: Choices | None = None
    room: int | None = None
    behind: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = self.tokens.numel()
        if self.modality is Modality.IMAGE and (self.grid is None or self.grid[0] * self.grid[1] != n):
            raise ValueError(f"Segment.grid is {self.grid}, but an image of {n} tokens needs rows * columns == {n}")
        for name in ("edited", "step", "probability", "warmth"):
            value = getattr(self, name)
            if value is not None and value.numel() != n:
                raise ValueError(f"Segment.{name} has {value.numel()} values for {n} tokens")
        if self.trace is not None and self.trace.shape[1:] != (n,):
            raise ValueError(f"Segment.trace is {list(self.trace.shape)}, expected [steps, {n}]")

    def __len__(self) -> int:
        return self.tokens.numel()

    @property
    def sampled(self) -> Tensor:
        """[n] bool: tokens that the policy sampled."""
        if self.prompt:
            return torch.zeros(len(self), dtype=torch.bool)
        return torch.ones(len(self), dtype=torch.bool) if self.edited is None else self.edited.bool()

    def __repr__(self) -> str:
        shape = f"{self.grid[0]}×{self.grid[1]}" if self.grid else str(len(self))
        edit = f", {int(self.edited.sum())} edited" if self.edited is not None else ""
        return f"{'prompt ' if self.prompt else ''}{self.modality.name.lower()}[{shape}{edit}]"


def check_parts(parts: Any, what: str = "prompt", *kinds: type) -> None:
    """Raises TypeError unless `parts` is a list or tuple of these kinds (default: texts and PIL images). A single text
    instead of a list would be read letter by letter."""
    if not kinds:
        from PIL.Image import Image

        kinds = (str, Image)
    names = " or ".join(kind.__name__ for kind in kinds)
    if not isinstance(parts, (list, tuple)):
        shown = f"{type(parts).__name__} ({reprlib.repr(parts)})"
        raise TypeError(f"{what} is a {shown}; it must be a list of {names}: write [{what}]")
    for i, part in enumerate(parts):
        if not isinstance(part, kinds):
            shown = f"{type(part).__name__} ({reprlib.repr(part)})"
            raise TypeError(f"{what}[{i}] is a {shown}; it must be {names}")


class Interleaved(tuple[Segment, ...]):
    """A tuple of segments: text, image, text, image, … answer."""

    @property
    def prompt(self) -> Interleaved:
        return Interleaved(s for s in self if s.prompt)

    @property
    def response(self) -> Interleaved:
        return Interleaved(s for s in self if not s.prompt)

    def last_image(self) -> Segment | None:
        return next((s for s in reversed(self) if s.modality is Modality.IMAGE), None)

    def __add__(self, other: Iterable[Segment]) -> Interleaved:  # type: ignore[override]
        return Interleaved((*self, *other))

    def __repr__(self) -> str:
        return f"Interleaved({' · '.join(map(repr, self))})"


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens, and the kind of response that it asks for.

    without: for guidance, the prompt without its words ("text") or its pictures ("image"). writes: what the response
    consists of. room: tokens of the canvas of each of its texts; None = `ModelSpec.text_length`. behind: ids that the
    family's template puts after the response. words: the prompt's own texts. locate: finds the region that a text
    names, for edit="region"; None = the sampler's, or the tokens that the model finds least likely. simulate: draws
    the correct PIL image after the response's texts so far (picture_source="oracle"), or that of another example
    ("shuffled"); see `Task.simulate`. None = the task cannot draw it.
    """

    whole: Interleaved
    without: Mapping[str, Interleaved] = field(default_factory=dict)
    writes: Writes = "interleaved"
    room: int | None = None
    behind: tuple[int, ...] = ()
    words: str = ""
    locate: Locate | None = None
    simulate: Callable[[Sequence[str], bool], Any] | None = None

    @property
    def plan(self) -> tuple[Kind, ...]:
        """The parts of the response in order."""
        return plan_of(self.writes)

    def laid_out(self, response: Iterable[Segment]) -> Interleaved:
        """Sets `room` and `behind` of a response's segments to this prompt's."""
        return Interleaved(
            replace(s, behind=self.behind, room=self.room if s.modality is Modality.TEXT else None) for s in response
        )


def plan_of(writes: Writes) -> tuple[Kind, ...]:
    """The parts of a response in order."""
    return (writes,) if isinstance(writes, str) else tuple(writes)


def check_writes(writes: Any) -> Writes:
    """Validates `writes`, and turns a list into a tuple. Raises ValueError, with the known kinds, for anything else."""
    plan = plan_of(writes) if isinstance(writes, (str, list, tuple)) else ()  # type: ignore[arg-type]
    if not plan or any(part not in KINDS for part in plan):
        raise ValueError(f"writes is {writes!r}; choose one of {', '.join(KINDS)}, or a tuple of them")
    if "interleaved" in plan[:-1]:
        raise ValueError(
            f"writes is {writes!r}; interleaved rounds go on until the answer, so nothing comes after them"
        )
    return writes if isinstance(writes, str) else plan  # type: ignore[return-value]


def hidden(prompt: Interleaved, modality: Modality, mask: int) -> Interleaved:
    """A prompt with every token of a modality replaced by the mask token, for guidance."""
    return Interleaved(
        replace(s, tokens=torch.full_like(s.tokens, mask)) if s.modality is modality else s  # type: ignore[arg-type]
        for s in prompt
    )
