"""Layout: one sequence of ids with their roles. Layouts are built by adding parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unidiff.config import convert
from unidiff.sequence import Interleaved, Kind, Modality, Segment, check_parts

Tokenize = Callable[[str], Sequence[int]]  # words as ids, never a special token (`unidiff.plain_text`)
Text = str | Sequence[int]  # words to tokenize, or ids, special tokens among them


class Role(IntEnum):
    """The role of an id in a layout. MARK: a delimiter, a task token, or a row separator."""

    PAD = -1
    TEXT = 0
    IMAGE = 1
    MARK = 2


@dataclass(frozen=True)
class Layout:
    """A sequence as a model reads it, all fields [L].

    segment: ordinal of the id's text or picture, -1 = mark or pad. target: ids to sample, or in training to predict.
    An id to sample is the mask id.
    """

    ids: tuple[int, ...] = ()
    role: tuple[Role, ...] = ()
    segment: tuple[int, ...] = ()
    target: tuple[bool, ...] = ()

    def __add__(self, other: Layout) -> Layout:
        after = self.segments
        moved = tuple(s if s < 0 else s + after for s in other.segment)
        return Layout(self.ids + other.ids, self.role + other.role, self.segment + moved, self.target + other.target)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def segments(self) -> int:
        """Number of texts and pictures."""
        return max(self.segment, default=-1) + 1

    @property
    def valid(self) -> tuple[bool, ...]:
        """False at pads."""
        return tuple(role is not Role.PAD for role in self.role)

    def targets(self, *roles: Role) -> list[int]:
        """Indices of the targets; with roles, only of targets with one of these roles."""
        return [i for i, hit in enumerate(self.target) if hit and (not roles or self.role[i] in roles)]

    def places(self, segment: int) -> list[int]:
        """Indices of a text or picture, without row separators."""
        return [i for i, own in enumerate(self.segment) if own == segment]


@dataclass(frozen=True)
class Guided:
    """A layout and its unconditional versions for guidance, keyed by what they leave out: "text", "image" or "prompt"
    (both).

    All have the same targets in the same order, and get the same sampled ids.
    """

    conditional: Layout
    unconditional: dict[str, Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = len(self.conditional.targets())
        for name, layout in self.unconditional.items():
            if len(layout.targets()) != wanted:
                raise ValueError(f"guidance {name!r}: {len(layout.targets())} targets, the conditional has {wanted}")


@dataclass(frozen=True)
class Picture:
    """A picture as codes of its tokenizer (no vocabulary offset), in raster order; None = to be sampled.

    grid: rows, columns. Raises ValueError if the number of cells does not match.
    """

    cells: tuple[int | None, ...]
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.cells) != self.grid[0] * self.grid[1] or not self.cells:
            raise ValueError(f"Picture: {len(self.cells)} cells do not fill a grid of {self.grid}")

    @classmethod
    def blank(cls, rows: int, columns: int) -> Picture:
        """A picture to be sampled as a whole."""
        return cls((None,) * (rows * columns), (rows, columns))

    @classmethod
    def of(cls, codes: Tensor) -> Picture:
        """The picture of an `ImageTokenizer`'s codes [rows, columns]. Raises ValueError for another shape."""
        if codes.ndim != 2:
            raise ValueError(f"codes: expected [rows, columns], got {list(codes.shape)}")
        return cls(tuple(codes.flatten().tolist()), (codes.shape[0], codes.shape[1]))

    def edited(self, mask: Tensor) -> Picture:
        """The same picture, with the cells of a mask [rows, columns] bool (`unidiff.images.grid`) to sample again."""
        if tuple(mask.shape) != self.grid:
            raise ValueError(f"mask is {list(mask.shape)}, the picture's grid {list(self.grid)}")
        flat: list[bool] = mask.flatten().to(torch.bool).tolist()
        return replace(self, cells=tuple(None if hit else cell for cell, hit in zip(self.cells, flat)))


Part = Text | Picture | int  # a part of an interleaved response; int = a text of this number of tokens to sample


class PromptTemplate(Protocol):
    """A family's format of prompts for each kind of response."""

    def prompt(
        self,
        parts: Sequence[str | Picture],
        left_out: str | None = None,
        writes: Kind = "interleaved",
        system: str | None = None,
    ) -> Interleaved:
        """The prompt's segments, with all marks. left_out: for guidance, leave out the words ("text") or the pictures
        ("image"). writes: what the response consists of. system: None = the family's own system prompt for this kind.
        Raises ValueError if the family does not support this response or a system prompt.
        """
        ...

    def behind(self, writes: Kind) -> tuple[int, ...]:
        """Ids that follow a response of one part while it is sampled."""
        ...


@dataclass(frozen=True)
class Ids:
    """Ids that every family has, and methods that build layouts from them.

    image_begin, image_end, image_offset: None = the family has no pictures.
    """

    mask: int
    bos: int
    eos: int
    image_begin: int | None = None
    image_end: int | None = None
    image_offset: int | None = None
    codebook_size: int = 0
    row_separator: int | None = None

    def marks(self, *ids: int) -> Layout:
        n = len(ids)
        return Layout(ids, (Role.MARK,) * n, (-1,) * n, (False,) * n)

    def pads(self, count: int, pad: int) -> Layout:
        return Layout((pad,) * count, (Role.PAD,) * count, (-1,) * count, (False,) * count)

    def text(self, ids: Sequence[int], learn_from: int | None = None) -> Layout:
        """A text of known ids; ids from index `learn_from` on are targets. An empty text gives no segment."""
        n = len(ids)
        target = (False,) * n if learn_from is None else tuple(i >= learn_from for i in range(n))
        return Layout(tuple(ids), (Role.TEXT,) * n, (0,) * n, target)

    def hole(self, length: int) -> Layout:
        """A text of `length` tokens to sample. Raises ValueError if length is below 1."""
        if convert(length, int, "length", words=False) < 1:
            raise ValueError(f"length: a text to be sampled needs at least one token, got {length}")
        return self.text((self.mask,) * length, learn_from=0)

    def rows(self, picture: Picture, learn: bool = False) -> Layout:
        """The cells of a picture, each row followed by the family's row separator. Targets: the unknown cells; with
        `learn` all of them. Raises ValueError for codes outside the codebook."""
        check_parts([picture], "pictures", Picture)
        if self.image_offset is None:
            raise ValueError("this family has no pictures")
        if wrong := [c for c in picture.cells if c is not None and not 0 <= c < self.codebook_size]:
            raise ValueError(
                f"Picture: codes {wrong[:3]} are not in 0 to {self.codebook_size - 1}; they are codes of the image "
                "tokenizer, without the vocabulary's offset"
            )
        separator = [] if self.row_separator is None else [(self.row_separator, Role.MARK, -1, False)]
        places: list[tuple[int, Role, int, bool]] = []
        for i, code in enumerate(picture.cells):
            token = self.mask if code is None else self.image_offset + code
            places.append((token, Role.IMAGE, 0, learn or code is None))
            if (i + 1) % picture.grid[1] == 0:
                places += separator
        return Layout(*zip(*places))

    def image(self, picture: Picture, learn: bool = False) -> Layout:
        """A picture between its delimiters."""
        rows = self.rows(picture, learn)
        assert self.image_begin is not None and self.image_end is not None
        return self.marks(self.image_begin) + rows + self.marks(self.image_end)

    def images(self, pictures: Sequence[Picture]) -> Layout:
        check_parts(pictures, "pictures", Picture)
        return sum((self.image(picture) for picture in pictures), Layout())

    def hidden(self, layout: Layout) -> Layout:
        """The same layout with everything except the targets masked, as LLaDA leaves out a prompt."""
        ids = tuple(i if hit else self.mask for i, hit in zip(layout.ids, layout.target))
        return replace(layout, ids=ids)

    def mixed(self, parts: Sequence[Text | Picture], tokenize: Tokenize) -> Layout:
        """Texts and pictures in order. Adjacent texts are merged."""
        layout = Layout()
        for part in tokenized(parts, tokenize):
            layout += self.image(part) if isinstance(part, Picture) else self.text(part)
        return layout

    def prompt(self, parts: Sequence[Text | Picture], tokenize: Tokenize) -> Interleaved:
        """As `mixed`, but as segments of a prompt. Pictures must not have cells to sample."""
        segments: list[Segment] = []
        for part in tokenized(parts, tokenize):
            if isinstance(part, tuple):
                segments.append(Segment(Modality.TEXT, torch.tensor(part), prompt=True))  # type: ignore[arg-type]
            else:
                assert self.image_offset is not None
                if None in part.cells:
                    raise ValueError("Picture: a picture of a prompt has no cells to be sampled")
                ids = torch.tensor(part.cells) + self.image_offset
                segments.append(Segment(Modality.IMAGE, ids, prompt=True, grid=part.grid))  # type: ignore[arg-type]
        return Interleaved(segments)

    def response(self, parts: Sequence[Part], tokenize: Tokenize, image_next: int, text_end: int) -> Layout:
        """The response of an interleaved sequence: finished texts and pictures, and texts to sample.

        A string gets an end id: `image_next` before a picture, `text_end` as the last part. Ids must already have one.
        If a text's last id is `image_begin`, the picture's opening delimiter is not repeated. Raises ValueError if
        there are no parts.
        """
        check_parts(parts, "response", str, list, tuple, Picture, int)
        if not parts:
            raise ValueError("response: expected at least one text, picture or number of tokens to be sampled")
        layout = Layout()
        for part, following in zip(parts, (*parts[1:], None)):
            if isinstance(part, int):
                layout += self.hole(part)
            elif isinstance(part, Picture):
                opened = layout.ids[-1:] == (self.image_begin,)
                image = self.rows(part) + self.marks(*(() if self.image_end is None else (self.image_end,)))
                layout += image if opened else self.image(part)
            elif isinstance(part, str):
                end = (image_next,) if isinstance(following, Picture) else (text_end,) if following is None else ()
                layout += self.text((*tokenize(part), *end))
            else:
                layout += self.text(ids_of(part, tokenize))
        return layout


def ids_of(text: Text, tokenize: Tokenize) -> tuple[int, ...]:
    """Tokenizes words; returns given ids unchanged. Raises TypeError for anything else."""
    if isinstance(text, str):
        return tuple(tokenize(text))
    check_parts(text, "text", int, np.integer)
    return tuple(map(int, text))


def tokenized(parts: Sequence[Text | Picture], tokenize: Tokenize) -> Iterator[tuple[int, ...] | Picture]:
    """Ids and pictures in order. Adjacent texts are merged; adjacent strings are tokenized together."""
    for kind, group in itertools.groupby(parts, lambda part: Picture if isinstance(part, Picture) else str):
        if kind is Picture:
            yield from group  # type: ignore[misc]
            continue
        ids: list[int] = []
        for strings, run in itertools.groupby(group, lambda part: isinstance(part, str)):
            if not strings:
                ids += itertools.chain(*(ids_of(part, tokenize) for part in run))  # type: ignore[arg-type]
            elif words := "".join(map(str, run)):
                ids += tokenize(words)
        if ids:
            yield tuple(ids)


def without(parts: Sequence[Text | Picture], left_out: str | None) -> list[Text | Picture]:
    """A prompt's parts without its words ("text") or its pictures ("image"). Raises ValueError for anything else,
    TypeError for anything but parts."""
    if left_out not in (None, "text", "image"):
        raise ValueError(f"left_out is {left_out!r}; a prompt can leave out 'text' or 'image'")
    check_parts(parts, "prompt", str, list, tuple, Picture)
    dropped = {"text": (str, list, tuple), "image": Picture}.get(left_out or "", ())
    return [part for part in parts if not isinstance(part, dropped)]


def filled(ids: Sequence[int], length: int, eos: int, cut: int | None = None) -> tuple[int, ...]:
    """Exactly `length` ids: padded with eos, or truncated; then the last id is `cut`, if it is given."""
    if len(ids) <= length:
        return (*ids, *[eos] * (length - len(ids)))
    return tuple(ids[:length]) if cut is None else (*ids[: length - 1], cut)
