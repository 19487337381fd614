"""Interleaved sequences of text and image tokens. Data only.

`Segment` is one run of tokens of one modality, `Interleaved` a tuple of segments.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import BoolTensor, FloatTensor, IntTensor, LongTensor, Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


class Modality(IntEnum):
    """What a token is. A pad has the value -1 in `Tokens.modality`."""

    TEXT = 0
    IMAGE = 1


@dataclass(frozen=True, eq=False)
class Segment:
    """One run of tokens of one modality.

    tokens: [n] int64 ids in the model's vocabulary, without delimiters or row separators. A sampled text includes
    its end token. grid: rows and columns of an image, n == rows * columns. edited: [n] bool, the tokens of a sampled
    image that were denoised again, the others being copies of the image before; None = every token was sampled.
    step: [n] int32, the denoising step that committed each token, -1 = kept. probability: [n] float32 of each token
    when it was committed (1 where kept). trace: [T, n] float32, at each of the T steps the probability of the token
    drawn at each place that was masked then (in a text: in the block at work), NaN elsewhere; None unless it was asked.
    """

    modality: Modality
    tokens: LongTensor
    prompt: bool = False
    grid: tuple[int, int] | None = None
    edited: BoolTensor | None = None
    step: IntTensor | None = None
    probability: FloatTensor | None = None
    trace: FloatTensor | None = None

    def __post_init__(self) -> None:
        n = self.tokens.numel()
        if self.modality is Modality.IMAGE and (self.grid is None or self.grid[0] * self.grid[1] != n):
            raise ValueError(f"Segment.grid is {self.grid}, but an image of {n} tokens needs rows * columns == {n}")
        for name in ("edited", "step", "probability"):
            value = getattr(self, name)
            if value is not None and value.numel() != n:
                raise ValueError(f"Segment.{name} has {value.numel()} values for {n} tokens")
        if self.trace is not None and self.trace.shape[1:] != (n,):
            raise ValueError(f"Segment.trace is {list(self.trace.shape)}, expected [steps, {n}]")

    def __len__(self) -> int:
        return self.tokens.numel()

    @property
    def sampled(self) -> Tensor:
        """[n] bool: tokens that the policy chose."""
        if self.prompt:
            return torch.zeros(len(self), dtype=torch.bool)
        return torch.ones(len(self), dtype=torch.bool) if self.edited is None else self.edited.bool()

    def __repr__(self) -> str:
        shape = f"{self.grid[0]}×{self.grid[1]}" if self.grid else str(len(self))
        edit = f", {int(self.edited.sum())} edited" if self.edited is not None else ""
        return f"{'prompt ' if self.prompt else ''}{self.modality.name.lower()}[{shape}{edit}]"


def check_parts(parts: Any, what: str = "prompt", *kinds: type) -> None:
    """Raises TypeError, with the remedy, unless `parts` is a list or tuple of these kinds (none given: texts and PIL
    images). One text in place of a list would be read letter by letter."""
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

    @classmethod
    def from_parts(
        cls,
        parts: Sequence[str | Image],
        encode_text: Callable[[str], LongTensor],
        encode_image: Callable[[Image], tuple[LongTensor, tuple[int, int]]],
        prompt: bool = True,
    ) -> Interleaved:
        """Builds a sequence from texts and PIL images with a model's tokenizers (see `UnifiedModel.encode`). Raises
        TypeError for anything else (see `check_parts`)."""
        check_parts(parts, "prompt" if prompt else "response")
        segments = []
        for part in parts:
            if isinstance(part, str):
                segments.append(Segment(Modality.TEXT, encode_text(part), prompt))
            else:
                tokens, grid = encode_image(part)
                segments.append(Segment(Modality.IMAGE, tokens, prompt, grid))
        return cls(segments)

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
    """A prompt as tokens, and what guidance compares it with: without its words ("text") or its pictures ("image")."""

    whole: Interleaved
    without: Mapping[str, Interleaved] = field(default_factory=dict)


def hidden(prompt: Interleaved, modality: Modality, mask: int) -> Interleaved:
    """A prompt with every token of a modality replaced by the mask token: what a model without it is shown."""
    return Interleaved(
        replace(s, tokens=torch.full_like(s.tokens, mask)) if s.modality is modality else s  # type: ignore[arg-type]
        for s in prompt
    )
